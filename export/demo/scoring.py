"""The demo's held-out prompts with their answers, for whoever measures how many of them come out right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from latentrt.export.demo.checker import check_picture
from latentrt.export.demo.drawing import Pixels
from latentrt.export.demo.wording import ONE_OBJECT, fill, held_out_scenes


def held_out_prompts(count: int) -> tuple[Sequence[str], Callable[[int, Pixels], bool]]:
    """Return prompts that training never saw, always the same, and a judge of the picture drawn for the i-th."""
    scenes = held_out_scenes(count, np.random.default_rng(0))

    def judge(index: int, pixels: Pixels) -> bool:
        return check_picture(pixels, scenes[index]).right

    return [fill(ONE_OBJECT[0], scene) for scene in scenes], judge
