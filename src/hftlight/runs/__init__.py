"""Runs: stages, artifacts, measurements, and the folder that holds them."""
