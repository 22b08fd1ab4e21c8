"""How a model answers prompts."""
