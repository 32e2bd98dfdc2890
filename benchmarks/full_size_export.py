"""Export the full-size SD 1.5 architecture with random weights: seconds, peak memory over weights, seconds a step.

    python benchmarks/full_size_export.py [--precision fp32|fp16] [--steps 3]

Needs 8 GiB of disk in --folder (a temporary one by default) and 8 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import save_random

from latentrt.engines.bundle import Bundle
from latentrt.engines.opening import open_engines
from latentrt.engines.progress import terminal_report
from latentrt.export.cli import summarise
from latentrt.export.exporting import export_checkpoint
from latentrt.runtime.bench.machine import describe

GIB = 1 << 30
TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="Of weights and graphs.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.precision, arguments.steps)
    for name, row in result["export"]["components"].items():
        print(
            f"{name:<13} {row['seconds']:7.1f} s  weights {row['weights_bytes'] / GIB:5.2f} GiB  "
            f"peak {row['peak_rss_bytes'] / GIB:5.2f} GiB, {row['peak_rss_over_weights']:.2f} of the weights"
        )
    print(f"{result['step_seconds']:.2f} s a UNet call at 64x64 latents, one row, ONNX Runtime on the CPU")
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"full-size-export-{arguments.precision}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file)


def measure(folder: Path, precision: Any, steps: int) -> dict[str, Any]:
    """Save, export and step the model. Returns the figures with their machine."""
    checkpoint = save_random("sd15", folder / "checkpoint", half=precision == "fp16")
    with terminal_report() as report:
        exported = export_checkpoint(str(checkpoint), folder / "bundle", precision=precision, report=report)
    return {
        "machine": describe(),
        "command": f"python benchmarks/full_size_export.py --precision {precision} --steps {steps}",
        "export": summarise(exported, Path("bundle")),
        "step_seconds": round(step_seconds(Bundle.open(folder / "bundle"), steps), 3),
    }


def step_seconds(bundle: Bundle, steps: int) -> float:
    """Return the median seconds of one UNet call at the checkpoint's own size."""
    opened = open_engines(bundle, "cpu", components=("unet",), check="size")
    unet = opened.engines["unet"]
    width, height = (side // bundle.manifest.latents.factor for side in bundle.manifest.default_size)
    generator = np.random.default_rng(0)
    shapes = {"sample": (1, bundle.manifest.latents.channels, height, width), "timestep": (1,)}
    shapes["encoder_hidden_states"] = (1, TOKENS, int(unet.spec.inputs[-1].shape[-1]))
    inputs = {spec.name: generator.standard_normal(shapes[spec.name]).astype(spec.dtype) for spec in unet.spec.inputs}
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        unet(inputs)
        seconds.append(time.perf_counter() - start)
    opened.close()
    return statistics.median(seconds[1:])  # the first call prepares


if __name__ == "__main__":
    main()
