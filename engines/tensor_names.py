"""What ControlNets and T2I-Adapters add to a denoiser, by name.

A ControlNet adds at every stage: a residual for each of a UNet's skip connections, and one for its middle; or some
behind the blocks of a transformer. It is a component of its own, which takes the residuals so far and gives them with
its own added, so that several of them form a chain that ends in the denoiser. A T2I-Adapter, a component too, adds what
it computes once a picture: a feature inside each block on the way down.
"""

from __future__ import annotations

from collections.abc import Iterable

FEATURE = "adapter_feature_"
DOWN, MID = "down_residual_", "mid_residual"
BLOCK = "block_residual_"  # of a transformer, which has no levels
NEXT = "next_"  # before the name of a residual, where it is an output
COND, SCALE = "controlnet_cond", "scale"
# What IP-Adapters made of images, side by side, and how strongly each layer attends to each adapter's: (rows, tokens,
# width) and (rows, adapters, layers).
IMAGE_TOKENS, IMAGE_SCALE = "image_tokens", "image_scale"
# A UNet halves its latents from level to level, rounding up. No published one has more than four levels.
DIVISORS = (1, 2, 4, 8, 16, 32)


def hint_of(component: str) -> str:
    """Return the name under which a workspace is given what a ControlNet follows.

    It is the pixels of a picture, (P, 3, height, width), or its latents, (P, C, height / factor, width / factor).
    """
    return f"{component}.{COND}"


def is_residual(name: str) -> bool:
    """Tell whether an input is one of the residuals."""
    return name.startswith((DOWN, BLOCK)) or name == MID


def residual_names(downs: int) -> tuple[str, ...]:
    """Return the names of a UNet's residuals: of its skip connections from the first on, then of its middle."""
    return (*(f"{DOWN}{number}" for number in range(downs)), MID)


def level_axes(latent_height: int, latent_width: int) -> dict[str, int]:
    """Return the sides of the levels of a UNet: `latent_height_N` is the height over N, rounded up."""
    sides = {"latent_height": latent_height, "latent_width": latent_width}
    return {f"{axis}_{n}": -(-side // n) for axis, side in sides.items() for n in DIVISORS}


SKIP_LAYERS = "skip_layers"  # what switches some of a transformer's blocks off for a model row where it is above 0


def row_groups(inputs: Iterable[str]) -> int:
    """Return how many groups of model rows a denoiser may be run on. inputs: the names of all that it takes

    They are the prompts, the negative prompts and, where some of its layers can be skipped, the prompts again.
    """
    return 3 if SKIP_LAYERS in inputs else 2


PREVIOUS = "previous_state"
# What a denoiser sees after each frame's latents, of the image that moves: (rows, C, h, w), zeros in the rows of
# negative prompts.
IMAGE_LATENTS = "image_latents"
FRAMES = "frame_index"  # (frames,): its length is that of a window of a denoiser whose rows are frames
HINT = "hint"
PIXELS = "pixels"
SQUARES = "squares"  # what tells of a decoder's numbers whether all were finite
EXTRA_EMBEDDINGS = "extra_embeddings"


# Rows of state of the samplers that remember most (tests/test_stage.py::test_every_sampler_fits_the_fused_stage).
STATE_ROWS = 6
UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states")


def control_width(state_rows: int) -> int:
    """Return how many numbers control one stage of one picture.

    They are, in order: the timestep; the rescaling of guidance (0 for none); the weights of picture and noise in
    what is kept (see keep_mask); the input row, R; the transition, R * (R + 2), row-major.
    """
    return 4 + state_rows + state_rows * (state_rows + 2)
