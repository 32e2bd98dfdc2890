"""The demo checkpoint "shapes": a tiny text-to-image model, its pictures and the checker that scores them."""
