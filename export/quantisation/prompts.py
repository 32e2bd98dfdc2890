"""What is drawn to find the ranges of a denoiser, and what is lost: prompts of the kinds that people write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a checkpoint is asked to draw.

    prompts: the last `held_out` are not for the ranges; what is lost is measured on them
    """

    prompts: tuple[str, ...]
    guidance: float
    held_out: int = 2
    steps: int = 6


GENERAL = Trial(
    prompts=(
        "a portrait photograph of an old fisherman with a grey beard, soft morning light, 85mm",
        "a red bicycle leaning on a white wall, a street in a small town, noon, hard shadows",
        "masterpiece, best quality, 1girl, long hair, cherry blossoms, intricate, anime",
        "a bowl of oranges on a wooden table, oil painting, in the style of an old master",
        "a snow-covered mountain range behind a dark lake at night, stars, long exposure",
        "isometric 3d render of a tiny castle on a floating island, pastel colours",
    ),
    guidance=7.5,
)


def trial_of(checkpoint: str) -> Trial:
    """Return what a checkpoint is asked to draw, by its name."""
    return OWN[checkpoint]() if checkpoint in OWN else GENERAL


def _shapes() -> Trial:
    import numpy as np

    from latentrt.export.demo.drawing import any_scene
    from latentrt.export.demo.wording import describe

    generator = np.random.default_rng(0)
    scenes = [any_scene(generator, pairs=False) for _ in GENERAL.prompts]
    return Trial(prompts=tuple(describe(scene, generator) for scene in scenes), guidance=3.0)


# Of checkpoints that do not draw everything.
OWN: Mapping[str, Callable[[], Trial]] = {"demo": _shapes}
