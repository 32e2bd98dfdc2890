"""What a GPU must do for a pass of a graph, and how long that takes at its measured ceilings at the least.

Each node moves its inputs and outputs through memory and does its arithmetic; it takes the longer of the two. A real
pass takes longer: launching a node costs microseconds, and small ones fill no GPU. It can also be shorter than the
sum, where a compiler computes what only reads and writes inside the node before or behind it: the second figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import Role
from latentrt.engines.errors import BundleError
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.spec import Array, Document

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU reaches: bytes copied in a second, and operations of matrix products in float16, and in 8 bits."""

    bytes_per_s: float
    operations_per_s: float
    eight_bit_per_s: float


# Measured on rented machines, dense, with random data (benchmarks/torch_peers.py measures them again). Products in 8
# bits were not: NVIDIA's data sheets give fp8 and int8 twice the rate of float16, and so they are taken to have here.
CEILINGS: Mapping[str, Ceilings] = {
    "h100": Ceilings(bytes_per_s=3.0e12, operations_per_s=798e12, eight_bit_per_s=1596e12),
    "h200": Ceilings(bytes_per_s=4.3e12, operations_per_s=788e12, eight_bit_per_s=1576e12),
}
HALF_BYTES = 2  # of a number, whatever the graph's own type: the ceilings are float16's
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # these compute in 8 bits where they have weights
FLOATS = (1, 10)  # of TensorProto's types, those that are counted
AXES = 4  # most numbers that say how a shape is scaled
VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
# Bound by memory whoever computes them, and not part of what stands beside them.
STANDING = frozenset(
    {"Attention", "Conv", "ConvTranspose", "Gemm", "GroupNormalization", "LayerNormalization", "MatMul"}
    | {"InstanceNormalization", "RMSNormalization", "Softmax"}
)

GUIDED: tuple[Role, ...] = ("denoiser", "controlnet", "text_encoder")  # compute a row for the negative prompt too

Shapes = Mapping[str, tuple[int, ...]]


class Cost(Document, frozen=True, kw_only=True):
    """What the nodes of one operator do in a pass.

    operations: of multiplication and addition, in matrix products and convolutions alone
    bytes: read and written, in float16 or, where layers compute in it, 8 bits
    seconds: at the ceilings, one node after another
    fused: whether compilers do it inside other nodes
    """

    operator: str
    nodes: int
    operations: int
    bytes: int
    seconds: float
    fused: bool


class Roofline(Document, frozen=True, kw_only=True):
    """A pass of a graph at a GPU's ceilings.

    seconds: of all nodes, one after another
    fused_s: without those that compilers do inside others
    """

    costs: tuple[Cost, ...]
    seconds: float
    fused_s: float


def roofline(graph: Path, sizes: Mapping[str, int], ceilings: Ceilings, *, eight_bit: bool = False) -> Roofline:
    """Return the costs of a pass, the operator that takes longest first.

    graph: a canonical one, of whose weights only integers are read
    sizes: of each dynamic axis of its inputs. Raises BundleError where one is missing, or a shape does not follow.
    eight_bit: layers with weights read these and what goes in as fp8 or int8, and compute in it; all else is float16
    """
    return roofline_of(load_graph(graph), graph.parent, sizes, ceilings, eight_bit=eight_bit)


def roofline_of(
    model: ModelProto, folder: Path, sizes: Mapping[str, int], ceilings: Ceilings, *, eight_bit: bool = False
) -> Roofline:
    """Return the costs of a pass of a graph that lies in a folder, as `roofline` does."""
    shapes = find_shapes(model, folder, sizes)
    weights = {each.name for each in model.graph.initializer} if eight_bit else set[str]()
    found: dict[str, list[tuple[int, int, float]]] = {}
    for node in model.graph.node:
        if any(name in shapes for name in node.output) and node.op_type not in VIEWS:
            small = node.op_type in LAYERS and node.input[1] in weights
            work, moved = operations(node, shapes), moved_bytes(node, shapes, eight_bit=small)
            rate = ceilings.eight_bit_per_s if small else ceilings.operations_per_s
            found.setdefault(node.op_type, []).append((work, moved, max(work / rate, moved / ceilings.bytes_per_s)))
    costs = [_cost(operator, each) for operator, each in found.items()]
    costs.sort(key=lambda cost: -cost.seconds)
    return Roofline(
        costs=tuple(costs),
        seconds=sum(cost.seconds for cost in costs),
        fused_s=sum(cost.seconds for cost in costs if not cost.fused),
    )


def _cost(operator: str, nodes: Sequence[tuple[int, int, float]]) -> Cost:
    return Cost(
        operator=operator,
        nodes=len(nodes),
        operations=sum(work for work, _, _ in nodes),
        bytes=sum(moved for _, moved, _ in nodes),
        seconds=sum(seconds for _, _, seconds in nodes),
        fused=operator not in STANDING,
    )


def find_shapes(model: ModelProto, folder: Path, sizes: Mapping[str, int]) -> Shapes:
    """Return the shapes of the float values of a graph in a folder, weights included, by name. Raises BundleError."""
    types, numbers = _given(model, folder, sizes)
    for node in model.graph.node:
        try:
            _follow(node, types, numbers)
        except Exception as error:
            raise BundleError(f"the shape of {node.output[0]} does not follow from the inputs': {error}") from error
    return {name: _shape(found) for name, found in types.items() if found.tensor_type.elem_type in FLOATS}


def _given(model: ModelProto, folder: Path, sizes: Mapping[str, int]) -> tuple[dict[str, TypeProto], dict[str, Array]]:
    """Return the types of inputs and weights, and of the weights the numbers that shapes may follow from."""
    from onnx import helper, numpy_helper

    types: dict[str, TypeProto] = {}
    for info in model.graph.input:
        tensor = info.type.tensor_type
        axes = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
        if missing := [axis for axis in axes if isinstance(axis, str) and axis not in sizes]:
            raise BundleError(f"{info.name}: nothing says how long its axis {missing[0]} is; give its size")
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
        types[info.name] = helper.make_tensor_type_proto(tensor.elem_type, shape)
    weights = model.graph.initializer
    types |= {each.name: helper.make_tensor_type_proto(each.data_type, list(each.dims)) for each in weights}
    whole = [each for each in weights if each.data_type not in FLOATS or math.prod(each.dims) <= AXES]
    return types, {each.name: numpy_helper.to_array(each, base_dir=str(folder)) for each in whole}


def _follow(node: NodeProto, types: dict[str, TypeProto], numbers: dict[str, Array]) -> None:
    """Note the types of what a node gives, and the numbers where they are integers that follow from shapes."""
    from onnx import defs, helper, numpy_helper, shape_inference
    from onnx.reference import ReferenceEvaluator

    taken = [name for name in node.input if name]
    if node.op_type == "GroupNormalization":  # onnx has no rule for it
        types[node.output[0]] = types[node.input[0]]
        return
    known = {name: numbers[name] for name in taken if name in numbers}
    if node.op_type == "Shape":
        known = {taken[0]: np.broadcast_to(np.float32(0), _shape(types[taken[0]]))}
    if len(known) == len(set(taken)):
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, known), strict=True):
            numbers[name] = np.asarray(value)
            kind = helper.np_dtype_to_tensor_dtype(numbers[name].dtype)
            types[name] = helper.make_tensor_type_proto(kind, numbers[name].shape)
        return
    data = {name: numpy_helper.from_array(value, name) for name, value in known.items()}
    rules = defs.get_schema(node.op_type, defs.onnx_opset_version(), node.domain)
    given = shape_inference.infer_node_outputs(rules, node, {name: types[name] for name in taken}, data)
    for name, found in given.items():
        if any(not axis.HasField("dim_value") for axis in found.tensor_type.shape.dim):
            raise ValueError(f"{node.op_type} gives {name} no fixed shape")
        types[name] = found


def _shape(found: TypeProto) -> tuple[int, ...]:
    return tuple(axis.dim_value for axis in found.tensor_type.shape.dim)


def moved_bytes(node: NodeProto, shapes: Shapes, *, eight_bit: bool = False) -> int:
    """Return the bytes that a node reads and writes: once each, whatever fits in a cache.

    eight_bit: what it multiplies has one byte a number
    """
    names: Iterable[str] = dict.fromkeys((*node.input, *node.output))
    if node.op_type == "Gather":  # of a table, the rows that it gives
        names = [*node.output, *node.output]
    half = set(names) - set(node.input[:2]) if eight_bit else set(names)
    sizes = ((math.prod(shapes[name]), HALF_BYTES if name in half else 1) for name in names if name in shapes)
    return sum(count * size for count, size in sizes)


def operations(node: NodeProto, shapes: Shapes) -> int:
    """Return a node's multiplications and additions; none for what does no matrix product."""
    if node.op_type in ("MatMul", "Gemm"):
        inner = shapes[node.input[0]][-1]
        if any(attribute.name == "transA" and attribute.i for attribute in node.attribute):
            inner = shapes[node.input[0]][-2]
        return 2 * math.prod(shapes[node.output[0]]) * inner
    if node.op_type == "Conv":
        return 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "Attention":
        keys = shapes[node.input[1]][-2]
        return 2 * keys * (math.prod(shapes[node.input[0]]) + math.prod(shapes[node.output[0]]))
    return 0


def rooflines(
    bundle: Bundle, ceilings: Ceilings, *, size: tuple[int, int] | None = None, eight_bit: bool = False
) -> dict[str, Roofline]:
    """Return each component's costs for one picture with guidance.

    size: (width, height) in pixels, the bundle's own by default; eight_bit: as in `roofline`
    Raises RequestError where the size does not fit the bundle's latents, BundleError as `roofline` does.
    """
    options = BuildOptions(sizes=() if size is None else (size,))
    profile = max(options.profiles(bundle.manifest), key=lambda one: one.rows)
    found = {}
    for name, spec in bundle.manifest.components.items():
        rows = profile.rows if spec.role in GUIDED else profile.pictures
        sizes = {**profile.axes(bundle.manifest.latents.factor), "batch": rows, "steps": 1}
        found[name] = roofline(bundle.path(spec.graph), sizes, ceilings, eight_bit=eight_bit)
    return found
