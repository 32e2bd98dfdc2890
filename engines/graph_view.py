"""An ONNX graph with who makes and who takes each of its tensors: what edits at build time look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphView:
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
        """Return the length of a vector of weights, whatever type it is cast to; None where it is no weight."""
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
        """Put nodes in the place of others, which are named by their first output; drop what nobody needs then."""
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
