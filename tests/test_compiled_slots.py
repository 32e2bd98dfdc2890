"""Continuous batching on engines that are compiled for some numbers of pictures: slots that nobody needs stay empty.

Everything is real but the device and TensorRT, for which the stand-ins of tests/stand_in.py run the graphs late.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentrt import Batcher, BatcherOptions, Pipeline, Request
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.runtime.batching.observer import Event, StageDone
from tests.stand_in import install
from tests.test_batcher import NEAR_DB, asked, psnr, together
from tests.test_pipeline_images import left_half, photo

SIZE = (32, 32)
COMPILED = [(1,), (4,), (1, 2), (2, 3)]  # pictures at a time


@pytest.fixture(scope="module", params=COMPILED, ids=str)
def compiled(
    request: pytest.FixtureRequest, sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pipeline, tuple[int, ...]]]:
    root = shutil.copytree(sd1_bundle, tmp_path_factory.mktemp("compiled") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        options = BuildOptions(sizes=(SIZE,), batches=request.param, tokens=(77,), references=False)
        build_engines(Bundle.open(root), "tensorrt", options=options)
        with Pipeline.load(root, "tensorrt") as pipe:
            yield pipe, request.param
        assert device.leftovers() == {}


def wishes() -> list[Request]:
    return [
        asked(1, steps=3, size=SIZE),
        asked(2, steps=6, size=SIZE, guidance=1.0),
        asked(3, steps=5, size=SIZE, sampler="euler_ancestral"),
        asked(4, steps=4, image=photo(), mask=left_half(), strength=0.7, size=SIZE),
        asked(5, steps=4, size=SIZE),
    ]


def test_pictures_share_the_slots_that_are_compiled(
    compiled: tuple[Pipeline, tuple[int, ...]], sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, counts = compiled
    told: list[Event] = []
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as plain:
        alone = [plain.draw(request).pixels[0] for request in wishes()]
    with Batcher(pipe, BatcherOptions(slots=3), observer=told.append) as batcher:
        found = [result.pixels[0] for result in together(monkeypatch, batcher, wishes())]
    for one, other in zip(alone, found, strict=True):
        assert psnr(one, other) >= NEAR_DB
    stages = [event for event in told if isinstance(event, StageDone)]
    assert max(stage.pictures for stage in stages) == min(3, counts[-1])
    assert {stage.used + stage.padded for stage in stages} <= {rows for count in counts for rows in (count, 2 * count)}


def test_what_is_not_compiled_is_refused_at_once(compiled: tuple[Pipeline, tuple[int, ...]]) -> None:
    with Batcher(compiled[0]) as batcher:
        for options in ({"size": (64, 32)}, {"prompt": "a red circle on a blue square " * 20}):
            with pytest.raises(RequestError):
                batcher.submit(asked(1, **options))


def test_slots_hold_as_many_pictures_as_may_be_drawn_and_no_more_than_needed(
    compiled: tuple[Pipeline, tuple[int, ...]],
) -> None:
    pipe, counts = compiled
    found = {
        most: pipe.loaded.opened.slot_counts(WorkspaceShape(pictures=most, tokens=77, width=32, height=32))
        for most in (1, 2, 8)
    }
    assert found[8] == counts
    for most in (1, 2):
        slots = found[most]
        assert slots is not None and set(slots) <= set(counts)
        assert slots[-1] == next((count for count in counts if count >= most), counts[-1])
