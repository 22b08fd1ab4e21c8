"""The made-up world: its text, its rule and the functions that build its rows."""
