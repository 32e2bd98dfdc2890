"""Pictures that follow different images, or none, share their stages, and each is the one drawn alone."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt import Batcher, BatcherOptions, Control, Pipeline, Request
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.spec import Array
from tests.conftest import Controlled, MakeControlled
from tests.stand_in import install
from tests.test_batcher import Watched, all_of, shared
from tests.test_control_stage import REQUESTS, SIZE, canonical, request_of
from tests.test_controlnets import hint


@pytest.fixture(scope="module")
def pipe(controlled: MakeControlled) -> Iterator[Pipeline]:
    with canonical(), Pipeline.load(controlled("sd1", "").bundle, "cpu", threads=1) as opened:
        yield opened


def mixed(pipe: Pipeline) -> list[Request]:
    """One picture each, at different numbers of steps."""
    wishes = [options for options in REQUESTS.values() if options.get("n", 1) == 1]
    return [request_of(pipe, **{"steps": 4 + i % 3, "seed": i, **options}) for i, options in enumerate(wishes)]


def drawn_alone(pipe: Pipeline, requests: list[Request]) -> list[Array]:
    return [pipe.draw(request).pixels[0] for request in requests]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_each_picture_follows_its_own_whoever_shares_its_stages(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    requests = mixed(pipe)
    random.Random(order).shuffle(requests)
    assert shared(pipe, requests, drawn_alone(pipe, requests), monkeypatch, slots=4) == 4


def test_a_controlnet_runs_on_the_rows_that_follow_it_alone(pipe: Pipeline) -> None:
    follows = request_of(pipe, steps=6, controls=[Control(name="edges", image=hint(0), stop=0.5)])
    plain = [request_of(pipe, steps=9, seed=seed) for seed in (1, 2)]
    edges, depth = (Watched(pipe, component=f"controlnet_{name}") for name in ("edges", "depth"))
    with edges, depth, Batcher(pipe, BatcherOptions(slots=4)) as batcher:
        all_of(batcher, [plain[0], follows, plain[1]])
    assert edges.rows == [2, 2, 2] and depth.rows == []


def test_adapters_share_stages_with_what_follows_nothing(
    adapted: Callable[[str], Controlled], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(adapted("sd1").bundle, "cpu", threads=1) as pipe:
        size = (64, 64)
        ways: list[dict[str, Any]] = [
            {"controls": [Control(name="sketch", image=hint(1, size), scale=0.8)]},
            {},
            {"controls": [Control(name="outline", image=hint(2, size), stop=0.5)], "steps": 6},
            {"controls": [Control(name="edges", image=hint(3, size)), Control(name="sketch", image=hint(4, size))]},
        ]
        requests = [request_of(pipe, size=size, **{"seed": seed, **way}) for seed, way in enumerate(ways)]
        assert shared(pipe, requests, drawn_alone(pipe, requests), monkeypatch) > 1


def test_where_others_would_pay_for_a_controlnet_they_take_turns(
    controlled: MakeControlled, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device a pass is of all rows: those that follow the same share stages."""
    ways: list[dict[str, Any]] = [{"controls": [Control(name="edges", image=hint(seed))]} for seed in (1, 2)]
    requests = [request_of(pipe, **{"seed": seed, **way}) for seed, way in enumerate([*ways, {}, {}])]
    alone = drawn_alone(pipe, requests)
    root = shutil.copytree(controlled("sd1", "").bundle, tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, tensorrt="11.4.0.106")
        options = BuildOptions(sizes=(SIZE,), batches=(1, 2), tokens=(77,), references=False)
        build_engines(Bundle.open(root), "tensorrt", options=options)
        with Pipeline.load(root, "tensorrt") as compiled:
            assert shared(compiled, requests, alone, monkeypatch, slots=2) == 2
