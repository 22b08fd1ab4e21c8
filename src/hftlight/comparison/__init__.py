"""Comparisons: one run per combination, seed, task and harmful ratio, and what they show together."""
