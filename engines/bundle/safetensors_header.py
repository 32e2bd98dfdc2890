"""Files of weights with no framework: which kind one is, and of safetensors the checked header and single tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentrt.engines.bundle.parsing import ParseError, decode
from latentrt.engines.errors import CheckpointError
from latentrt.engines.spec import Array

# Bytes of one element; the format's types that models are published in.
WIDTHS: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
POINTER = b"version https://git-lfs"  # what git leaves in place of a large file that was not fetched
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # what names of pickles end with
PICKLE_BEGINS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip; plain, by protocol

Format = Literal["safetensors", "pickle"]


def weights_format(path: Path) -> Format | None:
    """Return which kind of file this is by its content, and where that tells nothing by the name that was given.

    Where a link leads does not matter: in the hub's cache that is a file named for its hash.
    """
    with path.open("rb") as file:
        found = content_format(file.read(9))
    named: dict[str, Format] = {".safetensors": "safetensors", **dict.fromkeys(PICKLES, "pickle")}
    return found or named.get(path.suffix)


def content_format(first: bytes) -> Format | None:
    """Return which kind of file begins with these bytes, nine or more; None where that cannot be told."""
    # Before pickles, because a header of 640 bytes begins with what is a pickle's protocol 2.
    if 2 <= int.from_bytes(first[:8], "little") <= LONGEST_HEADER and first[8:9] == b"{":
        return "safetensors"
    return "pickle" if first.startswith(PICKLE_BEGINS) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file. `start` and `end` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """What a safetensors file says of itself."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def read_float32(self, name: str) -> Array:
        """Return one tensor as float32, whatever floating type it is stored in. Raises CheckpointError."""
        stored = self.tensors[name]
        kinds = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}
        if stored.dtype not in kinds:
            raise CheckpointError(f"{self.path}: '{name}' is {stored.dtype}, expected one of {', '.join(kinds)}")
        raw = np.fromfile(self.path, dtype=kinds[stored.dtype], count=stored.size, offset=stored.start)
        if stored.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(stored.shape)


def read_header(path: Path) -> TensorFile:
    """Read a file's header and check that it describes exactly this file. Raises CheckpointError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if (first + file.read(len(POINTER) - 8)).startswith(POINTER):
            raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
        if len(first) < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise _damaged(path)
        file.seek(8)
        text = file.read(length)
    try:
        document: Any = decode(text, strict=True)
        metadata = {str(key): str(value) for key, value in (document.pop("__metadata__", None) or {}).items()}
        tensors = {str(name): _stored(entry, 8 + length) for name, entry in document.items()}
    except (ParseError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path) from None
    if not _fills(tensors, 8 + length, size):
        raise _damaged(path)
    return TensorFile(path=path, tensors=tensors, metadata=metadata)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged; download it again")


def _stored(entry: Mapping[str, Any], base: int) -> StoredTensor:
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if any(type(side) is not int or side < 0 for side in (*shape, start, end)):
        raise ValueError("sizes are whole numbers from 0 up")
    if entry["dtype"] in WIDTHS and end - start != math.prod(shape) * WIDTHS[entry["dtype"]]:
        raise ValueError("a tensor's bytes are those of its shape")
    return StoredTensor(dtype=str(entry["dtype"]), shape=shape, start=base + start, end=base + end)


def _fills(tensors: Mapping[str, StoredTensor], begin: int, end: int) -> bool:
    """Say whether the tensors cover the rest of the file one after the other, as the format demands."""
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.end)):
        if stored.start != begin:
            return False
        begin = stored.end
    return begin == end
