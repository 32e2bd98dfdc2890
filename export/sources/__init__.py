"""Checkpoints as they lie on disk and on the hub, taken apart."""
