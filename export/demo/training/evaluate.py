"""Prompt accuracy of the demo checkpoint, drawn with diffusers: `python -m latentrt.export.demo.training.evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from latentrt.export.demo.checker import Verdict, check_picture, count_right
from latentrt.export.demo.drawing import Pixels, Scene
from latentrt.export.demo.wording import ONE_OBJECT, TWO_OBJECTS, fill, held_out_pairs, held_out_scenes

CHECKPOINT = Path(__file__).parent.parent / "checkpoint"
SETS = {"one": (held_out_scenes, ONE_OBJECT[0]), "two": (held_out_pairs, TWO_OBJECTS[0])}


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a checkpoint in float32, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], first_seed: int, *, steps: int, guidance: float
) -> Pixels:
    """Draw one picture for every prompt, seeds counting up: (batch, 128, 128, 3), uint8."""
    generators = [torch.Generator().manual_seed(first_seed + k) for k in range(len(prompts))]
    pictures = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
        height=128,
        width=128,
    ).images
    return np.asarray(np.rint(pictures * 255), dtype=np.uint8)


def lay_out(pictures: Pixels, verdicts: list[Verdict], columns: int = 10) -> Image.Image:
    """Lay pictures out in rows, wrong ones with a red bar above."""
    tiles = []
    for picture, verdict in zip(pictures, verdicts, strict=True):
        bar = np.full((8, 128, 3), (255, 255, 255) if verdict.right else (255, 0, 0), dtype=np.uint8)
        tiles.append(np.concatenate([bar, picture]))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[k : k + columns], axis=1) for k in range(0, len(tiles), columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Draw held-out prompts and print which share of them came out right."""
    parser = argparse.ArgumentParser(prog="python -m latentrt.export.demo.training.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompts", choices=tuple(SETS), default="one", help="objects in each picture")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--pictures", type=Path, help="PNG file to lay the pictures out in")
    options = parser.parse_args()
    begun = time.monotonic()
    make_scenes, wording = SETS[options.prompts]
    scenes: list[Scene] = make_scenes(options.count, np.random.default_rng(0))
    prompts = [fill(wording, scene) for scene in scenes]
    pipeline = load_pipeline(options.checkpoint)
    pictures = np.concatenate(
        [
            draw(pipeline, prompts[k : k + options.batch], k, steps=options.steps, guidance=options.guidance)
            for k in range(0, options.count, options.batch)
        ]
    )
    verdicts = [check_picture(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    shares = {name: round(share, 3) for name, share in count_right(verdicts).items()}
    sys.stdout.write(json.dumps({**shares, "seconds": round(time.monotonic() - begun, 1)}) + "\n")
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        if not verdict.right:
            sys.stdout.write(f"wrong: {prompt}: {verdict}\n")
    if options.pictures:
        lay_out(pictures, verdicts).save(options.pictures)


if __name__ == "__main__":
    main()
