"""The made-up world: its text, its rule, and how its rows are built."""
