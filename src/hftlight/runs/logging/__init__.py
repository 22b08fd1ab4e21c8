"""Logging: the destinations of a run's curves and scores."""
