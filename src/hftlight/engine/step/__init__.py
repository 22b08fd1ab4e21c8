"""What a defense needs from a training step."""
