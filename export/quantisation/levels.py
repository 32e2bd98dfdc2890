"""Which nodes of a denoiser may compute in 8 bits, by the checkpoint's own names: three levels, the safest first.

What turns time, sizes and pooled text into numbers, the ends of the network, shortcuts and the projections back into
its residual stream are never among them: a handful of nodes whose errors every later layer sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from latentrt.export.graphs.types import HALF

# Where a module's path begins, of those that are looked at.
BLOCKS = frozenset({"down_blocks", "mid_block", "up_blocks", "transformer_blocks"})
# Parts of the path.
LEFT_OUT = frozenset({"conv_shortcut", "proj_out", "time_emb_proj"})
FEED_FORWARD = frozenset({"ff", "ff_context"})
PROJECTIONS = frozenset(
    {"to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_in"}
)
PRODUCTS = frozenset({"MatMul", "Gemm"})


def _convolution_or_feed_forward(node: ir.Node, parts: frozenset[str]) -> bool:
    return node.op_type == "Conv" or (node.op_type in PRODUCTS and bool(parts & FEED_FORWARD))


def _projection(node: ir.Node, parts: frozenset[str]) -> bool:
    return node.op_type in PRODUCTS and bool(parts & PROJECTIONS)


def _attention(node: ir.Node, _: frozenset[str]) -> bool:
    return node.op_type == "Attention"


LEVELS: Mapping[str, Callable[[ir.Node, frozenset[str]], bool]] = {
    "convolutions and feed-forward": _convolution_or_feed_forward,
    "projections": _projection,
    "attention": _attention,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A level's nodes in a graph, by their names."""

    name: str
    nodes: tuple[str, ...]

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Return its nodes by the block of the network that they belong to, as `down_blocks.1`."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            found.setdefault(".".join(node.split("/")[0].split(".")[:2]), []).append(node)
        return {block: tuple(nodes) for block, nodes in found.items()}


def find_levels(model: ir.Model) -> tuple[Level, ...]:
    """Return the levels that a float16 graph, whose values have types, has nodes of."""
    named: dict[str, list[str]] = {name: [] for name in LEVELS}
    for node in model.graph:
        path = (node.name or "").partition("/")[0].split(".")
        parts = frozenset(path)
        level = next((name for name, holds in LEVELS.items() if holds(node, parts)), None)
        if level is not None and path[0] in BLOCKS and not parts & LEFT_OUT and _in_half(node):
            named[level].append(str(node.name))
    return tuple(Level(name=name, nodes=tuple(nodes)) for name, nodes in named.items() if nodes)


def operands(node: ir.Node) -> tuple[ir.Value, ...]:
    """Return what a node multiplies."""
    count = 3 if node.op_type == "Attention" else 2
    return tuple(value for value in node.inputs[:count] if value is not None)


def _in_half(node: ir.Node) -> bool:
    """Tell whether a node computes in float16, by weights that are known or, where it has none, without."""
    first, *others = operands(node)
    known = node.op_type == "Attention" or all(value.is_initializer() for value in others)
    return known and not first.is_initializer() and all(value.dtype == HALF for value in (first, *others))
