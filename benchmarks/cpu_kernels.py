"""What each edit of a graph gives on this CPU: a pass of the UNet and of the VAE's decoder with and without it.

    python benchmarks/cpu_kernels.py BUNDLE [--side 32] [--rows 2] [--rounds 20] [--seconds 60] [--output FILE]

The graphs take turns in random order; a ratio is the median over the rounds of each round's own ratio to the graph
without edits, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from paired import paired_ratio

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.cpu_rewrites import split_upsampling, use_host_kernels
from latentrt.engines.graphs.winograd import use_winograd
from latentrt.engines.spec import Array
from latentrt.export.work.finished import peak_rss_bytes
from latentrt.runtime.bench.machine import Watch, describe, now
from latentrt.runtime.bench.rounds import take_turns

Edit = Callable[[Any, Path], int]
EDITS: Mapping[str, tuple[Edit, ...]] = {
    "as exported": (),
    "host kernels": (lambda model, _: use_host_kernels(model),),
    "host kernels, split upsampling": (lambda model, _: use_host_kernels(model), split_upsampling),
    "host kernels, split upsampling, Winograd": (
        lambda model, _: use_host_kernels(model),
        split_upsampling,
        use_winograd,
    ),
}


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--components", default="unet,vae_decoder")
    parser.add_argument("--way", choices=list(EDITS), help="This one alone, for the memory that it takes.")
    arguments = parser.parse_args()
    watch, bundle = Watch(), Bundle.open(arguments.bundle)
    ways = {arguments.way: EDITS[arguments.way]} if arguments.way else EDITS
    found = {name: compare(bundle, name, ways, arguments) for name in arguments.components.split(",")}
    document = {
        "kind": "latentrt cpu kernels",
        "created": now(),
        "command": "python benchmarks/cpu_kernels.py " + " ".join(sys.argv[1:]),
        "machine": describe(),
        "conditions": msgspec.to_builtins(watch.conditions()),
        "components": found,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    for name, figures in found.items():
        print_ways(name, figures)
    print(f"peak memory of the process: {document['peak_rss_bytes'] / 2**20:.0f} MiB")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the options of a comparison of graphs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--side", type=int, default=32, help="Of the latents.")
    parser.add_argument("--rows", type=int, default=2, help="Model rows: 2 for a picture with guidance.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="For each component.")
    parser.add_argument("--one-thread", action="store_true", help="Count its own time alone, whatever else is running.")
    parser.add_argument("--output", type=Path, default=None)
    return parser


def print_ways(name: str, ways: Mapping[str, Any]) -> None:
    """Print what `compare` returned."""
    for way, figures in ways.items():
        low, high = (figures["ratio"][end] for end in ("low", "high"))
        between = "" if low is None else f" ({low:.3f} to {high:.3f})"
        ratio, seconds = figures["ratio"]["estimate"], figures["median_s"]
        print(f"{name:12} {way:32} {1000 * seconds:9.2f} ms  {ratio:.3f}{between}")


def rows_of(bundle: Bundle, component: str, rows: int) -> int:
    """Return how many pictures a component takes where the denoiser takes so many rows."""
    return rows if bundle.manifest.components[component].role == "denoiser" else 1


def compare(bundle: Bundle, component: str, ways: Mapping[str, tuple[Edit, ...]], arguments: Any) -> dict[str, Any]:
    """Return each way's seconds, and its ratio to the first.

    arguments: side, rows, rounds, seconds and one_thread, as on the command line
    """
    path = bundle.path(bundle.manifest.components[component].graph)
    rows = rows_of(bundle, component, arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(arguments.one_thread)
        clock = time.thread_time if arguments.one_thread else time.perf_counter
        passes = {
            way: make_pass(path, edits, Path(folder) / way, arguments.side, rows, options)
            for way, edits in ways.items()
        }
        for run in passes.values():
            run()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        turns = take_turns(list(ways), rounds=arguments.rounds, most_seconds=arguments.seconds, seed=0)
        for _, way in turns:
            start = clock()
            passes[way]()
            seconds[way].append(clock() - start)
    whole = min(map(len, seconds.values()))
    first = next(iter(ways))
    return {
        way: {
            "median_s": float(np.median(some)),
            "ratio": msgspec.to_builtins(paired_ratio(seconds[first][:whole], some[:whole])),
            "samples": some,
        }
        for way, some in seconds.items()
    }


def make_pass(
    path: Path, edits: tuple[Edit, ...], folder: Path, side: int, rows: int, options: onnxruntime.SessionOptions
) -> Callable[[], Any]:
    """Edit the graph, open it as an engine is built, and return what runs it once on random numbers."""
    session = open_edited(path, edits, folder, options)
    inputs = random_inputs(session, side=side, rows=rows)
    return lambda: session.run(None, inputs)


def open_edited(
    path: Path, edits: tuple[Edit, ...], folder: Path, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """Edit a graph in a new folder and open it."""
    folder.mkdir()
    model = graphs.load_graph(path)
    for edit in edits:
        edit(model, path)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    for data in path.parent.glob("*data"):
        graphs.link_data(data, folder)
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def random_inputs(session: onnxruntime.InferenceSession, *, side: int, rows: int) -> dict[str, Array]:
    """Return random numbers for each input. side: of the latents; rows: pictures, or twice as many with guidance"""
    generator, sizes = np.random.default_rng(0), {"latent_height": side, "latent_width": side, "tokens": 77}
    return {
        taken.name: generator.standard_normal(
            [axis if isinstance(axis, int) else sizes.get(axis, rows) for axis in taken.shape], dtype=np.float32
        )
        for taken in session.get_inputs()
    }


if __name__ == "__main__":
    main()
