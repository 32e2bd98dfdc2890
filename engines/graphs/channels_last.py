"""Pictures with their channels last, from where they enter a graph to where they leave it: what CUDA's kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.graphs.edits import MICROSOFT, GraphView, taken

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # from channels first to channels last, and back
# Computed number by number: the layout does not matter to them.
PLAIN = frozenset(
    {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Neg", "Pow", "Round", "Sigmoid", "Sqrt", "Sub", "Tanh"}
)


class ChannelsLast:
    """A graph that is written anew with its pictures' channels last.

    Of a tensor (rows, channels, height, width) there may be a twin (rows, height, width, channels), the tensor itself,
    or both: each is made when something first takes it.
    """

    def __init__(self, model: ModelProto, ranks: Mapping[str, int]) -> None:
        """Look through a graph, whose nodes come after those that they take from.

        ranks: how many axes tensors have
        """
        self._graph, self._ranks = GraphView.of(model), ranks
        self._twins: dict[str, str] = {}
        self._missing: set[str] = set()  # tensors of which there is only the twin so far
        self._taken_along: set[str] = set()  # outputs of nodes that another one computes too
        self._nodes: list[NodeProto] = []
        self._biased: dict[str, NodeProto] = {}  # by what they give, new convolutions that add a bias
        self._handlers: Mapping[str, Callable[[NodeProto], bool]] = {
            "Conv": self._convolution,
            "GroupNormalization": self._normalization,
            "Concat": self._concatenation,
            "Resize": self._resize,
            "Pad": self._pad,
            "Shape": self._shape,
            "Transpose": self._transpose,
            "ReduceSum": self._sum,
            **dict.fromkeys(PLAIN, self._plain),
        }

    def rewrite(self) -> None:
        """Put the new nodes in the place of the graph's."""
        proto = self._graph.proto
        for node in proto.node:
            handler = self._handlers.get(node.op_type)
            if node.output[0] not in self._taken_along and (handler is None or not handler(node)):
                self._keep(node)
        for output in proto.output:
            self._complete(output.name)
        del proto.node[:]
        proto.node.extend(self._nodes)
        self._graph.replace({})

    def _keep(self, node: NodeProto) -> None:
        for name in list(taken(node)):
            self._complete(name)
        self._nodes.append(node)

    def _complete(self, name: str) -> None:
        """Make a tensor of which there is only the twin."""
        if name in self._missing:
            self._missing.remove(name)
            self._add("Transpose", [self._twins[name]], [name], perm=FIRST)

    def _add(self, op_type: str, takes: list[str], gives: list[str], domain: str = "", **attributes: Any) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node(op_type, takes, gives, gives[0], domain=domain, **attributes))

    def _twin(self, name: str) -> str:
        """Return a tensor with its channels last, made where there is none yet."""
        if name not in self._twins:
            twin = f"{name}.last"
            spread = self._spread_over_pixels(name)
            if spread:
                axes = self._graph.constant(f"{twin}.axes", [1, 2])
                self._add("Unsqueeze", [spread, axes], [twin])
            else:
                self._add("Transpose", [name], [twin], perm=LAST)
            self._twins[name] = twin
        return self._twins[name]

    def _spread_over_pixels(self, name: str) -> str:
        """Return the (rows, channels) that a tensor is, with an axis of one pixel for height and width; or nothing."""
        rank = 4
        while (node := self._graph.made_by(name, "Unsqueeze")) is not None and rank > 2:
            axes = self._graph.numbers(node.input[1])
            if any(axis is None or axis % rank < 2 for axis in axes):
                return ""
            name, rank = node.input[0], rank - len(axes)
        return name if rank == 2 else ""

    def _gives(self, name: str) -> str:
        """Return the twin of what a node gives, which is yet to be made."""
        self._twins[name] = f"{name}.last"
        self._missing.add(name)
        return self._twins[name]

    def _attributes(self, node: NodeProto) -> dict[str, Any]:
        from onnx import helper

        return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}

    def _convolution(self, node: NodeProto) -> bool:
        weights, attributes = self._graph.weights(node.input[1]), self._attributes(node)
        whole = attributes.get("group", 1) == 1 and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        if weights is None or len(weights.dims) != 4 or not whole:
            return False
        takes = [*map(self._twin, node.input[:2]), *node.input[2:]]
        self._add("NhwcConv", takes, [self._gives(node.output[0])], MICROSOFT, **attributes)
        if len(takes) == 3:
            self._biased[node.output[0]] = self._nodes[-1]
        return True

    def suits(self) -> bool:
        """Tell whether every GroupNormalization is of a form that GroupNorm computes."""
        return all(self._groups_of_pairs(n) for n in self._graph.proto.node if n.op_type == "GroupNormalization")

    def _groups_of_pairs(self, node: NodeProto) -> bool:
        """Tell whether groups hold an even number of channels: the kernel reads two at a time, both of one group."""
        channels = self._graph.length(node.input[1])
        groups = self._attributes(node)["num_groups"]
        return channels is not None and channels % (2 * groups) == 0 and self._ranks.get(node.input[0]) in (3, 4)

    def _normalization(self, node: NodeProto) -> bool:
        x, y = node.input[0], node.output[0]
        vectors, attributes = self._vectors(node), self._group_attributes(node)
        silu = self._silu(y)
        flat = self._ranks.get(x) == 3
        takes = self._rows_last(x, y) if flat else self._twin(x)
        gives = f"{y}.row" if flat else self._gives(silu or y)
        self._add("GroupNorm", [takes, *vectors], [gives], MICROSOFT, activation=int(bool(silu)), **attributes)
        if flat:
            self._add("Squeeze", [gives, f"{y}.height"], [f"{y}.last"])
            self._add("Transpose", [f"{y}.last"], [silu or y], perm=[0, 2, 1])
        return True

    def _group_attributes(self, node: NodeProto) -> dict[str, Any]:
        found = self._attributes(node)
        return {"channels_last": 1, "groups": found["num_groups"], "epsilon": found.get("epsilon", 1e-5)}

    def _vectors(self, node: NodeProto) -> list[str]:
        """Return a normalisation's scale and shift in float32, which its kernel takes whatever it computes in."""
        names = [f"{node.output[0]}.{number}" for number in (0, 1)]
        for name, given in zip(names, node.input[1:], strict=True):
            self._add("Cast", [given], [name], to=1)
        return names

    def _normalized_sum(self, node: NodeProto) -> bool:
        """Have the one normalisation of a sum compute the sum too, with the bias of a convolution in it.

        cuDNN's convolutions are fastest without a bias, and ONNX Runtime then adds it in another pass over the picture.
        """
        takers = self._graph.takers.get(node.output[0], [])
        norms = [taker for taker in takers if taker.op_type == "GroupNormalization"]
        spread = [self._spread_over_pixels(name) for name in node.input]
        if len(norms) != 1 or all(spread):
            return False
        if not all(map(self._is_picture, node.input)):
            return False
        (norm,), pictures = norms, [number for number in (0, 1) if not spread[number]]
        first = next((number for number in pictures if self._adds_bias(node, number)), pictures[0])
        silu = self._silu(norm.output[0])
        self._taken_along.add(norm.output[0])
        outputs = {output.name for output in self._graph.proto.output}
        others = len(takers) > 1 or node.output[0] in outputs
        takes, skip = self._twin(node.input[first]), spread[1 - first] or self._twin(node.input[1 - first])
        gives = [self._gives(silu or norm.output[0]), *([self._gives(node.output[0])] if others else [])]
        attributes = self._group_attributes(norm)
        bias = [self._biased[node.input[first]].input.pop()] if self._adds_bias(node, first) else []
        inputs = [takes, *self._vectors(norm), skip, *bias]
        self._add("SkipGroupNorm", inputs, gives, MICROSOFT, activation=int(bool(silu)), **attributes)
        return True

    def _adds_bias(self, total: NodeProto, number: int) -> bool:
        """Tell whether one input of a sum is a convolution with a bias that nothing else takes."""
        name, outputs = total.input[number], {output.name for output in self._graph.proto.output}
        alone = self._graph.takers[name] == [total] and len(set(total.input)) == 2 and name not in outputs
        return alone and name in self._biased

    def _rows_last(self, x: str, y: str) -> str:
        """Return (rows, channels, pixels) as pictures of one row with their channels last."""
        self._complete(x)
        self._add("Transpose", [x], [f"{y}.turned"], perm=[0, 2, 1])
        height = self._graph.constant(f"{y}.height", [1])
        self._add("Unsqueeze", [f"{y}.turned", height], [f"{y}.pictures"])
        return f"{y}.pictures"

    def _silu(self, name: str) -> str:
        """Return the name of x * sigmoid(x), where that is all that is made of a tensor; then it is not made again."""
        takers = self._graph.takers.get(name, [])
        gates = [taker for taker in takers if taker.op_type == "Sigmoid"]
        products = [taker for taker in takers if taker.op_type == "Mul"]
        outputs = {output.name for output in self._graph.proto.output}
        if len(takers) != 2 or len(gates) != 1 or len(products) != 1 or name in outputs:
            return ""
        (gate,), (product,) = gates, products
        if set(product.input) != {name, gate.output[0]} or self._graph.takers[gate.output[0]] != [product]:
            return ""
        self._taken_along |= {gate.output[0], product.output[0]}
        return str(product.output[0])

    def _plain(self, node: NodeProto) -> bool:
        if not any(name in self._twins for name in node.input):
            return False
        if node.op_type == "Add" and self._normalized_sum(node):
            return True
        takes = []
        for name in node.input:
            if self._is_picture(name):
                takes.append(self._twin(name))
            elif not name or self._is_number(name):
                takes.append(name)
            else:
                return False
        self._add(node.op_type, takes, [self._gives(node.output[0])], **self._attributes(node))
        return True

    def _is_picture(self, name: str) -> bool:
        return name in self._twins or self._ranks.get(name) == 4 or bool(self._spread_over_pixels(name))

    def _is_number(self, name: str) -> bool:
        tensor = self._graph.weights(name)
        return self._ranks.get(name) == 0 or (tensor is not None and int(np.prod(tensor.dims)) == 1)

    def _concatenation(self, node: NodeProto) -> bool:
        if axis_of(node) != 1 or not any(name in self._twins for name in node.input):
            return False
        takes = [self._twin(name) for name in node.input]
        self._add("Concat", takes, [self._gives(node.output[0])], axis=3)
        return True

    def _resize(self, node: NodeProto) -> bool:
        attributes = self._attributes(node)
        if node.input[0] not in self._twins or "axes" in attributes or (len(node.input) > 1 and node.input[1]):
            return False
        takes = [self._twins[node.input[0]], "", *(name and self._reordered(name, LAST) for name in node.input[2:])]
        self._add("Resize", takes, [self._gives(node.output[0])], **attributes)
        return True

    def _reordered(self, name: str, order: list[int]) -> str:
        """Return four numbers, one for each axis, in another order."""
        made = f"{name}.last.{'-'.join(map(str, order))}"
        if made not in self._twins:
            self._twins[made] = made
            self._add("Gather", [name, self._graph.constant(f"{made}.order", order)], [made])
        return made

    def _pad(self, node: NodeProto) -> bool:
        if node.input[0] not in self._twins or (len(node.input) > 3 and node.input[3]):
            return False
        both = [*LAST, *(4 + axis for axis in LAST)]
        takes = [self._twins[node.input[0]], self._reordered(node.input[1], both), *node.input[2:]]
        self._add("Pad", takes, [self._gives(node.output[0])], **self._attributes(node))
        return True

    def _shape(self, node: NodeProto) -> bool:
        if node.input[0] not in self._missing:
            return False
        attributes, own = self._attributes(node), f"{node.output[0]}.last"
        axes = FIRST[attributes.get("start", 0) : attributes.get("end", 4)]
        self._add("Shape", [self._twins[node.input[0]]], [own])
        self._add("Gather", [own, self._graph.constant(f"{own}.axes", axes)], list(node.output))
        return True

    def _transpose(self, node: NodeProto) -> bool:
        (x,), perm = node.input, self._attributes(node).get("perm")
        if perm == FIRST:
            self._complete(x)
            self._twins[node.output[0]] = x
            self._missing.add(node.output[0])
            return True
        if perm == LAST and x in self._twins:
            self._add("Identity", [self._twins[x]], list(node.output))
            return True
        return False

    def _sum(self, node: NodeProto) -> bool:
        """Carry over a sum over all of a picture, which is the same in any layout."""
        axes = self._graph.numbers(node.input[1]) if len(node.input) > 1 else []
        if node.input[0] not in self._twins or sorted(axis for axis in axes if axis is not None) != [1, 2, 3]:
            return False
        takes = [self._twins[node.input[0]], node.input[1]]
        self._add("ReduceSum", takes, list(node.output), **self._attributes(node))
        return True


def axis_of(node: NodeProto, default: int = 0) -> int:
    """Return a node's axis. default: where it names none"""
    return next((int(a.i) for a in node.attribute if a.name == "axis"), default)


def ranks_of(model: ModelProto) -> dict[str, int]:
    """Return how many axes tensors have, as far as it follows from weights and inputs."""
    graph = GraphView.of(model)
    infos = [info for info in model.graph.input if info.type.tensor_type.HasField("shape")]
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in infos}
    ranks |= {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        rank = _rank(node, graph, ranks)
        if rank is not None:
            ranks |= dict.fromkeys(node.output, rank)
    return ranks


def _rank(node: NodeProto, graph: GraphView, ranks: Mapping[str, int]) -> int | None:
    taken_ranks = [ranks.get(name) for name in node.input if name]
    if node.op_type == "Conv":
        return taken_ranks[1]
    if node.op_type == "Reshape":
        shape = graph.made_by(node.input[1], "Shape")
        return len(graph.numbers(node.input[1])) if shape is None else ranks.get(shape.input[0])
    if node.op_type in ("GroupNormalization", "Resize", "Pad", "Transpose", "Concat"):
        return next((rank for rank in taken_ranks if rank is not None), None)
    if node.op_type == "Unsqueeze" and taken_ranks[0] is not None:
        return taken_ranks[0] + len(graph.numbers(node.input[1]))
    if node.op_type in PLAIN:  # of time embeddings it is not known, and they are spread over pixels that are
        return max((rank for rank in taken_ranks if rank is not None), default=None)
    return None
