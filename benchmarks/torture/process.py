"""Processes that fork, end, or are told to end while they draw: each a program of its own that must end in order."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from benchmarks.torture.sources import sources
from benchmarks.torture.watch import end_of
from benchmarks.torture.writing.layer import ROOT

BEGIN = """
import os, signal, sys, threading, time
import numpy as np
from latentrt import Pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have left ignored
ASKED = dict(prompt="a red circle", steps=2, seed=1, size=(64, 64))
LONG = ASKED | dict(steps=900)
pipe = Pipeline.load(sys.argv[1], "cpu", threads=2)
right = pipe(**ASKED).pixels
begun = threading.Event()

def at_work(step):
    begun.set()
    if step.stage == 800:  # whoever comes late on a busy machine finds it still at work
        threading.Event().wait()

def draw_long():
    pipe(**LONG, on_step=at_work)

def in_thread(work, **options):
    thread = threading.Thread(target=work, **options)
    thread.start()
    begun.wait()
    return thread

def child(work):
    process = os.fork()
    if process == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0

def draws():
    assert np.array_equal(pipe(**ASKED).pixels, right)
"""
# name: (what it does, its exit code); a program that says a word of a traceback or dies by a signal fails
PROGRAMS: dict[str, tuple[str, int]] = {
    "ends with a pipeline open": ("", 0),
    "ends after it was closed": ("pipe.close()", 0),
    "ends while a thread of its own draws": ("in_thread(draw_long, daemon=True)", 0),
    "os._exit while a thread draws": ("in_thread(draw_long, daemon=True); os._exit(3)", 3),
    "sys.exit from a step": ("pipe(**LONG, on_step=lambda step: sys.exit(4))", 4),
    "Ctrl-C while it draws, and draws again": (
        "threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGINT))).start()\n"
        "try:\n    draw_long()\nexcept KeyboardInterrupt:\n    draws()\nelse:\n    sys.exit('it drew to the end')",
        0,
    ),
    "an error in a step, and draws again": (
        "try:\n    pipe(**LONG, on_step=lambda step: 1 / 0)\n"
        "except ZeroDivisionError:\n    draws()\nelse:\n    sys.exit(1)",
        0,
    ),
    "closes while a thread draws": (
        "LONG |= dict(steps=60)\nthread = in_thread(draw_long)\npipe.close()\nthread.join()",
        0,
    ),
    "forks, and the child draws": ("child(draws)\ndraws()", 0),
    "forks while a thread draws, and the child loads and draws": (
        "in_thread(draw_long, daemon=True)\n"
        "def anew():\n"
        "    other = Pipeline.load(sys.argv[1], 'cpu', threads=1)\n"
        "    assert np.array_equal(other(**ASKED).pixels, right)\n"
        "child(anew)",
        0,
    ),
    "forks while a thread draws, and the child uses that pipeline": (
        "from latentrt.errors import LatentrtError\n"
        "in_thread(draw_long, daemon=True)\n"
        "def same():\n"
        "    try:\n        draws()\n        sys.exit(1)\n    except LatentrtError:\n        pipe.close()\n"
        "child(same)",
        0,
    ),
    "ends with a batcher at work": (
        "from latentrt import Batcher, BatcherOptions, Request\n"
        "batcher = Batcher(pipe, BatcherOptions(slots=2))\n"
        "batcher.submit(Request(**LONG))\n"
        "time.sleep(0.2)",
        0,
    ),
    "forks with a batcher at work, and the child ends": (
        "from latentrt import Batcher, BatcherOptions, Request\n"
        "batcher = Batcher(pipe, BatcherOptions(slots=2))\n"
        "future, = batcher.submit(Request(**ASKED | dict(steps=50)))\n"
        "def refused():\n"
        "    from latentrt.errors import ClosedError\n"
        "    try:\n        batcher.submit(Request(**ASKED))\n        sys.exit(1)\n"
        "    except ClosedError:\n        batcher.close()\n"
        "child(refused)\n"
        "future.result()\nbatcher.close()",
        0,
    ),
    "an exception at the end of the program while a thread draws": (
        "in_thread(draw_long, daemon=True)\nraise SystemExit(5)",
        5,
    ),
}


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A program that did not end as it must."""

    program: str
    what: str
    said: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How programs ended. programs: the seconds that each took"""

    counts: dict[str, int]
    programs: dict[str, float]
    found: list[Found]


def try_program(name: str, bundle: Path) -> tuple[float, str | None, str]:
    """Run one program. Return its seconds, what is wrong with its end, and what it said."""
    body, expected = PROGRAMS[name]
    command = [sys.executable, "-X", "faulthandler", "-c", BEGIN + body, str(bundle)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    start = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as program:
        printed = end_of(program)
    if printed is None:
        return time.monotonic() - start, "it hangs", ""
    said = printed[1] + printed[0]
    wrong = None
    if program.returncode != expected:
        wrong = f"exit code {program.returncode}, expected {expected}"
    elif any(word in said for word in ("Traceback", "Fatal Python error", "terminate called", "Exception ignored")):
        wrong = "its last words"
    return time.monotonic() - start, wrong, said


def run(work: Path, *, seed: int, seconds: float, short: bool) -> Result:
    """Run every program, as far as the time goes."""
    del seed, short
    bundle, end = sources(work / "sources").bundle, time.monotonic() + seconds
    programs, found = dict[str, float](), list[Found]()
    for name in PROGRAMS:
        if time.monotonic() > end:
            break
        took, wrong, said = try_program(name, bundle)
        programs[name] = round(took, 2)
        if wrong is not None:
            found.append(Found(program=name, what=wrong, said=said[-3000:]))
    return Result(counts={"programs": len(PROGRAMS), "tried": len(programs)}, programs=programs, found=found)
