"""A batcher for hours, in minutes: hundreds of pictures leave early, thousands are drawn, and nothing stays."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from latentrt import Batcher, BatcherOptions, Cancellation, Lora, Pipeline, Request, Result, Step
from latentrt.engines.errors import QueueFullError, RequestError
from latentrt.runtime.batching.observer import Cancelled, Delivered, Failed
from latentrt.runtime.sampling.catalogue import sampler_names
from tests.lora_files import every_layer, kohya
from tests.test_batcher import NEAR_DB, WAIT_S, Notes, answer, asked, psnr

pytestmark = pytest.mark.slow
MOST_GROWTH_BYTES = 64 << 20  # of what is resident, after the first quarter


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


class Leaver:
    """A picture that is cancelled from another thread; it counts the stages that it is shown after that."""

    def __init__(self, batcher: Batcher, request: Request) -> None:
        self.cancel, self.after = Cancellation(), 0
        (self.future,) = batcher.submit(request, on_step=self.watch, cancel=self.cancel)

    def watch(self, _: int, __: Step) -> None:
        self.after += self.cancel.cancelled


def test_five_hundred_that_leave_free_their_slots_within_a_stage_and_change_nobody(pipe: Pipeline) -> None:
    chance, told = random.Random(5), Notes()
    stays = asked(0, steps=6, sampler="euler_ancestral")
    alone, kept, leavers = pipe.draw(stays).pixels[0], list[Future[Result]](), list[Leaver]()
    with Batcher(pipe, BatcherOptions(slots=6, waiting=1000), observer=told) as batcher:
        for number in range(500):
            leavers.append(Leaver(batcher, asked(number, steps=chance.choice((8, 20, 60)))))
            if number % 10 == 0:
                kept += batcher.submit(stays)
            if number > 12:  # some wait, some are drawn
                time.sleep(chance.random() / 50)
                leaver = leavers[number - chance.randrange(12)]
                leaver.cancel.cancel() if chance.random() < 0.8 else leaver.future.cancel()
        for leaver in leavers:
            leaver.cancel.cancel()
        for future in kept:
            assert psnr(answer(future).pixels[0], alone) >= NEAR_DB
        assert batcher.drain(WAIT_S)
        assert batcher.waiting == batcher.drawing == 0
    assert max(leaver.after for leaver in leavers) <= 1
    assert all(leaver.future.done() for leaver in leavers)
    assert len(told.of(Cancelled)) + len(told.of(Delivered)) == 500 + len(kept) and not told.of(Failed)
    assert len({one.when for one in told.of(Cancelled)}) > 1


def held() -> tuple[int, int, int]:
    """Return what this process holds: resident bytes, open files, threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def anything(chance: random.Random, files: list[Path], size: tuple[int, int]) -> Request:
    """Return a request of some kind, one in twenty of a kind that is refused."""
    width, height = size
    image = np.random.default_rng(chance.randrange(99)).integers(0, 255, (height, width, 3), dtype=np.uint8)
    kinds: list[dict[str, Any]] = [
        {},
        {"n": 2},
        {"image": image, "strength": 0.6},
        {"image": image, "mask": image[..., 0]},
        {"size": (width * chance.choice((1, 2)), height)},
        {"loras": [Lora(file=chance.choice(files))]},
        {"deadline": chance.choice((0.001, 0.05, 100.0))},
        {"guidance": 1.0},
    ]
    names = [name for name in sampler_names() if "flow" not in name]
    wish = {"steps": chance.randrange(1, 7), "sampler": chance.choice(names), **chance.choice(kinds)}
    wish |= {"steps": 4} if "image" in wish else {}
    return asked(chance.randrange(1000), **wish | ({"size": (13, 8)} if chance.random() < 0.05 else {}))


def patiently(batcher: Batcher, request: Request, cancel: Cancellation) -> list[Future[Result]]:
    """Submit a request, again and again while the line is full."""
    for _ in range(WAIT_S * 20):
        try:
            return batcher.submit(request, cancel=cancel)
        except QueueFullError:
            time.sleep(0.05)
    raise AssertionError("the line stayed full")


def test_two_thousand_of_all_kinds_are_answered_and_leave_nothing_behind(
    pipe: Pipeline, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, file in enumerate(files):
        save_file(kohya(every_layer(sd1_checkpoint, seed=seed)), file)
    chance, size, told, futures, refused = random.Random(7), pipe.manifest.default_size, Notes(), 0, 0
    with Batcher(pipe, BatcherOptions(slots=6, waiting=40, slo=20), observer=told) as batcher:
        warm: tuple[int, int, int] | None = None
        for number in range(2000):
            cancel = Cancellation()
            try:
                taken = patiently(batcher, anything(chance, files, size), cancel)
            except RequestError:
                refused += 1
                continue
            futures += len(taken)
            if chance.random() < 0.1:
                cancel.cancel()
            if number % 8 == 0:
                taken[0].exception(WAIT_S) if not cancel.cancelled else None
            warm = warm or (held() if number >= 500 else None)
        assert batcher.drain(WAIT_S)
        ended = told.of(Delivered), told.of(Cancelled), told.of(Failed)
        assert sum(map(len, ended)) == futures and all(isinstance(one.error, RequestError) for one in ended[2])
        assert refused > 20 and len(ended[0]) > futures / 2
        assert warm is not None
        bytes_now, files_now, threads_now = held()
    assert bytes_now - warm[0] <= MOST_GROWTH_BYTES
    assert files_now <= warm[1] + 2 and threads_now <= warm[2]
