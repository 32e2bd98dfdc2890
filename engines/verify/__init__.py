"""Recorded inputs and outputs, and whether engines still compute them."""
