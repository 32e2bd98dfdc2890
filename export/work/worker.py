"""A process that does components' work, each stage in a fork of its own.

The command line's own process never imports torch; this one imports it once; each fork gives all its memory back when
it ends, and its peak is that of one stage.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import IO, Any

from latentrt.engines.bundle.parsing import parse
from latentrt.engines.errors import BundleError, CheckpointError, LatentrtError
from latentrt.export.work.jobs import Finished, Job, run_job

ERRORS: dict[str, type[LatentrtError]] = {"CheckpointError": CheckpointError, "BundleError": BundleError}
PRELOAD = {
    "torch": ("torch", "onnx", "onnx_ir", "diffusers", "transformers", "latentrt.export.networks.modules"),
    "onnx": ("onnx",),
}
PR_SET_PDEATHSIG = 1


class Worker:
    """The parent's end. `run` does one job; use it in a `with` block."""

    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._process = process
        self._log = log

    def run(self, job: Job) -> Finished:
        """Have one component done. Raises CheckpointError and BundleError as the work did, RuntimeError for bugs."""
        *first, last = job.stages
        for stage in first:
            self._ask(dataclasses.replace(job, stage=stage))
        return self._ask(dataclasses.replace(job, stage=last))

    def _ask(self, job: Job) -> Finished:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"kind": "RuntimeError", "message": "the export process ended"}
        if "kind" not in answer:
            return parse(Finished, answer)
        raise self._error(job, answer["kind"], answer["message"])

    def _error(self, job: Job, kind: str, message: str) -> Exception:
        if kind in ERRORS:
            return ERRORS[kind](message)
        if kind == "MemoryError":
            return CheckpointError(
                f"{job.component}: the export process was killed, most likely for want of memory; "
                "free some and run the command again: it resumes"
            )
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace")[-4000:]
        return RuntimeError(f"exporting {job.component} failed: {message}\n{tail}")


@contextlib.contextmanager
def start_worker(source: str) -> Iterator[Worker]:
    """Start the process for a kind of checkpoint and end it after the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "latentrt.export.work.worker", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Worker(process, log)
        finally:
            process.kill()  # it holds nothing: each answer stands for files that are on the disk
            process.communicate()


def main(source: str) -> None:
    """Read one job a line, answer one line each."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    for module in PRELOAD[source]:
        importlib.import_module(module)
    for line in sys.stdin:
        answers.write(json.dumps(_in_fork(line)) + "\n")
        answers.flush()


def _in_fork(line: str) -> dict[str, Any]:
    """Do one job in a child process and return its answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _die_with_parent()
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(_answer(line)))
        os._exit(0)  # no destructors: the memory goes at once
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        answer: dict[str, Any] = json.loads(text)
        return answer
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"kind": "MemoryError" if killed else "RuntimeError", "message": f"wait status {status}"}


def _answer(line: str) -> dict[str, Any]:
    try:
        return dataclasses.asdict(run_job(parse(Job, json.loads(line))))
    except LatentrtError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"kind": "RuntimeError", "message": f"{type(error).__name__}: {error}"}


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a killed export leaves nothing running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
