"""What is in a bundle, and what builds and runs it on one kind of device."""
