"""Writes that fail and commands that are killed: a layer below libc, what writes, and what came of it."""
