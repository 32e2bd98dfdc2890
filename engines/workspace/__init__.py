"""Where drawing happens: the contract, and the implementation in NumPy around the canonical graphs."""
