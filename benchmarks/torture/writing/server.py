"""Runs commands of latentrt in forks of one process that has imported everything: a command starts in milliseconds.

Run by `layer.Layer`, with faults.c loaded into it. A line of JSON says what is to run, a line answers how it ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
from benchmarks.torture.watch import Watch


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One command.

    words: the arguments of `latentrt`, or `call`, the name of a function (`module:function`) and its arguments
    output: a path; what is printed goes to `PATH.out` and `PATH.err`
    kill_after_s: after which the command gets SIGKILL
    """

    words: tuple[str, ...]
    output: str
    kill_after_s: float | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended: its exit code, negative for a signal."""

    code: int
    seconds: float


class Forked:
    """The export's worker as a fork of this process, in place of the `Popen` that starts one: torch is here already."""

    def __init__(self, command: list[str], *, stderr: IO[bytes], **_: object) -> None:
        read_jobs, write_jobs = os.pipe()
        read_answers, write_answers = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            for old, new in ((read_jobs, 0), (write_answers, 1), (stderr.fileno(), 2)):
                os.dup2(old, new)
            os.closerange(3, 256)  # a process that is started holds none of its parent's locks
            _exit_after(lambda: _work(command))
        os.close(read_jobs)
        os.close(write_answers)
        self.stdin, self.stdout = os.fdopen(write_jobs, "w"), os.fdopen(read_answers)

    def kill(self) -> None:
        """End it, and what it has forked itself."""
        os.kill(self._child, signal.SIGKILL)

    def communicate(self) -> None:
        """Wait for its end."""
        os.waitpid(self._child, 0)
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _work(command: list[str]) -> None:
    from latentrt.export.work import worker

    sys.stdin = os.fdopen(0)
    worker.main(command[-2], float(command[-1]))


def _exit_after(work: Callable[[], object]) -> None:
    """Do something in a fork, and end as a process that was started would."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def prepare(with_torch: bool) -> None:
    """Import all that commands would import, on one thread."""
    from latentrt.__main__ import COMMANDS
    from latentrt.export.work import worker

    names = [module for module, _, _ in COMMANDS.values()]
    for name in [*names, "onnxruntime", "latentrt.runtime.pipeline", *(worker.PRELOAD["torch"] if with_torch else ())]:
        importlib.import_module(name)
    if with_torch:
        worker.subprocess.Popen = Forked  # type: ignore[attr-defined]


def command(words: tuple[str, ...]) -> None:
    """Run a command of latentrt, or call a function by its name."""
    if words[0] == "call":
        from latentrt.engines.errors import LatentrtError

        module, _, name = words[1].partition(":")
        try:
            getattr(importlib.import_module(module), name)(*words[2:])
        except LatentrtError as error:
            print(f"latentrt: {error}", file=sys.stderr)
            sys.exit(2)
        return
    from latentrt.__main__ import main

    sys.argv = ["latentrt", *words]
    main()


def start(run: Run) -> int:
    """Fork a process that runs a command. Return its id."""
    child = os.fork()
    if child == 0:
        for handle, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{run.output}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), handle)
        _exit_after(lambda: command(run.words))
    return child


def wait(child: int, run: Run, began: float) -> Ended:
    """Wait for a command's end, and see to it: at its time, or when it is stuck."""
    handle, watch = os.pidfd_open(child), Watch()
    try:
        if run.kill_after_s is not None:
            if not select.select([handle], [], [], max(0.0, began + run.kill_after_s - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
        else:
            while not select.select([handle], [], [], 1.0)[0]:
                if watch.stuck():
                    os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(handle)
    return Ended(code=os.waitstatus_to_exitcode(status), seconds=time.monotonic() - began)


def serve(ask: IO[str], answer: IO[str]) -> None:
    """Run what each line lists, all of it at once, and answer when all has ended."""
    for line in ask:
        runs = msgspec.json.decode(line, type=list[Run])
        began = time.monotonic()
        children = [start(run) for run in runs]
        ends = sorted(
            zip(children, runs, strict=True),
            key=lambda pair: math.inf if pair[1].kill_after_s is None else pair[1].kill_after_s,
        )
        ended: dict[int, Any] = {child: wait(child, run, began) for child, run in ends}
        answer.write(json.dumps([msgspec.to_builtins(ended[child]) for child in children]) + "\n")
        answer.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare(with_torch=sys.argv[1] == "torch")
    print("ready", file=answers, flush=True)
    jobs = Path("/dev/stdin").open(encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    serve(jobs, answers)
