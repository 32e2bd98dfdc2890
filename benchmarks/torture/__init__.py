"""Reliability under fire: writes that fail, files that were altered, long use, devices that refuse.

`python -m benchmarks.torture --help` lists the parts. What they found is in docs/reliability.md.
"""
