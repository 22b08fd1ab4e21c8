"""The stages of a run: each is done once and kept in the cache."""
