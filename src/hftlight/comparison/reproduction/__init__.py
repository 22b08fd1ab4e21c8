"""A table of a paper repeated: its settings, its inputs, its numbers beside ours, and their page."""
