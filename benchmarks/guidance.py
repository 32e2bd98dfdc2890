"""What a guidance interval saves and costs: seconds and right prompts of the demo, against guidance at every step.

python benchmarks/guidance.py demo/shapes
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.export.demo.checker import check_picture, count_right
from latentrt.export.demo.wording import ONE_OBJECT, fill, held_out_scenes
from latentrt.runtime.bench.machine import describe
from latentrt.runtime.pipeline import Pipeline

BATCH = 8
INTERVALS = ((0.0, 1.0), (0.0, 0.5), (0.2, 0.8), (0.0, 0.25))
SETTINGS: dict[str, Any] = {"steps": 20, "sampler": "dpmpp_2m_karras", "guidance": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/guidance.json"))
    arguments = parser.parse_args()
    scenes = held_out_scenes(arguments.prompts, np.random.default_rng(0))
    with Pipeline.load(arguments.bundle, warm_up=True) as pipe:
        rows = measure(pipe, scenes)
    for row in rows:
        print(f"{row['interval']}: {row['right']:.1%} right, {row['ratio']:.2f} of the seconds")
    document = {"machine": describe(), "prompts": arguments.prompts, **SETTINGS, "intervals": rows}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(pipe: Pipeline, scenes: Any) -> list[dict[str, Any]]:
    """Draw each batch with every interval in turn, so that what slows the machine slows all of them."""
    verdicts: dict[Any, list[Any]] = {interval: [] for interval in INTERVALS}
    seconds: dict[Any, list[float]] = {interval: [] for interval in INTERVALS}
    for first in range(0, len(scenes), BATCH):
        some = scenes[first : first + BATCH]
        prompts, seeds = [fill(ONE_OBJECT[0], scene) for scene in some], [first + i for i in range(len(some))]
        for interval in INTERVALS:
            drawn = pipe(prompts, seed=seeds, guidance_interval=interval, **SETTINGS)
            seconds[interval].append(drawn.seconds["denoise"])
            pairs = zip(drawn.pixels, some, strict=True)
            verdicts[interval] += [check_picture(pixels, scene) for pixels, scene in pairs]
    whole = seconds[INTERVALS[0]]
    return [
        {
            "interval": interval,
            "right": count_right(verdicts[interval])["right"],
            "ratio": statistics.median(part / all_ for part, all_ in zip(seconds[interval], whole, strict=True)),
        }
        for interval in INTERVALS
    ]


if __name__ == "__main__":
    main()
