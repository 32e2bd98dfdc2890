"""What it would give to compute cross-attention's keys and values once a picture: a pass of the UNet without them.

    python benchmarks/cross_attention.py BUNDLE [--side 32] [--rows 2] [--one-thread] [--output FILE]

The layers that read the text embeddings alone are cut off, and what they gave become inputs: the most that could be
won, since something has to compute them once. Both graphs are edited for this CPU, as engines are built, and take
turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cpu_kernels import Edit, compare, make_parser, print_ways

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.graphs.cpu_rewrites import use_host_kernels
from latentrt.runtime.bench.machine import Watch, describe, now

if TYPE_CHECKING:
    from onnx import ModelProto

TEXT = "encoder_hidden_states"


def main() -> None:
    arguments = make_parser(__doc__ or "").parse_args()
    watch, bundle = Watch(), Bundle.open(arguments.bundle)
    found = compare(bundle, "unet", WAYS, arguments)
    document = {
        "kind": "latentrt cross attention",
        "created": now(),
        "command": "python benchmarks/cross_attention.py " + " ".join(sys.argv[1:]),
        "machine": describe(),
        "conditions": msgspec.to_builtins(watch.conditions()),
        "bundle": arguments.bundle.resolve().name,
        "options": {"side": arguments.side, "rows": arguments.rows, "one_thread": arguments.one_thread},
        "ways": found,
    }
    print_ways("unet", found)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def take_keys_and_values(model: ModelProto, _: Path) -> int:
    """Make the products of the text embeddings inputs of a UNet's graph. Returns how many there are."""
    from onnx import helper

    (text,) = (info for info in model.graph.input if info.name == TEXT)
    rows, tokens, _width = (axis.dim_param or axis.dim_value for axis in text.type.tensor_type.shape.dim)
    widths = {tensor.name: tensor.dims[-1] for tensor in model.graph.initializer if tensor.dims}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[0] == TEXT]
    for node in products:
        shape = [rows, tokens, widths[node.input[1]]]
        model.graph.input.append(helper.make_tensor_value_info(node.output[0], text.type.tensor_type.elem_type, shape))
        model.graph.node.remove(node)
    return len(products)


WAYS: Mapping[str, tuple[Edit, ...]] = {
    "in each pass": (lambda model, _: use_host_kernels(model),),
    "once a picture": (take_keys_and_values, lambda model, _: use_host_kernels(model)),
}


if __name__ == "__main__":
    main()
