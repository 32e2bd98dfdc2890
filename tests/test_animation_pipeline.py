"""Animations through the public class: key frames met exactly, batches that do not matter, no flicker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import KeyFrame
from tests.refused import about

KEYS = [
    KeyFrame(prompt="a red circle", seed=1),
    KeyFrame(prompt="a blue square", seed=2, negative_prompt="red"),
    KeyFrame(prompt="a circle on blue", seed=3),
]
QUICK: dict[str, Any] = {"steps": 2, "guidance": 3.0}


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


def frames(pipe: Pipeline, count: int, **options: Any) -> Array:
    return np.concatenate([result.pixels for result in pipe.animate(KEYS, count, **{**QUICK, **options})])


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_key_frames_are_the_pictures_drawn_alone(pipe: Pipeline, sampler: str) -> None:
    found = frames(pipe, 5, sampler=sampler)
    assert found.shape == (5, 32, 32, 3)
    for place, key in zip((0, 2, 4), KEYS, strict=True):
        alone = pipe(key.prompt, negative_prompt=key.negative_prompt, seed=key.seed, sampler=sampler, **QUICK)
        assert np.abs(found[place].astype(int) - alone.pixels[0].astype(int)).max() <= 1
    assert not np.array_equal(found[1], found[0]) and not np.array_equal(found[1], found[2])


def test_the_size_of_batches_changes_no_frame(pipe: Pipeline) -> None:
    expected = frames(pipe, 7, sampler="euler_ancestral", batch=7)
    for batch in (1, 3):
        found = frames(pipe, 7, sampler="euler_ancestral", batch=batch)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_every_batch_but_the_last_is_full(pipe: Pipeline) -> None:
    results = list(pipe.animate(KEYS, 7, batch=3, sampler="euler", **QUICK))
    assert [len(result.pixels) for result in results] == [3, 3, 1]


def test_engines_of_one_batch_size_draw_the_last_frames_as_a_full_batch(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = frames(pipe, 7, sampler="euler_ancestral", batch=3)
    shapes = list[int]()

    def require(shape: WorkspaceShape) -> None:
        shapes.append(shape.pictures)
        if shape.pictures != 3:
            raise EngineError("compiled for three")

    monkeypatch.setattr(pipe.loaded.opened, "require", require)
    results = list(pipe.animate(KEYS, 7, batch=3, sampler="euler_ancestral", **QUICK))
    assert [len(result.pixels) for result in results] == [3, 3, 1] and shapes == [3, 1, 3]
    assert [len(result.seeds) for result in results] == [len(result.settings) for result in results] == [3, 3, 1]
    found = np.concatenate([result.pixels for result in results])
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_engines_of_other_shapes_are_refused_before_the_first_frame(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(shape: WorkspaceShape) -> None:
        raise EngineError("compiled for other shapes")

    monkeypatch.setattr(pipe.loaded.opened, "require", require)
    for count in (7, 3):
        with pytest.raises(EngineError):
            pipe.animate(KEYS, count, batch=4, **QUICK)


def test_a_loop_goes_back_to_its_first_key_frame(pipe: Pipeline) -> None:
    looped = frames(pipe, 6, loop=True, sampler="euler")
    assert np.array_equal(looped[0], frames(pipe, 5, sampler="euler")[0])
    assert not np.array_equal(looped[5], looped[4])


@pytest.mark.parametrize(
    ("keys", "count", "options", "field"),
    [
        (KEYS[:1], 5, {}, "keys"),
        (KEYS, 2, {}, "frames"),
        (KEYS, 5, {"batch": 0}, "batch"),
        (KEYS, 5, {"steps": 0}, "steps"),
    ],
)
def test_what_cannot_be_animated_is_refused(
    pipe: Pipeline, keys: list[KeyFrame], count: int, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError, check=about(field)):
        list(pipe.animate(keys, count, **{**QUICK, **options}))
