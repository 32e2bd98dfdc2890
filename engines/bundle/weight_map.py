"""Where a checkpoint's weights lie in a graph or in a file: what it takes to change them without the checkpoint.

An export notes for each network which initializer of its graph holds which weight, in `weights/<component>.json`. A
build notes in which of its files each of them came to lie, and in which order of axes, in `<component>.weights.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import numpy as np

from latentrt.engines.bundle.files import inside
from latentrt.engines.bundle.parsing import ParseError, parse, read_document
from latentrt.engines.errors import BundleError
from latentrt.engines.spec import Array, Document

AS_NAMED, TRANSPOSED = "as named", "transposed"
# Convolutions that ONNX Runtime has laid out for vectors of so many channels, in the notation of oneDNN:
# (outputs / 16, inputs, height, width, 16) and (outputs / 16, inputs / 16, height, width, 16 inputs, 16 outputs).
BLOCKED = r"O(?P<inputs>[iI])hw(?:(\d+)i)?(?P<block>\d+)o"
# Vectors: as columns, which stand beside pictures, and with zeros up to a whole block of channels.
COLUMN, PADDED = "column", r"(?P<block>\d+)o"
CHANNELS_LAST = "ohwi"  # convolutions as CUDA's kernels read them: (outputs, height, width, inputs)
LAYOUTS = (
    AS_NAMED,
    TRANSPOSED,
    COLUMN,
    CHANNELS_LAST,
    "16o",
    "8o",
    "4o",
    "OIhw16i16o",
    "Oihw16o",
    "OIhw8i8o",
    "Oihw8o",
    "OIhw4i4o",
    "Oihw4o",
)


class GraphWeight(Document, frozen=True, kw_only=True):
    """Which initializer of a canonical graph holds a weight.

    shape: the weight's own, in the checkpoint
    layout: how the initializer's axes follow from the weight's, one of LAYOUTS
    exponent: the initializer holds the weight / 2^exponent, see `export/graphs/rescale.py`
    """

    initializer: str
    layout: str
    shape: tuple[int, ...]
    exponent: int = 0


class BuiltWeight(Document, frozen=True, kw_only=True):
    """Where a weight lies in what was built.

    initializer: its name there; shape, layout and exponent: as in `GraphWeight`
    stored: the shape as it is stored
    file, offset: in which file below the engines' directory, or below the bundle for what compiles its graphs, and how
        many bytes from its beginning
    """

    initializer: str
    layout: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    dtype: Literal["float32", "float16"]
    file: str
    offset: int
    exponent: int = 0

    def read(self, directory: Path) -> Array:
        """Map the weight as it is stored into memory. Raises BundleError if the file lies elsewhere."""
        return np.memmap(
            inside(directory, self.file), dtype=self.dtype, mode="r", offset=self.offset, shape=self.stored
        )


class GraphWeights(Document, frozen=True, kw_only=True):
    """The record that an export writes, by the checkpoint's names of weights."""

    weights: Mapping[str, GraphWeight]

    def held_at(self, exponents: Mapping[str, int]) -> GraphWeights:
        """Return the record of a graph whose initializers hold their weights / 2^exponent, those that are named."""
        weights = {
            name: msgspec.structs.replace(weight, exponent=exponents.get(weight.initializer, 0))
            for name, weight in self.weights.items()
        }
        return GraphWeights(weights=weights)


class BuiltWeights(Document, frozen=True, kw_only=True):
    """The record that a build writes, by the checkpoint's names of weights.

    others: further initializers, by their own names, which a compiler may ask for together with a weight
    """

    weights: Mapping[str, BuiltWeight]
    others: Mapping[str, BuiltWeight] = msgspec.field(default_factory=dict)


Record = TypeVar("Record", GraphWeights, BuiltWeights)


def graph_record(component: str) -> str:
    """Return the path of an export's record below the bundle."""
    return f"weights/{component}.json"


def built_record(component: str) -> str:
    """Return the name of a build's record beside its engines."""
    return f"{component}.weights.json"


def write_weights(path: Path, record: GraphWeights | BuiltWeights) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(msgspec.to_builtins(record)) + "\n", encoding="utf-8")


def read_weights(path: Path, kind: type[Record]) -> Record:
    """Read a record. Raises BundleError."""
    try:
        return parse(kind, read_document(path, strict=True))
    except ParseError as error:
        raise BundleError(f"{path} {error}; export the checkpoint again") from None


def arrange(weight: Array, layout: str) -> Array:
    """Return a weight in a layout. Channels that fill a block up are zeros.

    weight: (outputs, inputs, …), as the checkpoint has it
    """
    if layout == AS_NAMED:
        return weight
    if layout == TRANSPOSED:
        return np.ascontiguousarray(weight.T)
    if layout == COLUMN:
        return weight[:, None]
    if layout == CHANNELS_LAST:
        return np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
    if vector := re.fullmatch(PADDED, layout):
        return np.pad(weight, (0, -len(weight) % int(vector["block"])))
    found = re.fullmatch(BLOCKED, layout)
    assert found is not None, layout
    block = int(found["block"])
    outputs, inputs, height, width = weight.shape
    blocks = -(-outputs // block)
    padded = np.pad(weight, ((0, blocks * block - outputs), (0, 0), (0, 0), (0, 0)))
    if found["inputs"] == "i":
        axes = padded.reshape(blocks, block, inputs, height, width).transpose(0, 2, 3, 4, 1)
    else:
        axes = padded.reshape(blocks, block, inputs // block, block, height, width).transpose(0, 2, 4, 5, 3, 1)
    return np.ascontiguousarray(axes).reshape(blocks * block, inputs, height, width)


def restore(stored: Array, layout: str, shape: tuple[int, ...]) -> Array:
    """Return a weight of a shape from how it is stored: what `arrange` made of it."""
    if layout in (AS_NAMED, TRANSPOSED):
        return stored.T if layout == TRANSPOSED else stored
    if layout == CHANNELS_LAST:
        return stored.transpose(0, 3, 1, 2)
    if layout == COLUMN or re.fullmatch(PADDED, layout):
        return stored.reshape(-1)[: shape[0]]
    found = re.fullmatch(BLOCKED, layout)
    assert found is not None, layout
    block = int(found["block"])
    outputs, inputs, height, width = shape
    blocks = len(stored) // block
    if found["inputs"] == "i":
        axes = stored.reshape(blocks, inputs, height, width, block).transpose(0, 4, 1, 2, 3)
    else:
        axes = stored.reshape(blocks, inputs // block, height, width, block, block).transpose(0, 5, 1, 4, 2, 3)
    return axes.reshape(blocks * block, inputs, height, width)[:outputs]


def fits(layout: str, shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Tell whether a weight of a shape can lie in a layout as an array of another shape."""
    if layout == AS_NAMED:
        return shape == stored
    if layout == TRANSPOSED:
        return len(shape) == 2 and shape[::-1] == stored
    if layout == COLUMN:
        return len(shape) == 1 and stored == (*shape, 1)
    if layout == CHANNELS_LAST:
        return len(shape) == 4 and stored == (shape[0], *shape[2:], shape[1])
    if vector := re.fullmatch(PADDED, layout):
        return len(shape) == 1 and stored == (shape[0] + -shape[0] % int(vector["block"]),)
    found = re.fullmatch(BLOCKED, layout)
    assert found is not None, layout
    block = int(found["block"])
    if len(shape) != 4 or (found["inputs"] == "I" and shape[1] % block):
        return False
    return stored == (-(-shape[0] // block) * block, *shape[1:])
