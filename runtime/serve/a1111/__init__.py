"""A1111's API under /sdapi/v1, as its clients call it: what they send, what they read, what is refused by name."""
