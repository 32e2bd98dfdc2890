"""Seconds for one denoising step, against peers on the same weights, in one run, as ratios.

    python benchmarks/steps.py CHECKPOINT [--size 256x256] [--threads 2] [--rounds 15]

The candidates take turns, so that a drift of the machine hits all alike; the figure is the median over the rounds
of each round's own ratio. Every candidate runs the same picture: guidance on, so two rows a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.engines.bundle import Bundle
from latentrt.engines.progress import silent
from latentrt.export.exporting import export_checkpoint
from latentrt.runtime.bench.machine import describe
from latentrt.runtime.pipeline import Pipeline

STEPS = 8  # the first is left out everywhere: it follows other work and fills caches
PROMPT = "a large red circle on a striped blue background"
Draw = Callable[[], list[float]]  # seconds of each step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--name", default=None, help="How the result is called.")
    parser.add_argument("--size", default=None, help="256x256; default: the checkpoint's own.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    size = tuple(map(int, arguments.size.split("x"))) if arguments.size else None
    name = arguments.name or Path(arguments.checkpoint).name
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_checkpoint(arguments.checkpoint, bundle, precision="fp32", report=silent)
        candidates = {
            "latentrt": latentrt_candidate(bundle, size, arguments.threads),
            "onnxruntime, plain loop": plain_candidate(bundle, size, arguments.threads),
            "diffusers eager": diffusers_candidate(arguments.checkpoint, size, arguments.threads),
        }
        seconds = measure(candidates, arguments.rounds)
    report(name, seconds, arguments)


def latentrt_candidate(bundle: Path, size: Any, threads: int) -> Draw:
    pipe = Pipeline.load(bundle, "cpu", threads=threads)

    def draw() -> list[float]:
        return list(pipe(PROMPT, steps=STEPS, sampler="euler", guidance=5.0, seed=1, size=size).step_seconds)

    return draw


def plain_candidate(bundle: Path, size: Any, threads: int) -> Draw:
    """A loop around the canonical graph as a tutorial writes it: a session, `run`, Euler in NumPy."""
    import onnxruntime

    opened = Bundle.open(bundle)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(opened.path(opened.manifest.components["unet"].graph)), options, providers=["CPUExecutionProvider"]
    )
    (width, height), space = size or opened.manifest.default_size, opened.manifest.latents
    text_axes = next(i for i in opened.manifest.components["unet"].inputs if i.name == "encoder_hidden_states").shape
    text = np.random.default_rng(0).standard_normal((2, 77, int(text_axes[2])), dtype=np.float32)
    shape = (1, space.channels, height // space.factor, width // space.factor)

    def draw() -> list[float]:
        x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32) * 14.6
        sigmas = np.append(np.geomspace(14.6, 0.03, STEPS), 0.0).astype(np.float32)
        marks = [time.perf_counter()]
        for sigma, following, t in zip(sigmas[:-1], sigmas[1:], np.linspace(999.0, 1.0, STEPS), strict=True):
            rows = np.concatenate([x, x]) / np.sqrt(sigma**2 + 1)
            feed = {"sample": rows, "timestep": np.full(2, t, np.float32), "encoder_hidden_states": text}
            without, guided = session.run(None, feed)[0]
            x = x + (following - sigma) * (without + 5.0 * (guided - without))
            marks.append(time.perf_counter())
        return np.diff(marks).tolist()

    return draw


def diffusers_candidate(checkpoint: str, size: Any, threads: int) -> Draw:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    from latentrt.export.checkpoint import DEMO

    torch.set_num_threads(threads)
    path = DEMO if checkpoint == "demo" else checkpoint
    pipe = StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    width, height = size or (None, None)

    def draw() -> list[float]:
        marks = [time.perf_counter()]

        def mark(*_: Any) -> dict[str, Any]:
            marks.append(time.perf_counter())
            return {}

        pipe(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            callback_on_step_end=mark,
        )
        return np.diff(marks).tolist()

    return draw


def measure(candidates: dict[str, Draw], rounds: int) -> dict[str, list[float]]:
    """Return the median seconds of a step for each candidate and round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = np.random.default_rng(0)
    for round_ in range(rounds + 1):
        for name in order.permutation(list(candidates)):
            taken = candidates[name]()[1:]
            if round_:
                seconds[name].append(statistics.median(taken))
    return seconds


def report(name: str, seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    ours = seconds["latentrt"]
    print(f"{name}, {arguments.threads} threads, {arguments.rounds} rounds, {STEPS} steps each")
    print(f"{'':<26}{'ms a step':>10}{'spread':>16}{'times latentrt':>16}")
    rows = {}
    for candidate, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(theirs / mine for theirs, mine in zip(values, ours, strict=True))
        rows[candidate] = {"median_s": statistics.median(values), "quartiles_s": [low, high], "ratio": ratio}
        spread = f"{1e3 * low:.1f}-{1e3 * high:.1f}"
        print(f"{candidate:<26}{1e3 * statistics.median(values):>10.1f}{spread:>16}{ratio:>16.2f}")
    document = {"machine": describe(), "name": name, "threads": arguments.threads, "candidates": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"steps-{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
