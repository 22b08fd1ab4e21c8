"""Comparisons: one run per combination of defenses, attack, task, harmful ratio and seed, and a common report."""
