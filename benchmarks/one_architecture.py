"""A CUDA library of ONNX Runtime with the code of one GPU architecture left: the rest is zeros, which pack to nothing.

Sizes and headers stay, so that the library loads as before and has nothing to run on other GPUs. ONNX Runtime's licence
(MIT) allows it; NVIDIA's own libraries must not be altered so.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = b"\x50\xed\x55\xba"  # of a fat binary: what nvcc packs the code of all architectures in
HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
ENTRY = struct.Struct("<HHIQIIHHI")  # kind, _, bytes of this header, bytes of the code, …, architecture
KINDS = frozenset({1, 2, 8, 16, 32, 64})
LARGEST_HEADER = 4096


class Code(NamedTuple):
    """Where the code of one architecture lies in a library: 90 for `sm_90`."""

    start: int
    size: int
    architecture: int


def keep_architecture(library: Path, architecture: int) -> tuple[int, int]:
    """Put zeros in place of the code of all other architectures. Returns how many bytes were kept, and zeroed.

    architecture: 90 for `sm_90`
    """
    kept = zeroed = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for code in codes(memory):
            if code.architecture == architecture:
                kept += code.size
            else:
                memory[code.start : code.start + code.size] = bytes(code.size)
                zeroed += code.size
    return kept, zeroed


def codes(memory: mmap.mmap | bytes) -> Iterator[Code]:
    """Give every piece of code in a library, of whatever architecture."""
    place = 0
    while (found := memory.find(MAGIC, place)) >= 0:
        place = found + len(MAGIC)
        if found + HEADER.size > len(memory):
            return
        _, version, header, size = HEADER.unpack_from(memory, found)
        start, end = found + header, found + header + size
        if version == 1 and header == HEADER.size and end <= len(memory):  # else these bytes mean something else
            for code in _entries(memory, start, end):
                place = end
                yield code


def _entries(memory: mmap.mmap | bytes, start: int, end: int) -> Iterator[Code]:
    while start + ENTRY.size <= end:
        kind, _, header, size, *_, architecture = ENTRY.unpack_from(memory, start)
        start += header
        if kind not in KINDS or not ENTRY.size <= header <= LARGEST_HEADER or start + size > end:
            return
        yield Code(start=start, size=size, architecture=architecture)
        start += size
