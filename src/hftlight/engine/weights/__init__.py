"""What an edit of a finished model's weights needs."""
