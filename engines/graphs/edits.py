"""Edits of ONNX graphs at build time. Imports onnx inside its functions: only building needs it."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.errors import BundleError, EngineError, NotInstalledError
from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

    from latentrt.engines.bundle.manifest import LatentSpec

from latentrt.engines.tensor_names import EXTRA_EMBEDDINGS, FRAMES, PIXELS, SQUARES

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def unavailable() -> EngineError | None:
    """Return the error that says why graphs cannot be edited here, or None. Imports nothing."""
    try:
        found = importlib.util.find_spec("onnx") is not None
    except ImportError:
        found = False
    return None if found else NotInstalledError("building engines needs onnx", install="pip install 'latentrt[build]'")


def load_graph(path: Path) -> ModelProto:
    """Read an ONNX graph without its external weights. Raises BundleError if the file is no graph."""
    if (reason := unavailable()) is not None:
        raise reason
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise BundleError(f"{path} is not an ONNX graph: truncated or altered; export the checkpoint again") from None
    if not model.graph.node:
        raise BundleError(f"{path} holds an empty graph: truncated or altered; export the checkpoint again")
    return model


def save_graph(model: ModelProto, path: Path) -> None:
    """Write a graph, without the weights that lie in files beside it."""
    import onnx

    onnx.save(model, str(path))


def append_pixel_tail(model: ModelProto) -> None:
    """Make a VAE decoder end in pixels: (batch, 3, height, width) in -1..1 becomes (batch, height, width, 3), uint8.

    The rounding is that of diffusers' image processor: x / 2 + 0.5, cut to 0..1, times 255, to the nearest even.
    Pixels cannot show that a number was not finite. A second output does, `squares`, (batch, 2), float32: the sums of
    the squares of the latents and of what the decoder makes of them. A state head goes before them afterwards.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    latents, (output,) = _latents(graph), graph.output
    batch, _, height, width = (axis.dim_param or axis.dim_value for axis in output.type.tensor_type.shape.dim)
    constants = {"half_range": 127.5, "lowest": 0.0, "highest": 255.0}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), f"tail.{name}"))
    graph.node.extend(
        [
            helper.make_node("Cast", [output.name], ["tail.wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["tail.wide", "tail.half_range"], ["tail.scaled"]),
            helper.make_node("Add", ["tail.scaled", "tail.half_range"], ["tail.moved"]),
            helper.make_node("Clip", ["tail.moved", "tail.lowest", "tail.highest"], ["tail.cut"]),
            helper.make_node("Round", ["tail.cut"], ["tail.rounded"]),
            helper.make_node("Transpose", ["tail.rounded"], ["tail.last"], perm=[0, 2, 3, 1]),
            helper.make_node("Cast", ["tail.last"], [PIXELS], to=TensorProto.UINT8),
            helper.make_node("Cast", [latents.name], ["tail.latents"], to=TensorProto.FLOAT),
            *_square_sums("tail.latents", "tail.taken"),
            *_square_sums("tail.wide", "tail.given"),
            helper.make_node("Concat", ["tail.taken", "tail.given"], ["tail.sums"], axis=1),
            helper.make_node("Flatten", ["tail.sums"], [SQUARES], axis=1),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], dtype=np.int64), "tail.axes"))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, [batch, height, width, 3]))
    graph.output.append(helper.make_tensor_value_info(SQUARES, TensorProto.FLOAT, [batch, 2]))


def _latents(graph: GraphProto) -> ValueInfoProto:
    """Return a decoder's one input; beside it there may be how many frames it sees at once."""
    found: list[ValueInfoProto] = [info for info in graph.input if info.name != FRAMES]
    (latents,) = found
    return latents


def _square_sums(values: str, sums: str) -> list[NodeProto]:
    """Return what sums each picture's squares: by operators that take the same inputs in every opset from 13 on."""
    from onnx import helper

    squares = f"{sums}.squares"
    return [
        helper.make_node("Mul", [values, values], [squares]),
        helper.make_node("ReduceSum", [squares, "tail.axes"], [sums]),
    ]


def prepend_state_head(model: ModelProto, state_rows: int, latents: LatentSpec) -> None:
    """Make a VAE decoder begin at the sampler's state, where the fused stage leaves it.

    latent_sample (batch, C, latent_height, latent_width) in the graph's dtype becomes
    state (pictures, state_rows, C, latent_height, latent_width) float32, of which the first row is divided by the
    scaling factor, and the shift added where there is one; the batch axis of the outputs is named `pictures` too.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    taken, further = _latents(graph), [copy.deepcopy(info) for info in graph.input if info.name == FRAMES]
    tensor = taken.type.tensor_type
    batch, *axes = (axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    constants: dict[str, Array] = {
        "first": np.array(0, dtype=np.int64),
        "scale": np.array(latents.scaling_factor, dtype=np.float32),
        **({"shift": np.array(latents.shift, dtype=np.float32)} if latents.shift else {}),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"head.{name}") for name, value in constants.items())
    shifted = [helper.make_node("Add", ["head.unscaled", "head.shift"], ["head.shifted"])] if latents.shift else []
    head = [
        helper.make_node("Gather", ["state", "head.first"], ["head.latents"], axis=1),
        helper.make_node("Div", ["head.latents", "head.scale"], ["head.unscaled"]),
        *shifted,
        helper.make_node("Cast", ["head.shifted" if shifted else "head.unscaled"], [taken.name], to=tensor.elem_type),
    ]
    nodes = [*head, *graph.node]
    for field in (graph.node, graph.input, graph.value_info):  # value_info: the batch axis has another name now
        del field[:]
    graph.node.extend(nodes)
    state = ["pictures", state_rows, *axes]
    graph.input.extend([helper.make_tensor_value_info("state", TensorProto.FLOAT, state), *further])
    for output in graph.output:
        for axis in output.type.tensor_type.shape.dim:
            if axis.dim_param == batch:
                axis.dim_param = "pictures"


def append_embedding_input(model: ModelProto, *, rows: int | None = None) -> None:
    """Let a text encoder read tokens that its table does not hold, from a new input `extra_embeddings` (rows, width).

    rows: how many, for engines with fixed shapes; None for any number

    The id -1 is the input's first row, -2 its second, and so on. Below zero they need no knowledge of the table's
    length, and a pooled output that looks for the largest id still finds the end. The input has the table's dtype,
    and at least one row. A graph whose ids are looked up in no table stays as it is.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    found = _find_embedding(graph)
    if found is None:
        return
    place, table = found
    gather = graph.node[place]
    ids, embedding = gather.input[1], gather.output[0]
    for name, value in {"zero": 0, "first": -1}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), f"extra.{name}"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), "extra.last_axis"))
    gather.input[1], gather.output[0] = "extra.table_ids", "extra.from_table"
    before = [helper.make_node("Max", [ids, "extra.zero"], ["extra.table_ids"])]
    after = [
        helper.make_node("Sub", ["extra.first", ids], ["extra.rows"]),
        helper.make_node("Max", ["extra.rows", "extra.zero"], ["extra.ids"]),
        helper.make_node("Gather", [EXTRA_EMBEDDINGS, "extra.ids"], ["extra.from_input"]),
        helper.make_node("Less", [ids, "extra.zero"], ["extra.below"]),
        helper.make_node("Unsqueeze", ["extra.below", "extra.last_axis"], ["extra.chosen"]),
        helper.make_node("Where", ["extra.chosen", "extra.from_input", "extra.from_table"], [embedding]),
    ]
    nodes = [*graph.node[:place], *before, gather, *after, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)
    shape = [rows or "extra_rows", table.dims[1]]
    graph.input.append(helper.make_tensor_value_info(EXTRA_EMBEDDINGS, table.data_type, shape))


def _find_embedding(graph: GraphProto) -> tuple[int, TensorProto] | None:
    """Return the place of the node that looks `input_ids` up, and the table, (entries, width)."""
    tables = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    ids = {"input_ids"}
    for place, node in enumerate(graph.node):
        if node.op_type in ("Reshape", "Identity", "Squeeze", "Unsqueeze") and node.input[0] in ids:
            ids.update(node.output)
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in ids:
            return place, tables[node.input[0]]
    return None


def has_external(model: ModelProto) -> bool:
    """Return whether weights lie in files beside the graph."""
    from onnx import TensorProto

    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)


def link_data(source: Path, directory: Path, *, name: str | None = None) -> None:
    """Put a graph's external data beside an edited graph, as a hard link where the file system allows one.

    ONNX Runtime refuses external data that lies outside the graph's directory. That is why a link is followed first: a
    file of a hub's cache is a relative one, which as it is would lead nowhere from another directory.
    """
    target = directory / (name or source.name)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class GraphView(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A graph, and who makes and who takes each of its tensors."""

    proto: GraphProto
    makers: dict[str, NodeProto]
    takers: dict[str, list[NodeProto]]

    @classmethod
    def of(cls, model: ModelProto) -> GraphView:
        """Look through a model's nodes."""
        makers: dict[str, NodeProto] = {}
        takers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                takers.setdefault(name, []).append(node)
        return cls(proto=model.graph, makers=makers, takers=takers)

    def made_by(self, name: str, op_type: str) -> NodeProto | None:
        """Return the node that makes a tensor, where it is of this type."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def length(self, name: str) -> int | None:
        """Return the length of a vector of weights, whatever type it is cast to; None if it is no weight."""
        while (cast := self.made_by(name, "Cast")) is not None:
            name = cast.input[0]
        tensor = self.weights(name)
        return None if tensor is None else tensor.dims[0]

    def numbers(self, name: str) -> list[int | None]:
        """Return a vector of whole numbers as far as the graph holds it, None for what is computed."""
        from onnx import numpy_helper

        if (tensor := self.weights(name)) is not None:
            return list(numpy_helper.to_array(tensor).reshape(-1).tolist())
        constant = self.made_by(name, "Constant")
        if constant is not None:
            values = next((a.t for a in constant.attribute if a.name == "value"), None)
            return [None] if values is None else list(numpy_helper.to_array(values).reshape(-1).tolist())
        joined = self.made_by(name, "Concat")
        return [None] if joined is None else [number for part in joined.input for number in self.numbers(part)]

    def constant(self, name: str, values: list[int] | Array) -> str:
        """Add a constant, whole numbers or an array, and return its name."""
        from onnx import numpy_helper

        array = np.array(values, dtype=np.int64) if isinstance(values, list) else values
        self.proto.initializer.append(numpy_helper.from_array(array, name))
        return name

    def weights(self, name: str) -> TensorProto | None:
        """Return weights by name."""
        return next((tensor for tensor in self.proto.initializer if tensor.name == name), None)

    def replace(self, instead: Mapping[str, Sequence[NodeProto]]) -> None:
        """Put nodes in place of others, which are named by their first output; drop what nobody needs then."""
        nodes = [each for node in self.proto.node for each in instead.get(node.output[0], [node])]
        needed = list(_needed(nodes, {output.name for output in self.proto.output}))
        del self.proto.node[:]
        self.proto.node.extend(reversed(needed))


def _needed(nodes: Sequence[NodeProto], wanted: set[str]) -> Iterator[NodeProto]:
    """Give the nodes that are needed for the wanted tensors, the last one first."""
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted |= set(taken(node))
            yield node


def taken(node: NodeProto) -> Iterator[str]:
    """Give the names of all that a node takes, inside its branches too."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                yield from taken(inner)
