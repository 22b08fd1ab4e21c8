"""Search over settings: a space of trials, and a search that does not depend on runs."""
