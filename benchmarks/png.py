"""How long Pillow takes to write PNGs, and how large they are: time against bytes, setting by setting.

    python benchmarks/png.py demo/shapes [--rounds 20] [--json benchmarks/results/png.json]

On four pictures of a bundle, and on a photograph (matplotlib's sample, where it is installed) at 512x512 and
1024x1024. In each round all settings take turns in random order; time is the median over rounds of each round's own
ratio to Pillow's default, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from paired import paired_ratio
from PIL import Image, features

from latentrt import Pipeline, Request
from latentrt.runtime.bench.machine import describe, now
from latentrt.runtime.images.write_png import encode_png

PROMPTS = ("a large red circle", "a small blue square on a white background", "a green triangle", "a yellow star")
SIDES = (512, 1024)
DEFAULT, OURS = "default", "latentrt"
# Pillow's options; `filtered` is its own strategy.
SETTINGS: Mapping[str, Mapping[str, int]] = {
    DEFAULT: {},
    "level 1": {"compress_level": 1},
    "level 2": {"compress_level": 2},
    "level 3": {"compress_level": 3},
    "level 4": {"compress_level": 4},
    "level 9": {"compress_level": 9},
    "huffman alone": {"compress_level": 1, "compress_type": Image.HUFFMAN_ONLY},
    "no compression": {"compress_level": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {
        "created": now(),
        "command": sys.argv[1:],
        "machine": describe(),
        "pillow": {name: str(features.version(name)) for name in ("pil", "zlib", "zlib_ng")},
        "pictures": {
            name: measure(pictures, arguments.rounds) for name, pictures in all_pictures(arguments.bundle).items()
        },
    }
    for name, settings in found["pictures"].items():
        print(name)
        for setting, row in settings.items():
            low, high = (f"{end:.2f}" if end else "–" for end in (row["time"]["low"], row["time"]["high"]))
            times = f"{row['time']['estimate']:.2f} ({low} to {high}) of the time"
            print(f"  {setting:<15}{1e3 * row['seconds']:8.1f} ms  {times}  {row['bytes_ratio']:.3f} of the bytes")
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")


def all_pictures(bundle: Path) -> dict[str, list[Image.Image]]:
    """Return pictures by what they are."""
    with Pipeline.load(bundle) as pipe:
        drawn = pipe.draw(Request(prompt=PROMPTS, steps=8, guidance=3.0, seed=0)).images
    return {f"{bundle.name}, {drawn[0].width}x{drawn[0].height}": drawn} | photographs()


def photographs() -> dict[str, list[Image.Image]]:
    try:
        from matplotlib import cbook
    except ImportError:
        return {}
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    size = min(photograph.size)
    whole = photograph.crop((0, 0, size, size))
    sized = {side: whole.resize((side, side), Image.Resampling.LANCZOS) for side in SIDES}
    return {f"photograph, {side}x{side}": [picture] for side, picture in sized.items()}


def measure(pictures: list[Image.Image], rounds: int) -> dict[str, Any]:
    """Return for each setting the median seconds of a picture, its ratio to the default's, and its bytes."""
    seconds: dict[str, list[float]] = {name: [] for name in (*SETTINGS, OURS)}
    written: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name in random.sample(list(seconds), len(seconds)):
            start = time.perf_counter()
            written[name] = sum(len(encode(picture, name)) for picture in pictures)
            if turn:
                seconds[name].append((time.perf_counter() - start) / len(pictures))
    return {
        name: {
            "seconds": statistics.median(some),
            "time": msgspec.to_builtins(paired_ratio(seconds[DEFAULT], some)),
            "bytes": written[name] / len(pictures),
            "bytes_ratio": written[name] / written[DEFAULT],
        }
        for name, some in seconds.items()
    }


def encode(picture: Image.Image, setting: str) -> bytes:
    """Return a PNG without settings in it."""
    file = io.BytesIO()
    if setting == OURS:
        encode_png(picture, file, None)
    else:
        picture.save(file, format="PNG", **SETTINGS[setting])
    return file.getvalue()


if __name__ == "__main__":
    main()
