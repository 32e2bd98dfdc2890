"""What 8 bits cost in pictures: PSNR to the float32 bundle's, and right prompts of the demo, drawn on the CPU.

python benchmarks/quantised.py demo/shapes demo/shapes-fp8 demo/shapes-int8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle
from latentrt.export.demo.scoring import held_out_prompts
from latentrt.export.quantisation.quantise import decibels
from latentrt.runtime.bench.machine import describe
from latentrt.runtime.pipeline import Pipeline

SETTINGS: dict[str, Any] = {"steps": 20, "guidance": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("quantised", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantised.json"))
    arguments = parser.parse_args()
    expected, right = drawn(arguments.bundle, arguments.prompts)
    rows = {arguments.bundle.name: {"right": right}}
    for path in arguments.quantised:
        rows[path.name] = row(path, expected)
        print(
            f"{path.name}: {rows[path.name]['right']} right, {rows[path.name]['decibels']['median']:.1f} dB", flush=True
        )
    document = {"machine": describe(), "prompts": arguments.prompts, **SETTINGS, "bundles": rows}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def drawn(bundle: Path, count: int) -> tuple[np.ndarray, int]:
    """Draw held-out prompts, seeds 0, 1, 2, …; return the pixels and how many are right."""
    texts, judge = held_out_prompts(count)
    with Pipeline.load(bundle) as pipe:
        pixels = [pipe(text, seed=seed, **SETTINGS).pixels[0] for seed, text in enumerate(texts)]
    return np.stack(pixels), sum(judge(place, one) for place, one in enumerate(pixels))


def row(path: Path, expected: np.ndarray) -> dict[str, Any]:
    """Return what one bundle loses, beside what its manifest says of it."""
    found, right = drawn(path, len(expected))
    lost = decibels(found, expected)
    components = Bundle.open(path).manifest.components
    return {
        "right": right,
        "decibels": {"median": float(np.median(lost)), "least": float(lost.min()), "most": float(lost.max())},
        "told": {name: msgspec.to_builtins(one.quantised) for name, one in components.items() if one.quantised},
        "weights_bytes": {name: one.weights_bytes for name, one in components.items() if one.quantised},
    }


if __name__ == "__main__":
    main()
