"""Files that change weights: LoRA and related kinds, and what they do to a bundle's networks."""
