"""Draw pictures from a bundle: sampling plans, the denoising loop and the public `Pipeline`."""
