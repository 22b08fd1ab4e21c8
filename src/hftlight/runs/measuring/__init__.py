"""What a run measures of each model."""
