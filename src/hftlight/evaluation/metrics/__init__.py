"""Metrics of answers and of models."""
