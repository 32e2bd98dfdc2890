"""The layer that makes writes fail: `faults.c` compiled, and a process with it loaded that runs commands."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from benchmarks.torture.writing.server import Ended, Run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
CACHE = "user-cache"  # of the commands and of who looks at what they left, below `Layer.folder`: never the user's own
BLOCK = struct.Struct("6q")  # as `struct block` in faults.c: armed, fail, error, stays, seen, failed


class Call(msgspec.Struct, frozen=True):
    """What a process did to a file, which is one of those that can fail: create, open, write, sync, rename, …"""

    number: int
    kind: str
    path: str


@functools.cache
def compiled() -> Path:
    """Compile the layer, once for each version of it. Raises RuntimeError where there is no C compiler."""
    source = HERE / "faults.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"latentrt-faults-{os.getuid()}-{digest}.so"
    if not library.is_file():
        beside = library.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(beside), str(source), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"faults.c could not be compiled: {error}") from error
        beside.replace(library)
    return library


class Layer:
    """A folder whose calls are counted and can fail, and a process that runs commands on it."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], block: mmap.mmap, log: Path) -> None:
        self.folder = folder
        self._process, self._block, self._log = process, block, log
        self._runs = 0

    def run(self, *words: str, fail: int = 0, error: int = 0, stays: bool = False) -> tuple[Ended, str, list[Call]]:
        """Run a command while its calls are counted; the `fail`-th one, from 1, fails with this errno.

        stays: all later calls that take room fail too
        Returns how it ended, what it said on stderr, and its calls.
        """
        self._log.write_text("")
        self._block[:] = BLOCK.pack(1, fail, error, stays, 0, 0)
        (ended,), (said,) = self.together((words, None))
        self._block[:] = bytes(BLOCK.size)
        lines = (line.split(" ", 2) for line in self._log.read_text(errors="replace").splitlines())
        calls = [Call(int(number), kind, str(Path(path).relative_to(self.folder))) for number, kind, path in lines]
        return ended, said, calls

    def together(self, *commands: tuple[tuple[str, ...], float | None]) -> tuple[list[Ended], list[str]]:
        """Run commands at once, nothing failing, each with the seconds after which it is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        outputs = [f"{self._log}-{number}" for number in range(len(commands))]
        for output in outputs:  # which a command that is killed at once does not open
            Path(f"{output}.err").write_bytes(b"")
        runs = [
            Run(words=words, output=output, kill_after_s=after)
            for (words, after), output in zip(commands, outputs, strict=True)
        ]
        self._process.stdin.write(msgspec.json.encode(runs).decode() + "\n")
        self._process.stdin.flush()
        ended = msgspec.json.decode(self._process.stdout.readline(), type=list[Ended])
        return ended, [Path(f"{output}.err").read_text(errors="replace") for output in outputs]


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Let this process look for engines in a cache of its own until the block ends, as the commands do."""
    before = os.environ.get("LATENTRT_CACHE")
    os.environ["LATENTRT_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["LATENTRT_CACHE"]
        if before is not None:
            os.environ["LATENTRT_CACHE"] = before


@contextlib.contextmanager
def layer(work: Path, *, with_torch: bool) -> Iterator[Layer]:
    """Start the process that runs commands, with the layer loaded; end it after the block.

    work: a folder for it; commands work below `layer.folder`
    with_torch: it exports too
    """
    folder, block, log = work / "under", work / "block", work / "log"
    shutil.rmtree(folder, ignore_errors=True)  # what a run that was stopped left
    folder.mkdir(parents=True)
    block.write_bytes(bytes(BLOCK.size))
    environment = {
        "LD_PRELOAD": str(compiled()),
        "TORTURE_ROOT": f"{folder}/",
        "TORTURE_BLOCK": str(block),
        "TORTURE_LOG": str(log),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    with block.open("r+b") as file, mmap.mmap(file.fileno(), BLOCK.size) as shared, own_cache(folder / CACHE):
        command = [sys.executable, "-m", "benchmarks.torture.writing.server", "torch" if with_torch else "plain"]
        process = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the process that runs commands did not start")
            yield Layer(folder, process, shared, log)
        finally:
            process.kill()
            process.communicate()
