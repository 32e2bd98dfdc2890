"""The equations, written once, run on the rows of an identity matrix."""
