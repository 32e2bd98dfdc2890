"""Triton Inference Server: a model repository for its Python backend, and the model that it runs there."""
