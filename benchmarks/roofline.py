"""What a GPU must do for a step of SD 1.5, SDXL and SD 3.5 medium at their full sizes, and what was measured of it.

    python benchmarks/roofline.py [sd15,sdxl,sd35-medium] [--denoisers] [--json benchmarks/results/roofline.json]
    python benchmarks/roofline.py --tables docs/roofline.md     # writes the tables of a result into the page

Graphs follow from shapes alone: each network is traced as an export traces it, from a checkpoint whose weights are
zeros that take no room. What was measured are the kernels of two denoisers on an H200 (results/gpu-h200-4.json).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.build_options import Profile
from latentrt.engines.graphs.roofline import AXES, CEILINGS, GUIDED, find_shapes, roofline_of
from latentrt.runtime.bench.machine import describe, now

RESULTS = Path(__file__).parent / "results"
# (side of the picture in pixels, tokens of the text, tokens of T5) of each shape of random_checkpoint.py.
PICTURES = {"sd15": (512, 77, None), "sdxl": (1024, 77, None), "sd35-medium": (1024, 77 + 256, 256)}
TITLES = {"sd15": "SD 1.5, 512x512", "sdxl": "SDXL, 1024x1024", "sd35-medium": "SD 3.5 medium, 1024x1024"}
DENOISERS = ("unet", "transformer")
MEASURED = {"sd15": "sd15", "sd35-medium": "sd35"}  # shapes, and their names in the GPU suite
TEXT = "encoder_hidden_states"
KINDS = {"fp16": False, "8 bits": True}
SHOWN = 8  # operators of a denoiser
# What kernels do, by their names, and the operators whose work it is.
KERNELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "convolutions": (r"fprop_implicit_gemm|convolve|Conv", ("Conv",)),
    "attention": (r"sdpa|flash|fmha", ("Attention",)),
    "matrix products": (r"nvjet|gemm|cutlass", ("MatMul", "Gemm")),
    "layer norms": (r"LayerNorm", ("LayerNormalization", "RMSNormalization")),
    "group norms": (r"GroupNorm", ("GroupNormalization",)),
}
REST = "all else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="?", default=",".join(PICTURES))
    parser.add_argument("--json", type=Path, default=RESULTS / "roofline.json")
    parser.add_argument("--denoisers", action="store_true", help="The denoisers alone.")
    parser.add_argument("--tables", type=Path, help="Write the tables of the result into this page; trace nothing.")
    arguments = parser.parse_args()
    if arguments.tables:
        found = json.loads(arguments.json.read_text())
        arguments.tables.write_text(with_tables(arguments.tables.read_text(), found))
        return
    found = {"created": now(), "command": sys.argv[1:], "machine": describe(), "models": {}}
    for shape in arguments.shapes.split(","):
        networks = found["models"].setdefault(shape, {})
        with tempfile.TemporaryDirectory() as folder:
            for name, one in graphs(shape, Path(folder), denoisers=arguments.denoisers):
                networks[name] = passes(*one)
                arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    print("\n\n".join(tables(found).values()))


def graphs(shape: str, folder: Path, *, denoisers: bool) -> Iterator[tuple[str, tuple[Any, Path, dict[str, int]]]]:
    """Trace a shape's networks. Yields each with its graph, where integers of that lie, and the sizes of its axes."""
    from random_checkpoint import save_random

    from latentrt.export.checkpoint import open_checkpoint
    from latentrt.export.export import _job, _networks, _row, _tokenizers, _with_tokens
    from latentrt.export.networks.components import COMPONENTS
    from latentrt.export.options import CheckpointOptions

    saved = save_random(shape, folder / "checkpoint", half=True, hollow=True)
    opened = open_checkpoint(str(saved), options=CheckpointOptions())
    checkpoint = _with_tokens(opened, _tokenizers(opened))
    side, tokens, fixed = PICTURES[shape]
    for name in (name for name in _networks(checkpoint) if name in DENOISERS or not denoisers):
        rows = 2 if COMPONENTS[_row(checkpoint, name)].role in GUIDED else 1
        profile = Profile(width=side, height=side, pictures=1, rows=rows, tokens=tokens, fixed_tokens=fixed)
        sizes = {**profile.axes(checkpoint.latents.factor), "batch": rows, "steps": 1}
        print(f"{shape}: {name}", file=sys.stderr, flush=True)
        yield name, (trace(_job(checkpoint, name, folder / "bundle", "fp16")), folder, sizes)


def trace(job: Any) -> Any:
    """Return the graph of a network, a ModelProto without its weights, as its export traces it or has kept it."""
    import onnx
    from onnx import helper, numpy_helper

    from latentrt.export.graphs import golden, kept_traces
    from latentrt.export.networks.components import COMPONENTS
    from latentrt.export.networks.streamed_weights import StoredWeights
    from latentrt.export.work import jobs

    inputs = golden.make_inputs(
        COMPONENTS[job.row],
        job.dimensions,
        jobs.CASES[0],
        precision=job.precision,
        scaling_factor=job.scaling_factor,
        texts=job.texts,
        shift=job.shift,
    )
    golden.save_golden(jobs._pairs(job)[0], inputs, {})
    with jobs._loaded(job) as (module, config):
        graph, places, _ = jobs._graph(job, module, config, StoredWeights(module))
    model = onnx.ModelProto.FromString(kept_traces.pack(graph, places))
    for tensor in model.graph.initializer:
        if tensor.name in places and math.prod(tensor.dims) <= AXES:  # a shape might follow from it
            zeros = np.zeros(tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
    return model


def passes(model: Any, folder: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return a network's rooflines, by GPU and by how layers compute, and what the text's keys and values take."""
    found = {
        gpu: {
            kind: msgspec.to_builtins(roofline_of(model, folder, sizes, ceilings, eight_bit=eight_bit))
            for kind, eight_bit in KINDS.items()
        }
        for gpu, ceilings in CEILINGS.items()
    }
    return {**found, "text_seconds": text_seconds(model, folder, sizes)}


def text_seconds(model: Any, folder: Path, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return what products of the text alone take: those that could be computed once a picture, in fp16."""
    import onnx

    known, kept = {TEXT}, onnx.ModelProto()
    kept.CopyFrom(model)
    del kept.graph.node[:]
    names = {each.name for each in model.graph.initializer}
    for node in model.graph.node:
        taken = [name for name in node.input if name and name not in names]
        if taken and set(taken) <= known:
            known |= set(node.output)
            kept.graph.node.append(node)
    if not kept.graph.node:
        return dict.fromkeys(CEILINGS, 0.0)
    assert find_shapes(kept, folder, sizes)
    return {gpu: roofline_of(kept, folder, sizes, ceilings).fused_s for gpu, ceilings in CEILINGS.items()}


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's tables by name."""
    every = {"passes": table(pass_rows(found["models"])), "text": table(text_rows(found["models"]))}
    parts = json.loads((RESULTS / "gpu-h200-4.json").read_text())["parts"]
    for shape, networks in found["models"].items():
        network = next(networks[name] for name in DENOISERS if name in networks)
        if shape in MEASURED:
            kernels = parts[f"{MEASURED[shape]}: kernels cuda"]["figures"]
            every[f"{shape} measured"] = table(measured_rows(network["h200"]["fp16"], kernels))
        every[shape] = table(operator_rows(network))
    return every


def table(rows: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * (head.count('|') - 1)}", *rest])


def pass_rows(models: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        ["model", "network", "GFLOP", "MB", *(f"{gpu}, {kind}" for gpu in CEILINGS for kind in ("in turn", *KINDS))]
    ]
    for shape, networks in models.items():
        for name, one in networks.items():
            half = one["h200"]["fp16"]
            work, moved = (sum(cost[what] for cost in half["costs"]) / 1e9 for what in ("operations", "bytes"))
            times = [
                ms(seconds)
                for gpu in CEILINGS
                for seconds in (one[gpu]["fp16"]["seconds"], *(one[gpu][kind]["fused_s"] for kind in KINDS))
            ]
            rows.append([TITLES[shape], name, f"{work:,.0f}", f"{1e3 * moved:,.0f}", *times])
    return rows


def text_rows(models: Mapping[str, Any]) -> list[list[str]]:
    rows = [["model", *(f"{gpu}: ms | part of a step" for gpu in CEILINGS)]]
    for shape, networks in models.items():
        one = next(networks[name] for name in DENOISERS if name in networks)
        taken = [(one["text_seconds"][gpu], one[gpu]["fp16"]["fused_s"]) for gpu in CEILINGS]
        rows.append([TITLES[shape], *(f"{ms(own)} | {own / whole:.1%}" for own, whole in taken)])
    return rows


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def operator_rows(network: Mapping[str, Any]) -> list[list[str]]:
    """Return a denoiser's operators on an H200, those first that take longest."""
    rows = [["operator", "nodes", "GFLOP", "MB", "ms", "ms, 8 bits", "bound by", "fused"]]
    ceilings, small = CEILINGS["h200"], {cost["operator"]: cost for cost in network["h200"]["8 bits"]["costs"]}
    for cost in network["h200"]["fp16"]["costs"][:SHOWN]:
        computed = cost["operations"] / ceilings.operations_per_s > cost["bytes"] / ceilings.bytes_per_s
        rows.append(
            [
                cost["operator"],
                str(cost["nodes"]),
                f"{cost['operations'] / 1e9:,.0f}",
                f"{cost['bytes'] / 1e6:,.0f}",
                ms(cost["seconds"]),
                ms(small[cost["operator"]]["seconds"]),
                "arithmetic" if computed else "memory",
                "yes" if cost["fused"] else "no",
            ]
        )
    return rows


def measured_rows(pass_: Mapping[str, Any], part: Mapping[str, Any]) -> list[list[str]]:
    """Return what a denoiser's kernels took, and what they had to at the least, by what they do.

    pass_: its roofline on that GPU; part: what the GPU suite found, its figures of kernels
    """
    costs = {cost["operator"]: cost for cost in pass_["costs"]}
    left, rows = (
        list(part["kernels"]),
        [["what", "kernels", "measured, ms a step", "at the least, ms", "of the roofline"]],
    )
    for what, (pattern, operators) in KERNELS.items():
        own = [kernel for kernel in left if re.search(pattern, kernel["kernel"])]
        left = [kernel for kernel in left if kernel not in own]
        least = sum(costs[name]["seconds"] for name in operators if name in costs)
        rows.append(measured_row(what, own, least, part["steps"]))
    named = sum(kernel["ms"] for kernel in part["kernels"])
    rows.append(measured_row(REST, left, None, part["steps"]))
    rows.append(["shorter kernels, not listed", "", f"{(part['kernels_ms'] - named) / part['steps']:.2f}", "", ""])
    least = pass_["fused_s"]
    taken = part["kernels_ms"] / part["steps"]
    rows.append(
        [
            "a step",
            str(part["launches"] // part["steps"]),
            f"{taken:.2f}",
            f"{1e3 * least:.2f}",
            f"{1e3 * least / taken:.0%}",
        ]
    )
    return rows


def measured_row(what: str, kernels: list[Mapping[str, Any]], least: float | None, steps: int) -> list[str]:
    taken, count = (sum(kernel[key] for kernel in kernels) / steps for key in ("ms", "count"))
    share = "" if least is None or not taken else f"{1e3 * least / taken:.0%}"
    return [what, f"{count:.0f}", f"{taken:.2f}", "" if least is None else f"{1e3 * least:.2f}", share]


def missed(model: str, bytes_per_s: float, part: Mapping[str, Any]) -> str | None:
    """Return the table of what a model's kernels took beside what they had to; None of a model without a roofline.

    bytes_per_s: what the GPU was measured to copy: of those that are known the nearest one's roofline is taken
    """
    networks = json.loads((RESULTS / "roofline.json").read_text())["models"].get(model)
    if networks is None:
        return None
    gpu = min(CEILINGS, key=lambda name: abs(CEILINGS[name].bytes_per_s - bytes_per_s))
    denoiser = next(networks[name] for name in DENOISERS if name in networks)
    rows = measured_rows(denoiser[gpu]["fp16"], part)
    return table([[f"{model} on {gpu}: {rows[0][0]}", *rows[0][1:]], *rows[1:]])


def with_tables(page: str, found: Mapping[str, Any]) -> str:
    """Return a page with each table between its marks."""
    from page_tables import place  # which the GPU suite does without

    for name, text in tables(found).items():
        page = place(page, name, text)
    return page


if __name__ == "__main__":
    main()
