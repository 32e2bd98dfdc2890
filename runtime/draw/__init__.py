"""One request drawn: what it means for a bundle, and the order of things."""
