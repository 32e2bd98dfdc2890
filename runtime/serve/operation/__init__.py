"""Operation of the service: who may ask, within what limits; health, metrics, logs, and how it starts and ends."""
