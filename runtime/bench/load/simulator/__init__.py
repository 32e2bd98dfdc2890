"""A service simulated event by event: one machine, many, and what is said of a load before it is measured."""
