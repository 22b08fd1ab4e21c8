"""The measurements of each model of a run."""
