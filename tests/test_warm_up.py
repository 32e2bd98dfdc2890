"""A service's first callers find shapes that were drawn before: on a GPU a shape's first stage takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from latentrt import Batcher, BatcherOptions, Pipeline, Request
from latentrt.engines.build import build_engines
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.onnxruntime import engines
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.operation.self_test import warm_up
from latentrt.runtime.serve.options import ServeOptions
from tests.test_family_stages import engines_of_a_gpu

pytestmark = pytest.mark.usefixtures("one_thread")
SLOTS = 4


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the pictures of each workspace that is made from here on."""
    seen = list[int]()

    class Counted(engines.OnnxRuntimeWorkspace):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            seen.append(self.shape.pictures)

    monkeypatch.setattr(engines, "OnnxRuntimeWorkspace", Counted)
    return seen


@pytest.fixture(scope="module")
def fused(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("fused") / "bundle"
    shutil.copytree(sd1_bundle, copy)
    with engines_of_a_gpu():
        build_engines(Bundle.open(copy), "cpu", force=True)
    return copy


def test_every_number_of_slots_was_drawn_before_the_first_caller(fused: Path, made: list[int]) -> None:
    requests = [Request(prompt="", steps=6, seed=seed) for seed in range(SLOTS)]
    with engines_of_a_gpu(), Pipeline.load(fused, "cpu", threads=1) as pipe:
        assert warm_up(pipe, SLOTS) == (1, 2, 4)
        assert sorted(set(made)) == [1, 2, 4]
        made.clear()
        with Batcher(pipe, BatcherOptions(slots=SLOTS)) as batcher:
            for future in [one for request in requests for one in batcher.submit(request)]:
                future.result()
    assert made == []


def test_a_service_warms_its_models_up(fused: Path, made: list[int]) -> None:
    with engines_of_a_gpu(), Models({"a": fused}, ServeOptions(slots=SLOTS), {"backend": "cpu", "threads": 1}):
        assert set(made) == {1, 2, 4}


def test_on_the_cpu_nothing_is_warmed_up(sd1_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    build_engines(Bundle.open(tmp_path / "bundle"), "cpu")
    with Pipeline.load(tmp_path / "bundle", "cpu", threads=1) as pipe:
        assert warm_up(pipe, SLOTS) == ()
