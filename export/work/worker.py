"""A process that does components' work, each phase in a fork of its own.

The command line's own process never imports torch; this one imports it once; each fork gives all its memory back when
it ends, and its peak is that of one phase. It computes nothing itself, so that no library's threads run when it forks.

A phase may take an hour on a busy machine: as long as it computes it is slow, and when it does not it hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from latentrt.engines.bundle.parsing import parse
from latentrt.engines.errors import BundleError, CheckpointError, LatentrtError
from latentrt.export.work.finished import Finished
from latentrt.export.work.jobs import ExportJob, run_job

ERRORS: dict[str, type[LatentrtError]] = {"CheckpointError": CheckpointError, "BundleError": BundleError}
PRELOAD = {
    "torch": (
        "torch",
        "onnx",
        "onnx_ir",
        "latentrt.export.networks.loading",
        # What each stage would import again for seconds. What tracing needs is not here: most graphs are kept.
        "diffusers.models.adapter",
        "diffusers.models.autoencoders",
        "diffusers.models.controlnets",
        "diffusers.models.unets.unet_2d_condition",
        "transformers.models.clip.modeling_clip",
        "accelerate",
    ),
    "onnx": ("onnx",),
}
PR_SET_PDEATHSIG = 1
# A phase whose process has used no processor time for this long is ended. Slow ones use some, however busy the
# machine: at a load of 10 on two processors an export took five times as long and hung nowhere.
PATIENCE_S = 300.0
IDLE_S = 0.05  # less than this is none: the kernel counts in hundredths


class Worker:
    """The parent's end. `run` does one job; use it in a `with` block.

    Requests and answers are numbered. A request that is given up (Ctrl-C, a time limit of a caller's) ends the
    process, and whatever it still answers is dropped.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self._number = 0

    def run(self, job: ExportJob) -> Finished:
        """Have one component done. Raises CheckpointError and BundleError as the work did, RuntimeError for bugs."""
        *first, last = job.phases
        for phase in first:
            self._ask(dataclasses.replace(job, phase=phase))
        return self._ask(dataclasses.replace(job, phase=last))

    def _ask(self, job: ExportJob) -> Finished:
        start = time.monotonic()
        try:
            answer = self._exchange(job)
        except BaseException as error:
            self._process.kill()
            error.add_note(f"{_waited(job, time.monotonic() - start)}\n{self._tail()}")
            raise
        if "kind" not in answer:
            return parse(Finished, answer)
        raise self._error(job, answer["kind"], answer["message"])

    def _exchange(self, job: ExportJob) -> dict[str, Any]:
        """Send a job and return its own answer: one to a request before, which was given up, is passed over."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._number += 1
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([self._number, msgspec.to_builtins(job)]) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                number, answer = json.loads(line)
                if number == self._number:
                    return dict(answer)
        return {"kind": "RuntimeError", "message": "the export process ended"}

    def _error(self, job: ExportJob, kind: str, message: str) -> Exception:
        if kind in ERRORS:
            return ERRORS[kind](message)
        if kind == "MemoryError":
            return CheckpointError(
                f"{job.component}: the export process was killed, most likely for want of memory; "
                "free some and run the command again: it resumes"
            )
        return RuntimeError(f"exporting {job.component} failed: {message}\n{self._tail()}")

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]


def _waited(job: ExportJob, seconds: float) -> str:
    load = f"the machine's load is {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    return f"gave up waiting for the export process after {seconds:.0f} s ({job.component}, {job.phase}); {load}"


@contextlib.contextmanager
def start_worker(source: str, *, patience_s: float = PATIENCE_S) -> Iterator[Worker]:
    """Start the process for a kind of checkpoint and end it after the block.

    patience_s: how long a phase may go without computing before it counts as hanging
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "latentrt.export.work.worker", source, str(patience_s)],
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


def main(source: str, patience_s: float) -> None:
    """Read one job a line, answer one line each."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    for module in PRELOAD[source]:
        importlib.import_module(module)
    for line in sys.stdin:
        number, job = json.loads(line)
        answers.write(json.dumps([number, _in_fork(job, patience_s)]) + "\n")
        answers.flush()


def _in_fork(job: dict[str, Any], patience_s: float) -> dict[str, Any]:
    """Do one job in a child process and return its answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _die_with_parent()
        faulthandler.register(signal.SIGUSR1)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(_answer(job)))
        os._exit(0)  # no destructors: the memory goes at once
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        hung = not _watch(pipe, child, patience_s)
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if hung:
        return {"kind": "RuntimeError", "message": f"it hangs: it has computed nothing for {patience_s:.0f} s"}
    if text:
        answer: dict[str, Any] = json.loads(text)
        return answer
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"kind": "MemoryError" if killed else "RuntimeError", "message": f"wait status {status}"}


def _watch(pipe: IO[bytes], child: int, patience_s: float) -> bool:
    """Wait until a child answers or ends. Kill one that hangs, its stack in the log, and return False."""
    before = _processor_s(child)
    while not select.select([pipe], [], [], patience_s)[0]:
        now = _processor_s(child)
        if now is not None and before is not None and now - before < IDLE_S:
            os.kill(child, signal.SIGUSR1)
            select.select([pipe], [], [], 1.0)  # until it has written its stack
            os.kill(child, signal.SIGKILL)
            return False
        before = now
    return True


def _processor_s(process: int) -> float | None:
    """Return the time of processors that a process has used, None if the system does not tell."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    user, system = stat.rpartition(")")[2].split()[11:13]  # the fields 14 and 15 of proc(5); the second is a name
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = msgspec.to_builtins(run_job(parse(ExportJob, job)))
        return answer
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
    main(sys.argv[1], float(sys.argv[2]))
