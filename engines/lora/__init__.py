"""Files that change weights: LoRA and its kin, and what they do to a bundle's networks."""
