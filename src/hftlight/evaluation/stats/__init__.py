"""Intervals, and agreement of judges."""
