"""What int8 would give on this CPU: a pass of the UNet with convolutions and linear layers in 8 bits, and its pictures.

    python benchmarks/cpu_int8.py BUNDLE [--side 32] [--one-thread] [--prompts 4] [--steps 20] [--output FILE]

Linear layers become DynamicQuantizeMatMul. Convolutions take and give 8 bits: their ranges, outputs included, are
those of two prompts that are drawn first. All graphs are edited for this CPU, as engines are built, and take turns; a
ratio is to the product's own graph. Decibels are those of pictures against float32's.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir
from cpu_kernels import Edit, compare, make_parser, print_ways

from latentrt.engines.bundle.files import Bundle, record_file, write_manifest
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.cpu_rewrites import split_upsampling, use_host_kernels
from latentrt.engines.graphs.locate_weights import GraphValues
from latentrt.export.graphs.ranges import MEASURED, tell_largest
from latentrt.export.graphs.run import run_in_pieces
from latentrt.export.graphs.types import load_typed
from latentrt.export.quantisation.levels import BLOCKS, LEFT_OUT
from latentrt.export.quantisation.prompts import trial_of
from latentrt.export.quantisation.quantise import decibels
from latentrt.runtime.bench.machine import Watch, describe, now
from latentrt.runtime.verify.recorded import draw_recorded

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

SHOWN = 2  # prompts whose stages the ranges come from
ZERO = 128  # of unsigned numbers, which the kernels prefer


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--prompts", type=int, default=4, help="Pictures to compare; 0 for none.")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    watch, bundle = Watch(), Bundle.open(arguments.bundle)
    ranges = ranges_of(bundle)
    ways = ways_of(ranges)
    found = compare(bundle, "unet", ways, arguments)
    print_ways("unet", found)
    pictures = lost(bundle, ways, count=arguments.prompts, steps=arguments.steps) if arguments.prompts else {}
    for name, some in pictures.items():
        print(f"{name:40} {some['median']:.1f} dB")
    document = {
        "kind": "latentrt cpu int8",
        "created": now(),
        "command": "python benchmarks/cpu_int8.py " + " ".join(sys.argv[1:]),
        "machine": describe(),
        "conditions": msgspec.to_builtins(watch.conditions()),
        "bundle": arguments.bundle.resolve().name,
        "ways": found,
        "decibels": pictures,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def ways_of(ranges: Mapping[str, float]) -> dict[str, tuple[Edit, ...]]:
    """Return how graphs are edited, the product's way first."""
    own: tuple[Edit, ...] = (lambda model, _: use_host_kernels(model), split_upsampling)
    convolve = partial(quantise_convolutions, ranges=ranges)
    return {
        "float32": own,
        "linear layers": (quantise_products, *own),
        "convolutions": (convolve, *own),
        "linear layers and convolutions": (quantise_products, convolve, *own),
    }


def chosen(model: ModelProto, operator: str) -> list[NodeProto]:
    """Return the nodes of the denoiser's blocks whose weights are known, without those that are never in 8 bits."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type == operator
        and (path := node.name.partition("/")[0].split("."))[0] in BLOCKS
        and not LEFT_OUT & set(path)
        and node.input[1] in weights
    ]


def ranges_of(bundle: Bundle) -> dict[str, float]:
    """Return the largest magnitude of what each of these convolutions takes and gives, when prompts are drawn."""
    trial = trial_of(bundle.manifest.provenance.checkpoint)
    prompts = dict(enumerate(trial.prompts[:SHOWN]))
    _, met = draw_recorded(bundle, prompts, steps=trial.steps, guidance=trial.guidance)
    path = bundle.path(bundle.manifest.components["unet"].graph)
    names = {name for node in chosen(graphs.load_graph(path), "Conv") for name in (node.input[0], node.output[0])}
    model = load_typed(path)
    tell_largest(model, [value for node in model.graph for value in node.outputs if value.name in names])
    found = dict.fromkeys(names, 0.0)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        recording = Path(folder) / "model.onnx"
        ir.save(model, recording, external_data="weights.data")
        for stages in met["unet"]:
            for outputs in run_in_pieces(recording, [inputs for inputs, *_ in stages]):
                for name in names:
                    found[name] = max(found[name], float(outputs[f"{MEASURED}{name}"]))
    return found


def quantise_products(model: ModelProto, path: Path) -> int:
    """Make linear layers DynamicQuantizeMatMul, with a scale for each column. Returns how many there are."""
    from onnx import helper

    nodes = {node.output[0]: node for node in chosen(model, "MatMul")}
    for node in nodes.values():
        scale, numbers = eight(model, node.input[1], path, axis=1)
        inputs = [node.input[0], add(model, f"{node.name}.int8", numbers), add(model, f"{node.name}.scale", scale)]
        made = helper.make_node(
            "DynamicQuantizeMatMul", inputs, list(node.output), name=node.name, domain="com.microsoft"
        )
        node.CopyFrom(made)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(nodes)


def quantise_convolutions(model: ModelProto, path: Path, *, ranges: Mapping[str, float]) -> int:
    """Put Q and DQ around convolutions, what they give included: ONNX Runtime makes one kernel of each."""
    from onnx import helper

    nodes: list[NodeProto] = []
    some = {node.name: node for node in chosen(model, "Conv")}
    zero = add(model, "int8.zero", np.array(ZERO, np.uint8))
    for node in model.graph.node:
        if node.name not in some:
            nodes.append(node)
            continue
        taken, given, weight = node.input[0], node.output[0], node.input[1]
        scale, numbers = eight(model, weight, path, axis=0)
        of_weight = [
            add(model, f"{node.name}.int8", numbers),
            add(model, f"{node.name}.scale", scale),
            add(model, f"{node.name}.zeros", np.zeros(len(scale), np.int8)),
        ]
        before, after = (add(model, f"{node.name}.{n}", of(ranges[name])) for n, name in enumerate((taken, given)))
        names = {n: f"{node.name}.{n}" for n in ("q", "taken", "weight", "given", "given q")}
        nodes += [
            helper.make_node("QuantizeLinear", [taken, before, zero], [names["q"]]),
            helper.make_node("DequantizeLinear", [names["q"], before, zero], [names["taken"]]),
            helper.make_node("DequantizeLinear", of_weight, [names["weight"]], axis=0),
            node,
            helper.make_node("QuantizeLinear", [names["given"], after, zero], [names["given q"]]),
            helper.make_node("DequantizeLinear", [names["given q"], after, zero], [given]),
        ]
        node.input[0], node.input[1], node.output[0] = names["taken"], names["weight"], names["given"]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(some)


def of(largest: float) -> np.ndarray:
    return np.array(max(largest, 1e-6) / (ZERO - 1), np.float32)


def eight(model: ModelProto, name: str, path: Path, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight's scale for each place of an axis, and its numbers in 8 bits."""
    found = GraphValues(model, path).get(name)
    assert found is not None
    array = found.values
    others = tuple(n for n in range(array.ndim) if n != axis)
    scale = np.maximum(np.abs(array).max(axis=others), 1e-8).astype(np.float32) / 127
    wide = scale.reshape([-1 if n == axis else 1 for n in range(array.ndim)])
    return scale, np.clip(np.round(array / wide), -127, 127).astype(np.int8)


def add(model: ModelProto, name: str, array: np.ndarray) -> str:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def lost(bundle: Bundle, ways: Mapping[str, Sequence[Any]], *, count: int, steps: int) -> dict[str, Any]:
    """Return the PSNR of pictures drawn with each way's 8 bits, each number rounded as its kernels round it."""
    trial = trial_of(bundle.manifest.provenance.checkpoint)
    prompts = dict([*enumerate(trial.prompts)][-count:])
    expected, _ = draw_recorded(bundle, prompts, steps=steps, guidance=trial.guidance)
    found = {}
    for name, edits in [*ways.items()][1:]:
        with tempfile.TemporaryDirectory() as folder:
            changed = with_graph(bundle, Path(folder) / "bundle", edits[:-2])  # without what is of this CPU
            pixels, _ = draw_recorded(changed, prompts, steps=steps, guidance=trial.guidance)
        each = decibels(pixels, expected)
        found[name] = {"median": float(np.median(each)), "each": each.tolist()}
    return found


def with_graph(bundle: Bundle, root: Path, edits: Sequence[Edit]) -> Bundle:
    """Return a copy of a bundle with another UNet."""
    shutil.copytree(bundle.root, root, ignore=shutil.ignore_patterns("engines"))
    graph = root / bundle.manifest.components["unet"].graph
    model = graphs.load_graph(graph)
    for edit in edits:
        edit(model, graph)
    graphs.save_graph(model, graph)
    name = graph.relative_to(root).as_posix()
    manifest = msgspec.structs.replace(bundle.manifest, files={**bundle.manifest.files, name: record_file(root, name)})
    write_manifest(root, manifest)
    return Bundle(root=root, manifest=manifest)


if __name__ == "__main__":
    main()
