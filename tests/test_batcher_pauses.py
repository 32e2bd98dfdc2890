"""A picture makes way for a more urgent one, and goes on from where it was: it is still the one drawn alone.

Stages are said to take ten seconds each, so that who is more urgent depends on no machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Batcher, BatcherOptions, Cancellation, Pipeline, Request, Result, Step
from latentrt.engines.errors import CancelledError, DeadlineError, EngineError, QueueFullError
from latentrt.engines.spec import Inputs
from latentrt.runtime.batching import drawing_loop
from latentrt.runtime.batching.observer import Cancelled, Delivered, StageDone, Started
from latentrt.runtime.batching.stage_times import StageTimes
from tests.test_batcher import NEAR_DB, WAIT_S, Notes, Watched, answer, asked, begun_together, psnr


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageTimes, "estimate", lambda _, kind, rows: 0.0 if kind == "decode" else 10.0)


class Hold:
    """Stops the batcher's thread after some stage of a picture, until it is told to go on."""

    def __init__(self, stage: int = 1) -> None:
        self._stage, self._come, self._go_on = stage, threading.Event(), threading.Event()

    def __call__(self, _: int, step: Step) -> None:
        if step.stage == self._stage:
            self._come.set()
            assert self._go_on.wait(WAIT_S)

    def wait(self) -> None:
        assert self._come.wait(WAIT_S)

    def go_on(self) -> None:
        self._go_on.set()


class Long(Hold):
    """Goes on once all that wait are prepared, which they are asked to be before the second stage."""

    def __init__(self, batcher: Batcher) -> None:
        super().__init__()
        self._line = batcher._line

    def __call__(self, picture: int, step: Step) -> None:
        super().__call__(picture, step)
        if step.stage == 2:
            with self._line.change:
                assert self._line.change.wait_for(lambda: all(one.picture for one in self._line.tickets), WAIT_S)


def paused_by(
    batcher: Batcher, long: Request, *short: Request, cancel: Cancellation | None = None
) -> tuple[list[Future[Result]], Hold]:
    """Have a long picture begin and make way for short ones, of which the first is held after its first stage."""
    first, second = Long(batcher), Hold()
    futures = batcher.submit(long, on_step=first, cancel=cancel)
    first.wait()
    for number, request in enumerate(short):
        futures += batcher.submit(request, on_step=None if number else second)
    first.go_on()
    second.wait()
    return futures, second


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler"},
        {"sampler": "euler_ancestral"},
        {"sampler": "dpmpp_2m"},
        {"sampler": "dpmpp_3m_sde"},
        {"sampler": "lms"},
        {"sampler": "unipc"},
        {"sampler": "dpmpp_2s_ancestral", "guidance_interval": (0.2, 0.7)},
        {"sampler": "dpmpp_sde", "mask": True},
        {"sampler": "lcm", "variation_seed": 9, "variation_strength": 0.4},
    ],
    ids=lambda options: options["sampler"],
)
def test_a_picture_that_was_paused_is_the_one_drawn_alone(pipe: Pipeline, options: dict[str, Any]) -> None:
    if options.get("mask"):
        width, height = pipe.manifest.default_size
        image = np.random.default_rng(5).integers(0, 255, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        options = {**options, "image": image, "mask": mask}
    requests = [asked(1, steps=9, **options), asked(2, steps=3), asked(3, steps=4, sampler="dpmpp_2m_sde")]
    alone, told = [pipe.draw(request) for request in requests], Notes()
    with Batcher(pipe, BatcherOptions(slots=1, slo=5), observer=told) as batcher:
        futures, hold = paused_by(batcher, *requests)
        hold.go_on()
        found = [answer(future) for future in futures]
    for one, other in zip(alone, found, strict=True):
        assert psnr(one.pixels[0], other.pixels[0]) >= NEAR_DB
        assert len(other.step_seconds) == len(one.step_seconds)
    assert [one.picture for one in told.of(Started)] == [1, 2, 3]  # once each
    assert [one.picture for one in told.of(Delivered)] == [2, 3, 1]
    assert {one.pictures for one in told.of(StageDone)} == {1}


def test_who_is_paused_has_begun_and_takes_no_place_of_those_that_wait(pipe: Pipeline) -> None:
    with Batcher(pipe, BatcherOptions(slots=1, waiting=1, slo=5)) as batcher:
        (paused, drawn), hold = paused_by(batcher, asked(1, steps=30), asked(2, steps=5))
        assert (batcher.waiting, batcher.drawing, batcher.position(paused)) == (0, 2, None)
        (waits,) = batcher.submit(asked(3, steps=20))
        assert batcher.position(waits) == 1
        with pytest.raises(QueueFullError):
            batcher.submit(asked(4))
        hold.go_on()
        assert batcher.drain(WAIT_S)
        assert [answer(future).seeds for future in (paused, drawn, waits)] == [(1,), (2,), (3,)]
        assert batcher.waiting == batcher.drawing == 0


def test_a_picture_that_is_paused_can_be_cancelled(pipe: Pipeline) -> None:
    cancel, told = Cancellation(), Notes()
    with Batcher(pipe, BatcherOptions(slots=1, slo=5), observer=told) as batcher:
        (paused, drawn), hold = paused_by(batcher, asked(1, steps=30), asked(2, steps=5), cancel=cancel)
        cancel.cancel()
        hold.go_on()
        assert isinstance(paused.exception(WAIT_S), CancelledError)
        assert answer(drawn).seeds == (2,)
    assert [(one.picture, one.when, one.expired) for one in told.of(Cancelled)] == [(1, "drawing", False)]


def test_a_picture_that_is_paused_ends_at_its_deadline(pipe: Pipeline) -> None:
    """It cannot be in time by what stages are said to take, so it makes way however near its deadline is."""
    cancel, told = Cancellation(), Notes()
    with Batcher(pipe, BatcherOptions(slots=1, slo=5), observer=told) as batcher:
        hold = Long(batcher)
        (paused,) = batcher.submit(asked(1, steps=1000, deadline=5.0), on_step=hold)
        hold.wait()
        # Slow enough to be drawn beyond that deadline, however quick the machine is.
        (drawn,) = batcher.submit(asked(2, steps=1000), cancel=cancel, on_step=lambda *_: time.sleep(0.01))
        hold.go_on()
        assert isinstance(paused.exception(WAIT_S), DeadlineError)
        cancel.cancel()
        drawn.exception(WAIT_S)
    assert next((one.picture, one.when, one.expired) for one in told.of(Cancelled)) == (1, "drawing", True)


def test_an_engine_that_fails_meanwhile_costs_who_is_paused_nothing(pipe: Pipeline) -> None:
    alone, failures = pipe.draw(asked(1, steps=9)), iter([EngineError("it tripped")])
    broken = threading.Event()

    def fault(_: Inputs) -> None:
        if broken.is_set() and (error := next(failures, None)):
            raise error

    with Watched(pipe, fault) as passes, Batcher(pipe, BatcherOptions(slots=1, slo=5)) as batcher:
        (paused, drawn), hold = paused_by(batcher, asked(1, steps=9), asked(2, steps=4))
        broken.set()
        hold.go_on()
        assert isinstance(drawn.exception(WAIT_S), EngineError)
        assert psnr(answer(paused).pixels[0], alone.pixels[0]) >= NEAR_DB
        assert len(answer(paused).step_seconds) == len(alone.step_seconds)
    assert len(passes.rows) == len(alone.step_seconds) + 1  # nothing was drawn again


def test_pictures_are_paused_in_groups_that_take_turns(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_loop, "LEAST_TURN_S", 1e-6)
    width, height = pipe.manifest.default_size
    requests = [
        asked(1, steps=12, sampler="euler_ancestral"),
        asked(2, steps=4),
        asked(3, steps=9, sampler="dpmpp_2m"),
        asked(4, steps=10, size=(width + 16, height)),
        asked(5, steps=3, size=(width + 16, height)),
    ]
    alone = [pipe.draw(request).pixels[0] for request in requests]
    with Batcher(pipe, BatcherOptions(slots=1, slo=50)) as batcher:
        futures = begun_together(monkeypatch, batcher, requests)
        for one, future in zip(alone, futures, strict=True):
            assert psnr(one, answer(future).pixels[0]) >= NEAR_DB
        assert batcher.drain(WAIT_S) and batcher.waiting == batcher.drawing == 0


def test_a_picture_without_a_promise_is_not_paused(pipe: Pipeline) -> None:
    told = Notes()
    with Batcher(pipe, BatcherOptions(slots=1), observer=told) as batcher:
        hold = Long(batcher)
        (first,) = batcher.submit(asked(1, steps=9), on_step=hold)
        hold.wait()
        (second,) = batcher.submit(asked(2, steps=3, deadline=1000.0))
        hold.go_on()
        assert [answer(future).seeds for future in (first, second)] == [(1,), (2,)]
    assert [one.picture for one in told.of(Delivered)] == [1, 2]
