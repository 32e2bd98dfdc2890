"""Many requests at a time: their pictures share the stages of the denoiser."""
