"""Where a network fills the machine's cores, a batcher runs one at a time; elsewhere text and pictures are beside."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from latentrt import Batcher, Pipeline, Request
from latentrt.engines.spec import Inputs
from latentrt.runtime.batching.beside import InTurn
from tests.test_batcher import Watched

WAIT_S = 300


def test_turns_are_had_one_at_a_time_in_the_order_in_which_they_were_asked_for() -> None:
    cores, order, waiting = InTurn(), list[int](), list[threading.Thread]()
    first, turns = cores(), [cores() for _ in range(5)]

    def wait(number: int) -> None:
        with turns[number]:
            order.append(number)

    for number in (3, 1, 4, 0, 2):
        waiting.append(threading.Thread(target=wait, args=(number,)))
        waiting[-1].start()
    with first:
        assert order == []
    for thread in waiting:
        thread.join(WAIT_S)
    with cores():
        order.append(5)
    assert order == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("threads", "fills"), [(None, True), (1, False)])
def test_networks_run_one_at_a_time_where_each_fills_the_cores(
    sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, fills: bool
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    running, most = set[int](), list[int]()
    decoded, drawn = threading.Event(), threading.Event()

    def begin(inputs: Inputs) -> None:
        running.add(threading.get_ident())
        most.append(len(running))

    def end(*_: object) -> None:
        running.discard(threading.get_ident())

    def stage(inputs: Inputs) -> None:
        begin(inputs)
        if decoded.is_set():
            drawn.set()

    def decode(inputs: Inputs) -> None:
        begin(inputs)
        if not decoded.is_set():  # a stage of the other picture comes beside the first, or none while it waits
            decoded.set()
            assert drawn.wait(1 if fills else WAIT_S) is not fills

    with contextlib.ExitStack() as watched:
        pipe = watched.enter_context(Pipeline.load(sd1_bundle, "cpu", threads=threads))
        assert pipe.loaded.opened.fills_cores is fills
        watched.enter_context(Watched(pipe, stage, spoil=end))
        watched.enter_context(Watched(pipe, decode, spoil=end, component="vae_decoder"))
        watched.enter_context(Watched(pipe, begin, spoil=end, component="text_encoder"))
        batcher = watched.enter_context(Batcher(pipe))
        asked = [Request(prompt="a circle", seed=seed, steps=3 + 9 * seed) for seed in range(2)]
        for (future,) in [batcher.submit(request) for request in asked]:
            future.result(WAIT_S)
    assert max(most) == (1 if fills else 2)
