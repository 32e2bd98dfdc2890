"""Files of weights without a framework: which kind one is, and of safetensors the checked header and single tensors."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from latentrt.engines.errors import CheckpointError
from latentrt.engines.spec import Array

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
POINTER = b"version https://git-lfs"  # what git leaves in place of a large file that was not fetched
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # what names of pickles end with
PICKLE_BEGINS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip; plain, by protocol

Format = Literal["safetensors", "pickle"]


def weights_format(path: Path) -> Format | None:
    """Return which kind of file this is by its content, and where that tells nothing by the name that was given.

    Where a link leads does not matter: in the hub's cache that is a file named for its hash. Raises CheckpointError.
    """
    with _readable(path), path.open("rb") as file:
        found = content_format(file.read(9))
    named: dict[str, Format] = {".safetensors": "safetensors", **dict.fromkeys(PICKLES, "pickle")}
    return found or named.get(path.suffix)


def content_format(first: bytes) -> Format | None:
    """Return which kind of file begins with these bytes, nine or more; None if that cannot be told."""
    # Before pickles, because a header of 640 bytes begins with what is a pickle's protocol 2.
    if 2 <= int.from_bytes(first[:8], "little") <= LONGEST_HEADER and first[8:9] == b"{":
        return "safetensors"
    return "pickle" if first.startswith(PICKLE_BEGINS) else None


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a file. `start` and `end` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class TensorFile(msgspec.Struct, frozen=True, kw_only=True):
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
        with _readable(self.path):
            raw = np.fromfile(self.path, dtype=kinds[stored.dtype], count=stored.size, offset=stored.start)
        if stored.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(stored.shape)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); see to the file, or name another") from None


def read_header(path: Path) -> TensorFile:
    """Read a file's header; safetensors checks that it describes exactly this file. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    with _readable(path), path.open("rb") as file:
        first = file.read(len(POINTER))
    if first.startswith(POINTER):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`")
    try:
        with safe_open(path, framework="numpy") as opened:
            views = {name: opened.get_slice(name) for name in opened.offset_keys()}
            kinds = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, UnicodeError):
        raise CheckpointError(f"{path} is truncated or damaged; download it again") from None
    return TensorFile(path=path, tensors=_placed(kinds, 8 + int.from_bytes(first[:8], "little")), metadata=metadata)


def _placed(kinds: Mapping[str, tuple[str, tuple[int, ...]]], begin: int) -> dict[str, StoredTensor]:
    """Say where tensors lie, which safetensors does not tell: one after the other from `begin` on, without a gap.

    kinds: in the order of the file
    """
    placed = {}
    for name, (dtype, shape) in kinds.items():
        end = begin + math.prod(shape) * bits(dtype) // 8
        placed[name] = StoredTensor(dtype=dtype, shape=shape, start=begin, end=end)
        begin = end
    return placed


@functools.cache
def bits(dtype: str) -> int:
    """Return how many bits an element of one of the format's types takes, which is the first number in its name."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8  # BOOL
