"""Images as prompts: checked, encoded, and laid into the rows of a denoiser that attends to them."""
