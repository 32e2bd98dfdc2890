"""What a checkpoint's configs mean, and those of weights that come without any."""
