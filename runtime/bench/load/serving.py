"""Ways to serve the same requests with a bundle in this process: together, one at a time, in static batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from latentrt.engines.errors import LatentrtError, QueueFullError
from latentrt.runtime.bench.load.arrivals import Item, prompt_of
from latentrt.runtime.bench.load.drive import Submit
from latentrt.runtime.request import Request

if TYPE_CHECKING:  # import chains stay short
    from latentrt.runtime.pipeline import Pipeline
    from latentrt.runtime.result import Result


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What every way of serving keeps to.

    most: pictures drawn together; waiting: that may wait; slo: how many times a request's own time it may take
    """

    most: int = 8
    waiting: int = 64
    slo: float = 5.0


@contextmanager
def continuous(pipe: Pipeline, options: Options) -> Iterator[Submit]:
    """Serve with a `Batcher`: requests share stages, and come and go between two of them."""
    from latentrt.runtime.batching.batcher import Batcher, BatcherOptions

    kept = BatcherOptions(slots=options.most, waiting=options.waiting, slo=options.slo)
    with Batcher(pipe, kept) as batcher:

        def submit(number: int, item: Item) -> Future[float | None]:
            (drawn,) = batcher.submit(request_of([item], [number]))
            first: Future[float | None] = Future()
            drawn.add_done_callback(lambda done: _tell(first, done))
            return first

        yield submit


def _tell(first: Future[float | None], done: Future[Result]) -> None:
    if (error := done.exception()) is not None:
        first.set_exception(error)
    else:
        first.set_result(until_first(done.result()))


def until_first(result: Result) -> float:
    """Return the seconds from a batcher's taking a request to the end of its first stage."""
    return result.seconds["wait"] + result.seconds["encode"] + result.step_seconds[0]


@contextmanager
def one_at_a_time(pipe: Pipeline, options: Options) -> Iterator[Submit]:
    """Serve with the pipeline alone, first come, first served."""
    with _Line(pipe, most=1, waiting=options.waiting) as line:
        yield line.submit


@contextmanager
def static_batches(pipe: Pipeline, options: Options) -> Iterator[Submit]:
    """Serve in batches from the first step to the last: the first that waits, and those of its kind."""
    with _Line(pipe, most=options.most, waiting=options.waiting) as line:
        yield line.submit


SERVINGS = {"continuous": continuous, "one": one_at_a_time, "static": static_batches}


class _Waiting(msgspec.Struct, eq=False):
    number: int
    item: Item
    since: float
    first: Future[float | None] = msgspec.field(default_factory=Future)


class _Line:
    """Draws on a thread of its own what waits: the first and, up to `most`, those of the same kind."""

    def __init__(self, pipe: Pipeline, *, most: int, waiting: int) -> None:
        self._pipe, self._most, self._room = pipe, most, waiting
        self._change = threading.Condition()
        self._line: list[_Waiting] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="latentrt-line", daemon=True)

    def submit(self, number: int, item: Item) -> Future[float | None]:
        one = _Waiting(number, item, time.perf_counter())
        with self._change:
            if len(self._line) >= self._room:
                raise QueueFullError(f"{len(self._line)} pictures wait", retry_after_s=1.0)
            self._line.append(one)
            self._change.notify()
        return one.first

    def __enter__(self) -> _Line:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closed = True
            for one in self._line:
                one.first.cancel()
            self._line.clear()
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    return
                taken = together([one.item for one in self._line], self._most)
                batch = [self._line[place] for place in taken]
                self._line = [one for one in self._line if one not in batch]
            self._draw(batch)

    def _draw(self, batch: list[_Waiting]) -> None:
        began = time.perf_counter()
        try:
            result = self._pipe.draw(request_of([one.item for one in batch], [one.number for one in batch]))
        except LatentrtError as error:
            for one in batch:
                one.first.set_exception(error)
            return
        seconds = result.seconds
        begun = seconds["tokenize"] + seconds["encode"] + result.step_seconds[0]
        for one in batch:
            one.first.set_result(began - one.since + begun)


def together(line: Sequence[Item], most: int) -> list[int]:
    """Return which of those that wait a static batch takes: the first, and up to `most` of its kind, in order."""
    alike = [place for place, item in enumerate(line) if (item.kind, item.negative_prompt) == _like(line[0])]
    return alike[:most]


def _like(item: Item) -> tuple[object, str | None]:
    return item.kind, item.negative_prompt


def request_of(items: Sequence[Item], numbers: Sequence[int]) -> Request:
    """Return what draws some items of one kind, a picture each."""
    first = items[0]
    return Request(
        prompt=[prompt_of(item, number) for item, number in zip(items, numbers, strict=True)],
        negative_prompt=first.negative_prompt,
        seed=[number if item.seed is None else item.seed for item, number in zip(items, numbers, strict=True)],
        steps=first.steps,
        size=first.size,
        guidance=first.guidance,
        sampler=first.sampler,
    )
