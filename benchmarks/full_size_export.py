"""Export a full-size architecture with random weights: seconds, peak memory over weights, seconds a step.

    python benchmarks/full_size_export.py [--model sd15|sdxl|sd35-medium-no-t5|…] [--precision fp32|fp16] [--steps 3]

--folder (a temporary one by default) needs disk for the checkpoint and the export, which says how much before it
starts; for a step, SD 1.5 takes 12 GiB and SDXL 40 GiB. Exporting takes less memory than the largest component's
weights; a step on the CPU takes what they are in float32, mapped, and again as the kernels lay them out: 7 GiB for
SD 1.5, 21 GiB for SDXL. --steps 0 builds no engines and makes no step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import save_random

from latentrt.engines.build import build_engines
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.open import open_engines
from latentrt.engines.progress import Report, terminal_report
from latentrt.export.cli import summarise
from latentrt.export.export import export_checkpoint
from latentrt.export.work.finished import peak_rss_bytes
from latentrt.runtime.bench.machine import describe

GIB = 1 << 30
MODELS = ("sd15", "sdxl", "sd35-medium", "sd35-medium-no-t5", "sd35-large", "sd35-large-no-t5", "t5-xxl")
TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="Of weights and graphs.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.model, arguments.precision, arguments.steps)
    for name, row in result["export"]["components"].items():
        print(
            f"{name:<13} {row['seconds']:7.1f} s  weights {row['weights_bytes'] / GIB:5.2f} GiB  "
            f"peak {row['peak_rss_bytes'] / GIB:5.2f} GiB, {row['peak_rss_over_weights']:.2f} of the weights"
        )
    export = result["export"]
    print(
        f"peak memory of the export {export['peak_rss_bytes'] / GIB:.2f} GiB, "
        f"{export['peak_rss_over_largest']:.2f} of the largest component's weights"
    )
    if "step_seconds" in result:
        print(
            f"{result['step_seconds']:.2f} s a call of the denoiser at its own size, one row, ONNX Runtime on the CPU"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = "" if arguments.model == "sd15" else f"-{arguments.model}"
    file = arguments.output / f"full-size-export{model}-{arguments.precision}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file)


def measure(folder: Path, model: str, precision: Any, steps: int) -> dict[str, Any]:
    """Save, export and step the model. Returns the figures with their machine."""
    checkpoint = save_random(model, folder / "checkpoint", half=precision == "fp16")
    with terminal_report() as report:
        exported = export_checkpoint(
            str(checkpoint), folder / "bundle", precision=precision, backends=[], report=report
        )
        shutil.rmtree(checkpoint)  # the engine wants the disk
        result = {
            "machine": describe(),
            "command": f"python benchmarks/full_size_export.py --model {model} --precision {precision} --steps {steps}",
            "export": summarise(exported, Path("bundle")),
        }
        return result | (measure_step(folder / "bundle", steps, report) if steps else {})


def measure_step(bundle: Path, steps: int, report: Report) -> dict[str, Any]:
    """Build the CPU's engines and make steps, in this process. Returns seconds and peak memory."""
    start = time.perf_counter()
    build_engines(Bundle.open(bundle), "cpu", report=report)
    built = {"build_seconds": round(time.perf_counter() - start, 1), "build_peak_rss_bytes": peak_rss_bytes()}
    seconds = step_seconds(Bundle.open(bundle), steps)
    return {**built, "step_seconds": round(seconds, 3), "step_peak_rss_bytes": peak_rss_bytes()}


def step_seconds(bundle: Bundle, steps: int) -> float:
    """Return the median seconds of one call of the denoiser at the checkpoint's own size."""
    name = bundle.manifest.denoiser
    opened = open_engines(bundle, "cpu", components=(name,), check="size")
    denoiser = opened.engines[name]
    width, height = (side // bundle.manifest.latents.factor for side in bundle.manifest.default_size)
    generator = np.random.default_rng(0)
    axes = {"batch": 1, "steps": 1, "tokens": tokens_of(bundle), "latent_height": height, "latent_width": width}
    inputs = {}
    for spec in denoiser.spec.inputs:
        shape = [axis if isinstance(axis, int) else axes[axis] for axis in spec.shape]
        inputs[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        denoiser(inputs)
        seconds.append(time.perf_counter() - start)
    opened.close()
    return statistics.median(seconds[1:])  # the first call prepares


def tokens_of(bundle: Bundle) -> int:
    """Return how many tokens a denoiser attends to for a prompt of one chunk."""
    manifest = bundle.manifest
    return TOKENS + sum(text.tokens or 0 for text in manifest.denoisers[manifest.denoiser].text_encoders)


if __name__ == "__main__":
    main()
