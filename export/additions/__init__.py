"""What is added to a checkpoint, or replaces a part of it."""
