"""8 bits between a Q and a DQ node: their scales from the largest magnitudes that were met, and where they stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from latentrt.engines.spec import Array, Quantised
from latentrt.export.graphs.types import FLOAT, HALF, read_once
from latentrt.export.quantisation.levels import operands

LEAST_SCALE = 2.0**-20  # float16 holds it; what never had a magnitude needs one too
FLOATS: Mapping[ir.DataType, type[np.floating]] = {FLOAT: np.float32, HALF: np.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A kind of 8 bits.

    largest: number that it holds; channels: whether each output channel of a weight has a scale of its own, which
    floats, whose precision is the same at every magnitude, do without
    """

    largest: float
    dtype: ir.DataType
    numbers: np.dtype
    channels: bool

    def quantise(self, array: Array, scale: Array) -> Array:
        """Return numbers in these 8 bits, the nearest ones, as ONNX rounds."""
        scaled = np.clip(array / scale, -self.largest, self.largest)
        return (np.round(scaled) if self.dtype == ir.DataType.INT8 else scaled).astype(self.numbers)


SCHEMES: Mapping[Quantised, Scheme] = {
    "fp8": Scheme(
        largest=448.0,
        dtype=ir.DataType.FLOAT8E4M3FN,
        numbers=np.dtype(ml_dtypes.float8_e4m3fn),
        channels=False,
    ),
    "int8": Scheme(largest=127.0, dtype=ir.DataType.INT8, numbers=np.dtype(np.int8), channels=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What numbers are divided by: one number, or one for each place of an axis. It is exact in float16."""

    numbers: Array
    axis: int | None = None

    def over(self, rank: int) -> Array:
        """Return it in float32, in a shape that divides an array of so many axes."""
        wide = self.numbers.astype(np.float32)
        return wide if self.axis is None else wide.reshape([-1 if n == self.axis else 1 for n in range(rank)])


def find_scales(
    model: ir.Model, names: Collection[str], largest: Mapping[str, float], scheme: Scheme
) -> dict[str, Scale]:
    """Return the scale of each operand of some nodes, by its name.

    largest: the largest magnitude of each operand that is not a weight
    """
    scales: dict[str, Scale] = {}
    for node in model.graph:
        for value in operands(node) if node.name in names else ():
            assert value.name is not None
            if value.name not in scales:
                scales[value.name] = (
                    _scale_of_weight(node, value, scheme)
                    if value.is_initializer()
                    else Scale(numbers=_rounded(np.array(largest[value.name]), scheme))
                )
    return scales


def _scale_of_weight(node: ir.Node, weight: ir.Value, scheme: Scheme) -> Scale:
    assert weight.const_value is not None
    magnitudes = np.abs(read_once(weight.const_value).astype(np.float32))
    if not scheme.channels:
        return Scale(numbers=_rounded(magnitudes.max(), scheme))
    axis = 0 if node.op_type == "Conv" or _transposed(node) else magnitudes.ndim - 1
    others = tuple(n for n in range(magnitudes.ndim) if n != axis)
    return Scale(numbers=_rounded(magnitudes.max(axis=others), scheme), axis=axis)


def _transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and "transB" in node.attributes and bool(node.attributes["transB"].as_int())


def _rounded(largest: Array, scheme: Scheme) -> Array:
    return np.maximum(largest / scheme.largest, LEAST_SCALE).astype(np.float16)


def insert_scales(
    model: ir.Model, names: Collection[str], scales: Mapping[str, Scale], scheme: Scheme, *, stored: bool
) -> None:
    """Put every operand of some nodes through 8 bits, in place: what is computed passes Q and DQ.

    The graph is a float16 or a float32 one, whose types are known; its scales are of its own type.
    stored: whether weights lie in the graph in 8 bits; else they pass Q and DQ too, and stay the files that they are
    """
    made = _Passed(model, scales, scheme, stored=stored)
    for node in list(model.graph):
        if node.name in names:
            for place, value in enumerate(operands(node)):
                node.replace_input_with(place, made.get(value, node))
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


class _Passed:
    """Values as they are after 8 bits, each made once, before its first user."""

    def __init__(self, model: ir.Model, scales: Mapping[str, Scale], scheme: Scheme, *, stored: bool) -> None:
        self._graph, self._scales, self._scheme, self._stores = model.graph, scales, scheme, stored
        self._made: dict[ir.Value, ir.Value] = {}

    def get(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """Return a value as it is after 8 bits."""
        if value not in self._made:
            assert value.name is not None and value.dtype is not None
            scale = self._scales[value.name]
            further = self._constants(value.name, scale, value.dtype)
            axis = {} if scale.axis is None else {"axis": scale.axis}
            if value.is_initializer() and self._stores:
                eight = self._stored(value, scale)
            else:
                eight = self._node("QuantizeLinear", [value, *further], axis, value, self._scheme.dtype, user)
            self._made[value] = self._node("DequantizeLinear", [eight, *further], axis, value, value.dtype, user)
        return self._made[value]

    def _node(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int],
        value: ir.Value,
        dtype: ir.DataType,
        user: ir.Node,
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"{value.name}/{operator}")
        result = node.outputs[0]
        result.name, result.type, result.shape = f"{value.name}.{operator}", ir.TensorType(dtype), value.shape
        self._graph.insert_before(user, node)
        return result

    def _stored(self, weight: ir.Value, scale: Scale) -> ir.Value:
        tensor, scheme = weight.const_value, self._scheme
        assert tensor is not None and weight.shape is not None
        divisor = scale.over(len(weight.shape))

        def numbers() -> ir.Tensor[Any]:  # when it is written: all of them at once would be another copy
            return ir.Tensor(scheme.quantise(read_once(tensor).astype(np.float32), divisor), dtype=scheme.dtype)

        name = f"{weight.name}.{scheme.dtype.name.lower()}"
        shape = ir.Shape(tensor.shape.numpy())
        return self._register(ir.LazyTensor(numbers, dtype=scheme.dtype, shape=shape, name=name))

    def _constants(self, name: str, scale: Scale, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        numbers = scale.numbers.astype(FLOATS[dtype])
        zeros = np.zeros(scale.numbers.shape, self._scheme.numbers)
        return (
            self._register(ir.Tensor(numbers, name=f"{name}.scale")),
            self._register(ir.Tensor(zeros, dtype=self._scheme.dtype, name=f"{name}.zero")),
        )

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self._graph.register_initializer(value)
        return value
