"""What sharing stages gives on a device: many pictures one at a time and through the batcher, in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from gpu_models import Model
from gpu_pictures import compare

from latentrt.engines.spec import Array
from latentrt.runtime.batching.batcher import Batcher, BatcherOptions
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Request

PROMPTS = ("a large red circle on a striped blue background", "a medium yellow star on a plain purple background")


def share_stages(root: str, backend: str, model: Model, *, slots: int, pictures: int, rounds: int) -> dict[str, Any]:
    """Draw `pictures` different pictures in both ways, `rounds` times.

    Returns the seconds of each way and round, their median ratio, and how far the first round's pictures are apart.
    """
    requests = [
        Request(
            prompt=PROMPTS[number % len(PROMPTS)],
            seed=number,
            steps=model.steps,
            guidance=model.guidance,
            sampler=model.sampler,
            size=(model.size, model.size),
        )
        for number in range(pictures)
    ]
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    drawn: dict[str, Array] = {}
    with Pipeline.load(root, backend, check="size") as pipe, Batcher(pipe, BatcherOptions(slots=slots)) as batcher:
        ways = {"alone": lambda: _alone(pipe, requests), "shared": lambda: _shared(batcher, requests)}
        for number in range(rounds + 1):  # the first round warms up
            for name, draw in ways.items():
                start = time.perf_counter()
                found = draw()
                if number:
                    seconds[name].append(time.perf_counter() - start)
                drawn.setdefault(name, found)
    ratios = np.array(seconds["alone"]) / np.array(seconds["shared"])
    return {"slots": slots, "pictures": pictures, "seconds": seconds, "ratio": float(np.median(ratios))} | _apart(drawn)


def _apart(drawn: Mapping[str, Array]) -> dict[str, Any]:
    compared = compare({"pictures": drawn["alone"]}, {"pictures": drawn["shared"]})["pictures"]
    return {"pictures are": compared}


def _alone(pipe: Pipeline, requests: list[Request]) -> Array:
    return np.stack([np.asarray(pipe.draw(request).images[0]) for request in requests])


def _shared(batcher: Batcher, requests: list[Request]) -> Array:
    futures = [future for request in requests for future in batcher.submit(request)]
    return np.stack([np.asarray(future.result().images[0]) for future in futures])
