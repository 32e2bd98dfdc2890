"""A GPU and TensorRT that fail: each call once, in each way, on the tests' stand-in for both.

Nothing here ran on a GPU: what a GPU itself does with these errors is in tests/test_cuda_contract.py, which needs one.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from benchmarks.torture.sources import sources
from tests.host_device import HostDevice
from tests.stand_in import install

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import DeviceLostError, EngineError, LatentrtError, OutOfMemoryError
from latentrt.runtime.pipeline import Pipeline

SIZE = (32, 32)
OPTIONS = BuildOptions(sizes=(SIZE,), batches=(1,), tokens=(77,), references=False)
DRAWN: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "seed": 3, "size": SIZE, "sampler": "euler"}
STICKY = "cudaEventQuery: cudaErrorIllegalAddress (an illegal memory access was encountered)"
CALLS = (
    "allocate",
    "allocate_pinned",
    "copy_in",
    "copy_out",
    "copy",
    "zero",
    "create_stream",
    "synchronize",
    "begin_capture",
    "end_capture",
    "launch",
    "create_event",
    "record",
    "wait",
)
TENSORRT = (
    "deserialize_cuda_engine",
    "create_execution_context",
    "set_optimization_profile_async",
    "set_input_shape",
    "infer_shapes",
    "set_tensor_address",
    "execute_async_v3",
    "execute_async_v3 in capture",
)
WAYS = ("memory", "error", "sticky", "forked")
EXPECTED: dict[str, type[EngineError]] = {
    "memory": OutOfMemoryError,
    "error": EngineError,
    "sticky": DeviceLostError,
    "forked": DeviceLostError,
    "refused": EngineError,
    "silent": EngineError,
}


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What should not have come of a failure."""

    call: str
    number: int
    way: str
    what: str


class Row(msgspec.Struct, kw_only=True):
    """What comes of one way in which calls fail.

    kind: the error that the caller sees; next_works: the same call right after draws the right picture
    restart: the process must be restarted
    """

    way: str
    failed: int = 0
    passed: int = 0
    kinds: dict[str, int] = {}
    next_works: int = 0
    restart: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all failures, by the way in which calls fail."""

    counts: dict[str, int]
    ways: list[Row]
    found: list[Found]


class FailingDevice(HostDevice):
    """A stand-in whose n-th call fails. seen: the names of the calls so far"""

    def __init__(self, fail: int = 0, way: str = "") -> None:
        super().__init__()
        self.fail, self.way, self.seen = fail, way, list[str]()

    def meet(self, call: str) -> None:
        """Count a call, and fail if it is the one."""
        self.seen.append(call)
        if len(self.seen) != self.fail:
            return
        if call == "end_capture":  # the recording ends all the same, as cudaStreamEndCapture's does
            self._recording = None
        if self.way == "memory":
            raise OutOfMemoryError("the GPU has 0 MiB free (cudaErrorMemoryAllocation)")
        if self.way == "error":
            raise EngineError(f"{call}: cudaErrorInvalidValue (invalid argument)")
        self.forked = self.way == "forked"
        self._lost = None if self.forked else DeviceLostError(STICKY)
        self._check()


def _failing(name: str) -> Callable[..., Any]:
    def call(device: FailingDevice, *arguments: Any, **options: Any) -> Any:
        device.meet(name)
        return getattr(HostDevice, name)(device, *arguments, **options)

    return call


for _name in CALLS:
    setattr(FailingDevice, _name, _failing(_name))


class Nth:
    """In place of the stand-in library's set of calls that fail: the n-th call of TensorRT fails, and none other."""

    def __init__(self, fail: int) -> None:
        self.fail, self.seen = fail, list[str]()

    def __contains__(self, call: str) -> bool:
        if call in TENSORRT:
            self.seen.append(call)
        return call in TENSORRT and len(self.seen) == self.fail


class Machine:
    """A bundle, engines for the stand-in, and what they draw when nothing fails."""

    def __init__(self, patch: pytest.MonkeyPatch, work: Path, bundle: Path) -> None:
        self._patch = patch
        self.root = work / "device-bundle"
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(bundle, self.root)
        install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(self.root), "tensorrt", options=OPTIONS)
        self.device, self.nth = FailingDevice(), Nth(0)
        self.start(self.device, self.nth)
        with Pipeline.load(self.root, "tensorrt") as pipe:
            self.expected = self.draw(pipe)
            assert np.array_equal(self.draw(pipe), self.expected)
            self.cuda_calls, self.tensorrt_calls = list(self.device.seen), list(self.nth.seen)

    def start(self, device: FailingDevice, nth: Nth, *, silent: bool = False) -> None:
        """Let this be the device, and this decide what TensorRT refuses, from now on."""
        from latentrt.engines.tensorrt import engines

        install(self._patch, tensorrt="11.4.0.106")
        self._patch.setattr(engines, "CudaDevice", lambda _: device)
        library = sys.modules["tensorrt"]
        library.devices, library.refuses, library.silent = (device,), nth, silent  # type: ignore[attr-defined]

    def draw(self, pipe: Pipeline) -> Any:
        """Return the pixels of the one picture."""
        return pipe(**DRAWN).pixels


def trial(machine: Machine, number: int, way: str, row: Row) -> Iterator[str]:
    """Let one call fail while a bundle is loaded and draws twice; then use it again. Yield what is wrong."""
    tensorrt = way in ("refused", "silent")
    device = FailingDevice() if tensorrt else FailingDevice(number, way)
    machine.start(device, Nth(number if tensorrt else 0), silent=way == "silent")
    pipe, error = None, None
    try:
        pipe = Pipeline.load(machine.root, "tensorrt")
        for _ in range(2):
            if not np.array_equal(machine.draw(pipe), machine.expected):
                yield "a wrong picture without an error"
    except LatentrtError as caught:
        error = caught
    except Exception as caught:
        yield f"{type(caught).__name__}: {caught}"
    if error is None:
        row.passed += 1
    else:
        row.failed += 1
        row.kinds[type(error).__name__] = row.kinds.get(type(error).__name__, 0) + 1
        yield from wrong_words(error, way)
    yield from use_again(machine, pipe, device, row)


def wrong_words(error: LatentrtError, way: str) -> Iterator[str]:
    """Yield what is wrong with an error: its kind, or its sentence."""
    if not isinstance(error, EXPECTED[way]):
        yield f"{type(error).__name__} instead of {EXPECTED[way].__name__}: {error}"
    if "\n" in str(error) or not str(error):
        yield f"not one sentence: {error}"


def use_again(machine: Machine, pipe: Pipeline | None, device: FailingDevice, row: Row) -> Iterator[str]:
    """Draw once more, load anew where nothing was loaded, and close. Yield what is wrong."""
    gone = device._gone()
    try:
        pipe = pipe or Pipeline.load(machine.root, "tensorrt")
        if np.array_equal(machine.draw(pipe), machine.expected):
            row.next_works += 1
        else:
            yield "the next call draws another picture"
        if gone:
            yield "the next call worked on a lost GPU"
    except DeviceLostError:
        row.restart += 1
        if not gone:
            yield "the GPU is said to be lost and is not"
    except Exception as caught:
        yield f"the next call: {type(caught).__name__}: {caught}"
    if pipe is not None:
        try:
            pipe.close()
        except Exception as caught:
            yield f"close: {type(caught).__name__}: {caught}"
    if not device._gone() and device.leftovers():
        yield f"not freed: {device.leftovers()}"


def run(work: Path, *, seed: int, seconds: float, short: bool) -> Result:
    """Let each call fail in each way, in random order, until all have or the time is over; one in any case."""
    del short  # the time alone decides
    chance, found = random.Random(seed), list[Found]()
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, work, sources(work / "sources").bundle)
        calls = [(machine.cuda_calls, way) for way in WAYS]
        calls += [(machine.tensorrt_calls, way) for way in ("refused", "silent")]
        tries = [(number, way, names) for names, way in calls for number in range(1, len(names) + 1)]
        rows, end = {way: Row(way=way) for _, way in calls}, time.monotonic() + seconds
        for number, way, names in chance.sample(tries, len(tries)):
            report = partial(Found, call=names[number - 1], number=number, way=way)
            found += [report(what=what) for what in trial(machine, number, way, rows[way])]
            if time.monotonic() > end:
                break
    done = sum(row.failed + row.passed for row in rows.values())
    counts = {"calls": len(machine.cuda_calls) + len(machine.tensorrt_calls), "ways": len(tries), "tried": done}
    return Result(counts=counts, ways=list(rows.values()), found=found)
