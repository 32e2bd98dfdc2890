"""Where a pass of the UNet and of the VAE's decoder spends its time on this CPU, and how far that is from its ceiling.

    python benchmarks/cpu_profile.py BUNDLE [--side 32] [--rows 2] [--passes 5] [--output FILE]

Graphs are edited and optimised as engines are built, and run on one thread under ONNX Runtime's profiler. A node's time
is its shortest of all passes: other processes can only add to it, and on a busy machine always do to long ones. The
ceiling is the rate of a product of two matrices of 1024 x 1024 in the same library; of it each convolution's and
product's own rate is a share. Winograd's convolutions are counted as they are computed, with fewer products.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from cpu_kernels import Edit, open_edited, random_inputs, rows_of
from onnx import TensorProto, helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.graphs.cpu_rewrites import split_upsampling, use_host_kernels
from latentrt.engines.graphs.winograd import use_winograd
from latentrt.runtime.bench.machine import Watch, describe, now

PRODUCT = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
OWN: tuple[Edit, ...] = (lambda model, _: use_host_kernels(model), split_upsampling)
EDITS = {"unet": OWN, "vae_decoder": (*OWN, use_winograd)}
SQUARE = 1024  # of the matrices whose product is the ceiling
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--side", type=int, default=32, help="Of the latents.")
    parser.add_argument("--rows", type=int, default=2, help="Model rows: 2 for a picture with guidance.")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--components", default=",".join(EDITS))
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    watch, bundle, ceiling = Watch(), Bundle.open(arguments.bundle), measure_ceiling()
    print(f"ceiling on one thread: {ceiling / 1e9:.1f} GFLOP/s")
    found = {}
    for component in arguments.components.split(","):
        path = bundle.path(bundle.manifest.components[component].graph)
        rows = rows_of(bundle, component, arguments.rows)
        edits = EDITS[component]
        found[component] = profile(path, edits, side=arguments.side, rows=rows, passes=arguments.passes)
        print_profile(component, found[component], ceiling)
    if arguments.output is not None:
        document = {
            "kind": "latentrt cpu profile",
            "created": now(),
            "command": f"python benchmarks/cpu_profile.py {arguments.bundle.name} --side {arguments.side}",
            "machine": describe(),
            "conditions": msgspec.to_builtins(watch.conditions()),
            "ceiling_flops": ceiling,
            "components": {component: summary(nodes) for component, nodes in found.items()},
        }
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def one_thread() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def measure_ceiling(rounds: int = 8) -> float:
    """Return the operations in a second of a product of two large matrices on one thread, the second one a weight."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((SQUARE, SQUARE), dtype=np.float32)
    taken, given = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [SQUARE, SQUARE]) for name in "xy")
    weight = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [taken], [given], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), one_thread(), providers=["CPUExecutionProvider"])
    seconds = []
    for _ in range(rounds):
        start = time.thread_time()
        session.run(None, {"x": weights})
        seconds.append(time.thread_time() - start)
    return float(2 * SQUARE**3 / min(seconds))


def profile(path: Path, edits: tuple[Edit, ...], *, side: int, rows: int, passes: int) -> list[dict[str, Any]]:
    """Return each node's operator, name, seconds, operations and shapes, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        options = one_thread()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = open_edited(path, edits, Path(folder) / "graph", options)
        inputs = random_inputs(session, side=side, rows=rows)
        for _ in range(passes):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name, said = event["name"].removesuffix("_kernel_time"), event["args"]
        shapes = [shape_of(each) for each in said["input_type_shape"]], [shape_of(e) for e in said["output_type_shape"]]
        node = nodes.setdefault(
            name,
            {
                "operator": said["op_name"],
                "name": name,
                "seconds": math.inf,
                "operations": operations(said["op_name"], *shapes),
                "inputs": shapes[0],
                "outputs": shapes[1],
            },
        )
        node["seconds"] = min(node["seconds"], event["dur"] / 1e6)
    return sorted(nodes.values(), key=lambda node: -node["seconds"])


def shape_of(said: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the shape in what the profiler says of a tensor: {"float": [1, 4, 32, 32]}."""
    return next(map(list, said.values()), [])


def operations(operator: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int:
    """Return how often a node multiplies and adds; 0 if it is neither convolution, nor product, nor attention."""
    if operator in ("Conv", "FusedConv"):
        return 2 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if operator in PRODUCT:
        return 2 * math.prod(outputs[0]) * inputs[0][-1]
    if operator == "MultiHeadAttention":
        return 4 * math.prod(inputs[0]) * inputs[1][1]
    return 0


def summary(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each operator's seconds and operations, and the nodes that take longest."""
    operators: dict[str, dict[str, Any]] = {}
    for node in nodes:
        one = operators.setdefault(kind_of(node), {"nodes": 0, "seconds": 0.0, "operations": 0})
        for what, more in (("nodes", 1), ("seconds", node["seconds"]), ("operations", node["operations"])):
            one[what] += more
    return {"operators": operators, "longest": nodes[:SHOWN]}


def print_profile(component: str, nodes: Sequence[Mapping[str, Any]], ceiling: float) -> None:
    """Print the time of each operator, and the nodes that take longest."""
    whole = sum(node["seconds"] for node in nodes)
    print(f"\n{component}: {1000 * whole:.1f} ms on one thread")
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for node in nodes:
        kinds[kind_of(node)].append(node)
    rows = sorted(kinds.items(), key=lambda kind: -sum(node["seconds"] for node in kind[1]))
    for kind, some in rows[:SHOWN]:
        print(f"  {len(some):4} {kind:28}" + figures(some, whole, ceiling))
    print("  the longest:")
    for node in nodes[:SHOWN]:
        shapes = " ".join("x".join(map(str, shape)) for shape in node["inputs"][:2])
        print(f"       {kind_of(node):28}{figures([node], whole, ceiling)}  {shapes}  {node['name'][-40:]}")


def kind_of(node: Mapping[str, Any]) -> str:
    """Return an operator, with the size of its kernel where it is a convolution."""
    kernel = node["inputs"][1][2:] if node["operator"] in ("Conv", "FusedConv") else []
    return " ".join([node["operator"], "x".join(map(str, kernel))]).strip()


def figures(nodes: Sequence[Mapping[str, Any]], whole: float, ceiling: float) -> str:
    """Return nodes' milliseconds, their share of the pass, and their share of the ceiling."""
    seconds, work = (sum(node[what] for node in nodes) for what in ("seconds", "operations"))
    rate = f"{work / seconds / 1e9:7.1f} GFLOP/s {work / seconds / ceiling:5.0%}" if work and seconds else " " * 21
    return f"{1000 * seconds:9.2f} ms {seconds / whole:5.1%} {rate}"


if __name__ == "__main__":
    main()
