"""Samplers as tables: schedules, spacings, and the plans that the loop executes."""
