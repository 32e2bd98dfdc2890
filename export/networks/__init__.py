"""The networks as a table, and their weights, a layer at a time."""
