"""Benchmarks that can be trusted: what `latentrt bench` measures, and how it is compared and shown."""
