"""The demo checkpoint "shapes": a tiny text-to-image model, its pictures, its training and its checker."""
