"""The picture of the README and the demo's prompt accuracy, both drawn by the runtime from an exported bundle.

python benchmarks/pictures.py demo/shapes --accuracy 200 --grid docs/shapes.png
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentrt.export.demo.checker import check_picture, count_right
from latentrt.export.demo.wording import ONE_OBJECT, fill, held_out_scenes
from latentrt.runtime.bench.machine import describe
from latentrt.runtime.pipeline import Pipeline

TILE, CAPTION, COLUMNS, BATCH = 128, 34, 6, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--accuracy", type=int, default=0, help="How many held-out prompts to score.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpmpp_2m_karras")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--grid", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/accuracy.json"))
    arguments = parser.parse_args()
    settings = {"steps": arguments.steps, "sampler": arguments.sampler, "guidance": arguments.guidance}
    with Pipeline.load(arguments.bundle) as pipe:
        if arguments.accuracy:
            accuracy(pipe, arguments.accuracy, settings, arguments.output)
        if arguments.grid:
            grid(pipe, settings, arguments.grid)


def accuracy(pipe: Pipeline, count: int, settings: dict[str, object], output: Path) -> None:
    """Draw held-out prompts, seeds 0, 1, 2, …, and print which share is right in all that the prompt names."""
    scenes = held_out_scenes(count, np.random.default_rng(0))
    verdicts, start = [], time.perf_counter()
    for first in range(0, count, BATCH):
        some = scenes[first : first + BATCH]
        seeds = [first + i for i in range(len(some))]
        drawn = pipe([fill(ONE_OBJECT[0], scene) for scene in some], seed=seeds, **settings)  # type: ignore[arg-type]
        verdicts += [check_picture(pixels, scene) for pixels, scene in zip(drawn.pixels, some, strict=True)]
    shares = count_right(verdicts)
    seconds = time.perf_counter() - start
    print(
        f"{count} held-out prompts, {settings}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    )
    document = {"machine": describe(), "prompts": count, **settings, "right": shares, "seconds": seconds}
    output.write_text(json.dumps(document, indent=1) + "\n")


def grid(pipe: Pipeline, settings: dict[str, object], path: Path) -> None:
    """Draw held-out prompts with their captions below, as they come: none is left out."""
    scenes = held_out_scenes(2 * COLUMNS, np.random.default_rng(1))
    prompts = [fill(ONE_OBJECT[0], scene) for scene in scenes]
    drawn = pipe(prompts, seed=0, **settings)  # type: ignore[arg-type]
    sheet = Image.new("RGB", (COLUMNS * (TILE + 8), 2 * (TILE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for i, (image, prompt) in enumerate(zip(drawn.images, prompts, strict=True)):
        x, y = (i % COLUMNS) * (TILE + 8) + 4, (i // COLUMNS) * (TILE + CAPTION)
        sheet.paste(image, (x, y))
        pen.multiline_text((x, y + TILE + 2), textwrap.fill(prompt, 27), fill="black", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
