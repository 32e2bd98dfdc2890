"""How time and memory grow: with the picture's size, the batch, the steps, the threads and LoRAs; and with the model.

    python benchmarks/scaling.py BUNDLE [--sizes 256,384,512,768,1024] [--batches 1,2,4,8] [--steps 1,5,10,20,40]
        [--threads 1,2] [--loras 0,1,2,4,8] [--seconds 60] [--models tiny,demo,middle]
        [--output benchmarks/results/scaling.json]

Every curve is one run of the harness of `latentrt bench`: its points take turns in random order. --models exports
each (random_checkpoint.py's shapes, and the demo) and records seconds and peak memory against parameters, then load
times against bytes. --loras draws with so many random LoRAs at once, of rank 16 on every linear layer of the UNet's
attention, and records what the change of weights takes, a step after it, and the memory that is in use then.
`python benchmarks/plots.py` draws the result.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.weight_map import GraphWeights, read_weights
from latentrt.engines.progress import Report, terminal_report
from latentrt.runtime.bench.cold import measured
from latentrt.runtime.bench.machine import Watch, describe, now
from latentrt.runtime.bench.measure import Asked, run_bench
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Lora

LOADS = 5
FP32_BYTES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--sizes", type=_numbers, default=None, help="Sides in pixels. Default: 1/2 to 2 of its own.")
    parser.add_argument("--batches", type=_numbers, default=(1, 2, 4, 8))
    parser.add_argument("--steps", type=_numbers, default=(1, 5, 10, 20, 40))
    parser.add_argument("--threads", type=_numbers, default=tuple(range(1, len(os.sched_getaffinity(0)) + 1)))
    parser.add_argument("--loras", type=_numbers, default=(0, 1, 2, 4, 8), help="How many at once.")
    parser.add_argument("--seconds", type=float, default=60.0, help="For each curve.")
    parser.add_argument("--models", default="tiny,demo,middle", help="To export; empty for none.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling.json"))
    arguments = parser.parse_args()
    watch = Watch()
    with terminal_report() as report, tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(arguments.bundle, asked, report) for name, asked in curves_asked(arguments).items()}
        loras = lora_curve(arguments.bundle, arguments.loras, Path(folder), seconds=arguments.seconds)
        models = [one for one in arguments.models.split(",") if one]
        exports = {model: export(model, Path(folder), report) for model in models}
    document = {
        "kind": "latentrt scaling",
        "created": now(),
        "command": "python benchmarks/scaling.py",
        "machine": describe(),
        "conditions": msgspec.to_builtins(watch.conditions()),
        "bundle": Path(arguments.bundle).resolve().name,
        "curves": curves,
        "loras": loras,
        "exports": exports,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(format_lines(document))
    print(arguments.output)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def curves_asked(arguments: argparse.Namespace) -> dict[str, Asked]:
    """Say what each curve measures: one number grows, all else stays."""
    side, _ = Bundle.open(arguments.bundle).manifest.default_size
    sides = arguments.sizes or (side // 2, 3 * side // 4, side, 3 * side // 2, 2 * side)
    base = Asked(steps=(4,), samplers=("euler",), guidances=(5.0,), seconds=arguments.seconds, cold=0, golden=False)
    return {
        "size": msgspec.structs.replace(base, sizes=tuple((one, one) for one in sides)),
        "batch": msgspec.structs.replace(base, batches=arguments.batches),
        "steps": msgspec.structs.replace(base, steps=arguments.steps),
        "threads": msgspec.structs.replace(base, threads=arguments.threads),
    }


def curve(bundle: str, asked: Asked, report: Report) -> list[dict[str, Any]]:
    """Measure one curve. Returns a point for each variant: its settings, and the summaries of the whole and a step."""
    return [
        {
            "settings": msgspec.to_builtins(variant.settings),
            "end_to_end": msgspec.to_builtins(variant.seconds["end_to_end"].summary),
            "step": msgspec.to_builtins(variant.seconds["step"].summary),
            "decode": msgspec.to_builtins(variant.seconds["decode"].summary),
        }
        for variant in run_bench(bundle, asked, progress=report).variants
    ]


def lora_curve(bundle: str, counts: tuple[int, ...], folder: Path, *, seconds: float) -> list[dict[str, Any]]:
    """Switch between numbers of LoRAs in turns. Returns a point for each: the switch, a step after it, and memory."""
    files = [save_lora(bundle, folder / f"lora{number}.safetensors", seed=number) for number in range(max(counts))]
    figures: dict[int, dict[str, list[float]]] = {count: {"adapt": [], "step": [], "anonymous": []} for count in counts}
    end, turn = time.monotonic() + seconds, 0
    with Pipeline.load(bundle, "cpu") as pipe:
        pipe.warm_up()
        while turn < 2 or time.monotonic() < end:  # the first turn warms up
            for count in counts:
                # another scale each turn: no session is kept from the one before
                loras = [Lora(file=file, scale=0.1 + turn / 100) for file in files[:count]]
                result = pipe("a circle", steps=4, sampler="euler", guidance=5.0, seed=turn, loras=loras)
                if turn:
                    point = figures[count]
                    point["adapt"].append(result.seconds["adapt"])
                    point["step"].extend(result.step_seconds)
                    point["anonymous"].append(anonymous_bytes())
            turn += 1
    return [
        {"count": count, **{name: msgspec.to_builtins(measured(some).summary) for name, some in point.items()}}
        for count, point in figures.items()
    ]


def save_lora(bundle: str, path: Path, *, seed: int, rank: int = 16) -> Path:
    """Write a LoRA with random factors for the linear layers of the attention of a bundle's UNet."""
    from safetensors.numpy import save_file

    opened = Bundle.open(bundle)
    record = opened.manifest.components["unet"].weights
    assert record is not None, "export the bundle again"
    generator, tensors = np.random.default_rng(seed), {}
    for name, weight in read_weights(opened.path(record), GraphWeights).weights.items():
        if ".attn" in name and len(weight.shape) == 2:  # its biases are no products
            module, (outputs, inputs) = name.removesuffix(".weight"), weight.shape
            tensors[f"unet.{module}.lora_A.weight"] = generator.normal(0, 0.02, (rank, inputs)).astype(np.float32)
            tensors[f"unet.{module}.lora_B.weight"] = generator.normal(0, 0.02, (outputs, rank)).astype(np.float32)
    save_file(tensors, path)
    return path


def anonymous_bytes() -> float:
    """Return this process's memory that no file stands behind: what is mapped from the bundle is not counted."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Anonymous:"))
    return 1024.0 * int(line.split()[1])


def export(model: str, folder: Path, report: Report) -> dict[str, Any]:
    """Export a model in fp32 and load it. Returns seconds and memory of each component, and the load's seconds."""
    from random_checkpoint import save_random

    from latentrt.export.cli import summarise
    from latentrt.export.export import export_checkpoint

    checkpoint = model if model == "demo" else str(save_random(model, folder / f"{model}-checkpoint"))
    done = export_checkpoint(checkpoint, folder / model, precision="fp32", report=report)
    bundle = Bundle.open(folder / model)
    components = {
        name: {
            "parameters": row["weights_bytes"] // FP32_BYTES,
            **{key: row[key] for key in ("seconds", "peak_rss_bytes")},
        }
        for name, row in summarise(done, folder / model)["components"].items()
    }
    whole = sum(file.bytes for file in bundle.manifest.files.values())
    return {"components": components, "bytes": whole, "load_s": load_seconds(folder / model)}


def load_seconds(bundle: Path) -> dict[str, Any]:
    """Load a bundle several times, checking hashes and checking sizes alone, in turns."""
    seconds: dict[str, list[float]] = {"hash": [], "size": []}
    for _ in range(LOADS + 1):
        for check in ("hash", "size"):
            with Pipeline.load(bundle, "cpu", check=check) as pipe:  # type: ignore[arg-type]
                seconds[check].append(pipe.load_s)
    return {check: msgspec.to_builtins(measured(some[1:]).summary) for check, some in seconds.items()}


def format_lines(document: Mapping[str, Any]) -> str:
    """Return a line for each point."""
    lines = []
    for name, points in document["curves"].items():
        for point in points:
            settings, whole, step = point["settings"], point["end_to_end"]["p50"], point["step"]["p50"]
            value = f"{settings['width']}x{settings['height']}" if name == "size" else settings[name]
            lines.append(f"{name:<8} {value!s:>9}  {1e3 * whole:9.1f} ms end to end  {1e3 * step:8.2f} ms a stage")
    for point in document["loras"]:
        adapt, step, used = (point[name]["p50"] for name in ("adapt", "step", "anonymous"))
        words = f"{1e3 * adapt:9.1f} ms to switch     {1e3 * step:8.2f} ms a stage  {used / 2**20:8.0f} MiB anonymous"
        lines.append(f"loras    {point['count']!s:>9}  {words}")
    for model, one in document["exports"].items():
        for name, component in one["components"].items():
            peak = component["peak_rss_bytes"] / 2**20
            words = f"{component['parameters'] / 1e6:8.2f} M  {component['seconds']:7.1f} s  {peak:7.0f} MiB at most"
            lines.append(f"export   {model} {name:<13} {words}")
        lines.append(f"load     {model} {one['bytes'] / 1e6:.1f} MB in {1e3 * one['load_s']['hash']['p50']:.1f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
