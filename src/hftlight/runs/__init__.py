"""Runs: preparation, stages, measurements, logging, and the folder of a run."""
