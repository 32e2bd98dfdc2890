"""Long use: mixed requests through the library, the batcher and the service, and what they leave in memory.

Each picture is compared with the one that was drawn alone at the beginning. Resident memory and open handles are
looked at once a second; their slope is that of Theil and Sen over the later two thirds.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from benchmarks.torture.sources import controlled, sources

from latentrt.engines.errors import CancelledError, DeadlineError, RequestError
from latentrt.runtime.batching.batcher import Batcher, BatcherOptions
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control, Lora, Request

NAMES = ("one thread", "library", "batcher", "service")  # the ways to ask, with 64 threads but for the first
THREADS = 64
MIB = 1 << 20
LEAST_DRIFT_BYTES = 2 * MIB  # what is no growth: pools of the allocator and of ONNX Runtime come and go
WARM_SHARE = 1 / 3
JUDGED_S = 30.0  # in less, what is warmed up and what grows cannot be told apart
KINDS = 24  # of requests
LAST = 512  # waits of a thread that are kept: what looks at memory must not grow itself
LEVELS = 2  # of 255: pictures that share their passes are summed in another order


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What should not have been."""

    mode: str
    what: str


class Slope(msgspec.Struct, frozen=True, kw_only=True):
    """How something grew: per hour, with an interval of 95 %; drift: in all; spread: of what a line does not explain"""

    per_hour: float
    low: float
    high: float
    drift: float
    spread: float


class Mode(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one way to ask.

    outcomes: how many calls gave the right picture, and how many each error
    per_thread: the fewest and the most pictures of a thread; median_wait_s: from asking to the answer, of the last ones
    """

    mode: str
    seconds: float
    threads: int
    outcomes: dict[str, int]
    memory_mib: Slope
    handles: Slope
    per_thread: tuple[int, int]
    median_wait_s: float
    longest_wait_s: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all of them."""

    counts: dict[str, int]
    modes: list[Mode]
    found: list[Found]


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """Return the slope of samples, 0 of fewer than three."""
    from scipy.stats import theilslopes

    if len(values) < 3:
        return Slope(per_hour=0.0, low=0.0, high=0.0, drift=0.0, spread=0.0)
    x, y = np.array(seconds), np.array(values, np.float64)
    fitted = theilslopes(y, x)
    rest = y - (fitted.intercept + fitted.slope * x)
    drift = float(fitted.slope * (x[-1] - x[0]))
    per_hour = [round(3600 * float(one), 3) for one in (fitted.slope, fitted.low_slope, fitted.high_slope)]
    spread = float(np.subtract(*np.percentile(rest, (97.5, 2.5))))
    return Slope(
        per_hour=per_hour[0], low=per_hour[1], high=per_hour[2], drift=round(drift, 3), spread=round(spread, 3)
    )


class Meter:
    """Looks at a process once a second, from a thread of its own."""

    def __init__(self, process: int) -> None:
        self._home = Path(f"/proc/{process}")
        self.at, self.memory, self.handles = list[float](), list[float](), list[float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            pages = int((self._home / "statm").read_text().split()[1])
            self.at.append(time.monotonic())
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)
            self.handles.append(len(os.listdir(self._home / "fd")))  # noqa: PTH208 - the names alone

    def stop(self) -> tuple[Slope, Slope]:
        """End it; return the slopes of memory in MiB and of handles, past the warm-up."""
        self._ended.set()
        self._thread.join()
        first = int(len(self.at) * WARM_SHARE)
        return slope(self.at[first:], self.memory[first:]), slope(self.at[first:], self.handles[first:])


def requests(work: Path, checkpoint: Path, seed: int) -> list[Request]:
    """Return requests of all kinds: sizes, samplers, LoRAs, ControlNets, images, masks, several pictures."""
    from tests.lora_files import every_layer, kohya, save

    from latentrt.runtime.sampling.catalogue import sampler_names

    chance = random.Random(seed)
    loras = [save(work / f"soak-{n}.safetensors", kohya(every_layer(checkpoint, seed=n))) for n in (1, 2)]
    image = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    kinds: list[dict[str, Any]] = [
        {},
        {"size": (64, 32)},
        {"n": 2},
        {"guidance": 1.0},
        {"loras": (Lora(file=chance.choice(loras)),)},
        {"loras": tuple(Lora(file=one, scale=0.5) for one in loras)},
        {"controls": (Control(name="edges", image=image),)},
        {"image": image, "strength": 0.7},
        {"image": image, "mask": image[..., 0] | 128, "strength": 0.9},
    ]
    names = [name for name in sampler_names() if not name.startswith("flow")]
    made = []
    for number in range(KINDS):
        asked = {"prompt": "a red circle", "size": (32, 32), "steps": chance.choice((3, 4, 6)), "seed": number}
        asked |= {"sampler": chance.choice(names), **kinds[number % len(kinds)]}
        if "image" in asked:
            del asked["size"]
        made.append(Request(**asked))
    return made


class Early(Cancellation):
    """One that is cancelled soon after the call began."""

    def start(self, after_s: float) -> None:
        """Cancel it in so many seconds."""
        timer = threading.Timer(after_s, self.cancel)
        timer.daemon = True
        timer.start()


class Asker:
    """One thread's calls: drawn from what may be asked, and compared with what was drawn alone."""

    def __init__(
        self, known: list[tuple[Request, Any]], ask: Callable[[Request, Cancellation], Any], seed: str
    ) -> None:
        self._known, self._ask, self._chance = known, ask, random.Random(seed)
        self.outcomes, self.wrong = Counter[str](), list[str]()
        self.waits, self.longest_wait_s = deque[float](maxlen=LAST), 0.0

    def go_on(self, until: float) -> None:
        """Ask until a time."""
        while time.monotonic() < until:
            try:
                self._once()
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    def _once(self) -> None:
        request, expected = self._chance.choice(self._known)
        cancel, die = Cancellation(), self._chance.random()
        if die < 0.05:
            request = msgspec.structs.replace(request, deadline=self._chance.choice((0.001, 0.01)))
        elif die < 0.1:
            request = msgspec.structs.replace(request, size=(13, 8), image=None, mask=None)
        elif die < 0.15:
            cancel = Early()
            cancel.start(self._chance.uniform(0, 0.05))
        start = time.monotonic()
        try:
            pixels = self._ask(request, cancel)
        except (DeadlineError, CancelledError, RequestError) as error:
            self.outcomes[type(error).__name__] += 1
            if die > 0.15:
                self.wrong.append(f"{type(error).__name__}: {error}")
            return
        self.waits.append(time.monotonic() - start)
        self.longest_wait_s = max(self.longest_wait_s, self.waits[-1])
        right = pixels.shape == expected.shape and int(np.abs(pixels.astype(int) - expected).max()) <= LEVELS
        self.outcomes["right" if right else "wrong"] += 1
        if not right:
            self.wrong.append(f"another picture: {request.sampler}, seed {request.seed}")


def measure(mode: str, process: int, askers: Sequence[Asker], seconds: float) -> tuple[Mode, list[Found]]:
    """Let threads ask for some seconds, and look at a process meanwhile."""
    gc.collect()
    start, meter = time.monotonic(), Meter(process)
    threads = [threading.Thread(target=asker.go_on, args=(start + seconds,)) for asker in askers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory, handles = meter.stop()
    outcomes = sum((asker.outcomes for asker in askers), Counter[str]())
    waits = sorted(wait for asker in askers for wait in asker.waits) or [0.0]
    rights = [asker.outcomes["right"] for asker in askers]
    done = Mode(
        mode=mode,
        seconds=round(time.monotonic() - start, 1),
        threads=len(askers),
        outcomes=dict(outcomes),
        memory_mib=memory,
        handles=handles,
        per_thread=(min(rights), max(rights)),
        median_wait_s=round(waits[len(waits) // 2], 4),
        longest_wait_s=round(max(asker.longest_wait_s for asker in askers), 4),
    )
    wrong = [f"{count} times {what}" for what, count in Counter(w for a in askers for w in a.wrong).items()]
    if seconds >= JUDGED_S and memory.drift > max(memory.spread, LEAST_DRIFT_BYTES / MIB):
        wrong.append(f"memory grew by {memory.drift} MiB in {done.seconds} s")
    if seconds >= JUDGED_S and handles.drift > max(handles.spread, 1.0):
        wrong.append(f"handles grew by {handles.drift} in {done.seconds} s")
    return done, [Found(mode=mode, what=what) for what in wrong]


def _by_batcher(batcher: Batcher, request: Request, cancel: Cancellation) -> Any:
    futures = batcher.submit(request, cancel=cancel)
    results = [future.exception() for future in futures]
    for error in results:
        if error is not None:
            raise error
    return np.concatenate([future.result().pixels for future in futures])


def run(work: Path, *, seed: int, seconds: float, short: bool, only: Collection[str] = NAMES) -> Result:
    """Ask in each of the ways, or in some, for an equal share of the time."""
    from benchmarks.torture.soak_service import measure_service

    del short
    given = sources(work / "sources")
    bundle = controlled(work / "sources")
    each, modes, found = seconds / len(only), list[Mode](), list[Found]()

    def add(done: tuple[Mode, list[Found]]) -> None:
        modes.append(done[0])
        found.extend(done[1])

    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        known = [(one, pipe.draw(one).pixels.copy()) for one in requests(work, given.checkpoint, seed)]
        alone = lambda request, cancel: pipe.draw(request, cancel=cancel).pixels  # noqa: E731
        for name, threads in (("one thread", 1), ("library", THREADS)):
            if name in only:
                askers = [Asker(known, alone, f"{seed} library {number}") for number in range(threads)]
                add(measure("library", os.getpid(), askers, each))
        if "batcher" in only:
            with Batcher(pipe, BatcherOptions(slots=4, waiting=4 * THREADS)) as batcher:
                ask = partial(_by_batcher, batcher)
                askers = [Asker(known, ask, f"{seed} batcher {number}") for number in range(THREADS)]
                add(measure("batcher", os.getpid(), askers, each))
    if "service" in only:
        add(measure_service(bundle, known, work, each, seed))
    outcomes = sum((Counter(mode.outcomes) for mode in modes), Counter[str]())
    return Result(counts=dict(outcomes), modes=modes, found=found)
