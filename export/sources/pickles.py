"""Weights in pickles, opened only where that was allowed, and then only as weights: nothing else in them is run.

No process that does anything else opens one: `export/work/unpickling.py` does, confined, and gives a safetensors file.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from latentrt.engines.bundle.safetensors_header import LONGEST_HEADER, StoredTensor, TensorFile
from latentrt.engines.errors import CheckpointError
from latentrt.export.work import unpickling

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_ALL")  # of the environment: no keys, no home
COPIED_AT_ONCE = 1 << 20  # bytes


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_pickle_header(path: Path) -> TensorFile:
    """Return the names, types and shapes in a pickle, and their places in safetensors. Raises CheckpointError."""
    with _opened(path) as process:
        head = _head(path, process)
    begin = 8 + len(head)
    tensors = {
        key: StoredTensor(
            dtype=row.dtype, shape=row.shape, start=begin + row.data_offsets[0], end=begin + row.data_offsets[1]
        )
        for key, row in msgspec.json.decode(head, type=dict[str, _Row]).items()
    }
    return TensorFile(path=path, tensors=tensors, metadata={})


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, mapped from a temporary file that has no name. Raises CheckpointError."""
    from safetensors import safe_open

    with tempfile.TemporaryFile() as file, _opened(path) as process:
        head = _head(path, process)
        _copy(path, head, _output(process), file)
        if process.wait():
            raise _refusal(path, process)
        with safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process of its own open a pickle; it ends with the block."""
    command = [sys.executable, "-P", "-m", unpickling.__name__, str(path.absolute())]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL  # pipes, because no file of the process may grow
    with subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe, env=kept) as process:
        try:
            yield process
        finally:
            process.kill()


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _head(path: Path, process: subprocess.Popen[bytes]) -> bytes:
    """Read what the process could not be kept from, and say so; then the header. Raises CheckpointError."""
    stream = _output(process)
    for part in json.loads(stream.readline() or b"[]"):
        _log.warning("this system cannot keep %s from what opens %s; convert it to safetensors instead", part, path)
    length = int.from_bytes(stream.read(8), "little")
    head = stream.read(min(length, LONGEST_HEADER))
    if not head or len(head) != length:
        process.wait()
        raise _refusal(path, process)
    return head


def _copy(path: Path, head: bytes, stream: IO[bytes], file: IO[bytes]) -> None:
    try:
        file.write(len(head).to_bytes(8, "little") + head)
        shutil.copyfileobj(stream, file, COPIED_AT_ONCE)
        file.flush()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written as safetensors to {tempfile.gettempdir()} ({error.strerror}); "
            "make room there, or set TMPDIR to a folder that has more"
        ) from None


def _refusal(path: Path, process: subprocess.Popen[bytes]) -> Exception:
    """Return why there are no tensors; what is wrong with Python or torch is no fault of the pickle."""
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode == 1:
        return RuntimeError(f"opening {path} failed:\n{said[-4000:]}")
    reason = said.splitlines()[-1] if process.returncode == 2 and said else f"the process ended: {process.returncode}"
    return CheckpointError(
        f"{path} cannot be opened as weights alone ({reason}); convert it to safetensors with a tool that you trust"
    )
