"""Ctrl-C during work in a foreign library: the work has ended before KeyboardInterrupt leaves, and nothing crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentrt.engines.errors import EngineError
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.compile import Cancelled, run_interruptibly


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Make SIGINT raise, as on a terminal: a shell starts its background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Work:
    """Work that asks every millisecond whether it is cancelled, and takes a while to stop once it is."""

    def __init__(self, stops_after_s: float) -> None:
        self.begun, self.ended = threading.Event(), False
        self.stops_after_s = stops_after_s

    def __call__(self, cancelled: Cancelled) -> None:
        self.begun.set()
        deadline = time.monotonic() + 20
        while not cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(self.stops_after_s)
        self.ended = True


def press_ctrl_c(work: Work, *, times: int, apart_s: float) -> threading.Thread:
    def press() -> None:
        work.begun.wait()
        for _ in range(times):
            time.sleep(apart_s)
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.parametrize("times", [1, 2, 5])
def test_an_interrupt_leaves_only_after_the_work_has_ended(times: int) -> None:
    work = Work(stops_after_s=0.3)
    presses = press_ctrl_c(work, times=times, apart_s=0.03)
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work)
    assert work.ended
    presses.join()


def test_what_the_work_returns_and_raises_is_handed_on() -> None:
    assert run_interruptibly(lambda cancelled: cancelled()) is False

    def fail(cancelled: Cancelled) -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        run_interruptibly(fail)


LONG = "--size 64x64,96x96,128x128 --batch 1,2,3,4 --compute-capability 8.9 --optimization-level 5"
CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from latentrt.__main__ import main
main()
"""


@pytest.mark.parametrize("wait_s", [0.0, 0.7, 1.4])
def test_an_interrupted_command_ends_in_order(demo_bundle: Path, wait_s: float) -> None:
    """Exit code 1 is click's for Ctrl-C; a compiler that outlived the interrupt ended the process by a signal."""
    try:
        trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", CHILD, "build", str(demo_bundle), "--backend", "tensorrt-rtx", *LONG.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        while "build unet" not in child.stderr.readline():
            assert child.poll() is None
        time.sleep(wait_s)
        os.kill(child.pid, signal.SIGINT)
        said = []
        for line in child.stderr:
            said.append(line)
            if "interrupted: waiting" in line and len(said) < 5:
                os.kill(child.pid, signal.SIGINT)  # the impatient one presses again
    assert child.returncode == 1, said
    assert said[-1] == "Aborted!\n" and not any("Traceback" in line for line in said)
    assert not [path.name for path in (demo_bundle / "engines").iterdir() if "tensorrt" in path.name]
