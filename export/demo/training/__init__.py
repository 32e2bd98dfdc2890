"""How the demo checkpoint was trained, and is evaluated with diffusers; for a checkout: no wheel holds this."""
