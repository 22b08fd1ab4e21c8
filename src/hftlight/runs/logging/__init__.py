"""Where curves and scores of a run go."""
