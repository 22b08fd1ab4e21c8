"""Search over settings: a space of trials, and a search that knows no runs."""
