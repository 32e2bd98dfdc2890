"""What a graph does to numbers: the largest magnitude at each place, and what is left when each node rounds to fp16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt.engines.spec import Array
from latentrt.export.graphs.golden import Pair, compare, widen
from latentrt.export.graphs.run import run_in_pieces
from latentrt.export.graphs.types import FLOAT, HALF, load_typed

LARGEST = 65504.0  # float16's
# The recorded inputs are a sample: others may reach further.
LIMIT = LARGEST / 4
MEASURED = "largest magnitude of "  # begins the names of the recording graph's further outputs
# Their argument is the timestep times a frequency: in float16, 999 and 999.4 would be the same angle.
WAVES = ("Sin", "Cos")
# Rows of attention's first product that exist at once: all of a 64x64 picture's would be half a gigabyte.
ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Largest magnitudes that were met.

    values: of every float tensor but the angles of sines and cosines, by its name
    logits: of the scaled products of queries and keys, by the name of the attention's output
    """

    values: Mapping[str, float]
    logits: Mapping[str, float]

    @property
    def largest(self) -> float:
        """Return the largest finite one of all, attention's products included: masks may hold infinities."""
        return max((each for each in (*self.values.values(), *self.logits.values()) if np.isfinite(each)), default=0.0)

    def __or__(self, other: Ranges) -> Ranges:
        """Return the larger of both at each place."""
        return Ranges(values=_larger(self.values, other.values), logits=_larger(self.logits, other.logits))


def _larger(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: float(np.maximum(a.get(name, 0.0), b.get(name, 0.0))) for name in {**a, **b}}  # NaN wins


def record_ranges(graph: Path, pairs: Sequence[Pair], *, component: str) -> tuple[Ranges, float]:
    """Run a float32 graph on golden inputs. Returns its ranges, and its largest relative difference from the pairs.

    Writes a second graph beside it, which shares its weights and tells the magnitudes. Raises CheckpointError if
    a shape is not the recorded one.
    """
    model = load_typed(graph)
    products = _products(model)
    recording = _write_recording(model, graph.with_name("recording.onnx"))
    ranges, worst = Ranges(values={}, logits={}), 0.0
    recorded = run_in_pieces(recording, [widen(inputs) for inputs, _ in pairs])
    for found, (_, expected) in zip(recorded, pairs, strict=True):
        worst = max(worst, compare(component, found, expected))
        ranges |= Ranges(
            values={name.removeprefix(MEASURED): float(found[name]) for name in found if name.startswith(MEASURED)},
            logits={name: largest_logit(found[q], found[k], scale) for name, (q, k, scale) in products.items()},
        )
    return ranges, worst


def _products(model: ir.Model) -> dict[str, tuple[str, str, float | None]]:
    """Return the queries, the keys and the scale of each attention, by the name of its output."""
    products = {}
    for node in model.graph:
        if node.op_type == "Attention":
            query, key = node.inputs[:2]
            assert query is not None and key is not None
            scale = node.attributes["scale"].as_float() if "scale" in node.attributes else None
            products[_name(node.outputs[0])] = (_name(query), _name(key), scale)
    return products


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _write_recording(model: ir.Model, path: Path) -> Path:
    """Add outputs that tell the magnitude of each float value, and the queries and keys themselves."""
    nodes, angles = list(model.graph), waves(model)
    values = [value for node in nodes if node not in angles for value in node.outputs]
    whole = [value for node in nodes if node.op_type == "Attention" for value in node.inputs[:2]]
    outputs = [value for value in dict.fromkeys(whole) if value is not None and not value.is_graph_output()]
    for value in outputs:
        value.type = ir.TensorType(FLOAT)
    model.graph.outputs.extend(outputs)
    tell_largest(model, [value for value in values if value.dtype == FLOAT])
    ir.save(model, path)
    return path


def tell_largest(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Add outputs to a float32 graph that tell the magnitudes of values: their names begin with `MEASURED`."""
    first = model.graph[0]
    for value in values:
        size = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        # right behind it: the value itself need not outlive its use
        node = value.producer()
        if node is None:
            model.graph.insert_before(first, [size, largest])
        else:
            model.graph.insert_after(node, [size, largest])
        told = largest.outputs[0]
        told.name, told.type = f"{MEASURED}{value.name}", ir.TensorType(FLOAT)
        model.graph.outputs.append(told)


def waves(model: ir.Model) -> set[ir.Node]:
    """Return the sines and cosines, and every node that their arguments come from: they stay in float32."""
    found: set[ir.Node] = set()
    waiting = [node for node in model.graph if node.op_type in WAVES]
    while waiting:
        node = waiting.pop()
        found.add(node)
        before = (value.producer() for value in node.inputs if value is not None and value.dtype == FLOAT)
        waiting += [each for each in before if each is not None and each not in found]
    return found


def largest_logit(query: Array, key: Array, scale: float | None = None) -> float:
    """Return the largest magnitude of scale * query @ keyᵀ, both (batch, heads, tokens, width).

    scale: None for ONNX's own, 1 / sqrt(width)
    """
    columns = key.swapaxes(-1, -2) * np.float32(query.shape[-1] ** -0.5 if scale is None else scale)
    parts = (query[:, :, row : row + ROWS] for row in range(0, query.shape[2], ROWS))
    return float(max(np.abs(part @ columns).max() for part in parts))


def rounding_error(graph: Path, pairs: Sequence[Pair], *, component: str) -> float:
    """Return the largest relative difference from the pairs when each float16 node rounds its result.

    ONNX Runtime computes chains of float16 nodes in float32 on the CPU: what overflows on a GPU would pass there
    unseen. So every node is made a float32 one between explicit casts, which it keeps. Products then have float32
    sums, as on matrix units.

    Raises CheckpointError if a shape is not the recorded one.
    """
    model = load_typed(graph)
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Cast" and any(value.dtype == HALF for value in node.outputs):
            _widen_inputs(node, widened)
            _round_outputs(node)
    beside = graph.with_name("rounding.onnx")  # it shares the graph's weights
    try:
        ir.save(model, beside)
        # folding the casts of the weights would keep both
        found = run_in_pieces(beside, [inputs for inputs, _ in pairs], optimise=False)
        return max(compare(component, outputs, pair[1]) for outputs, pair in zip(found, pairs, strict=True))
    finally:
        beside.unlink(missing_ok=True)


def _widen_inputs(node: ir.Node, widened: dict[ir.Value, ir.Value]) -> None:
    assert node.graph is not None
    for place, value in enumerate(node.inputs):
        if value is None or value.dtype != HALF:
            continue
        if value not in widened:
            cast = ir.node("Cast", [value], {"to": int(FLOAT)})
            cast.outputs[0].type = ir.TensorType(FLOAT)
            node.graph.insert_before(node, cast)
            widened[value] = cast.outputs[0]
        node.replace_input_with(place, widened[value])


def _round_outputs(node: ir.Node) -> None:
    assert node.graph is not None
    for value in node.outputs:
        if value.dtype != HALF:
            continue
        rounded = ir.node("Cast", [None], {"to": int(HALF)})
        result = rounded.outputs[0]
        result.type, result.shape, result.name = ir.TensorType(HALF), value.shape, value.name
        value.type, value.name = ir.TensorType(FLOAT), f"{value.name} before rounding"
        value.replace_all_uses_with(result, replace_graph_outputs=True)
        rounded.replace_input_with(0, value)
        node.graph.insert_after(node, rounded)
