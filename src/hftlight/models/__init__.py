"""Models: where they come from, how they are loaded, adapted, trained and served."""
