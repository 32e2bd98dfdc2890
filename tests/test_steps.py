"""What a caller sees on the way: the clean latents that the network's own outputs stand for, on every sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import ALL
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.runtime.draw.step import Step
from latentrt.runtime.images.preview import preview
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised
from tests.test_pipeline_images import left_half, photo

CALL: dict[str, Any] = {"prompt": "a red circle", "steps": 6, "seed": 5}


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


class Watching:
    """A UNet that remembers what it gave last."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.spec = engine, engine.spec
        self.output = np.zeros(0)

    def __call__(self, inputs: Any) -> Any:
        outputs = self.engine(inputs)
        self.output = outputs["out_sample"].copy()
        return outputs


@pytest.fixture
def unet(pipe: Pipeline) -> Iterator[Watching]:
    engine = pipe.loaded.opened.engines["unet"]
    pipe.loaded.opened.engines["unet"] = watching = Watching(engine)  # type: ignore[assignment]
    yield watching
    pipe.loaded.opened.engines["unet"] = engine


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc", "lcm"])
def test_a_step_shows_what_the_network_has_in_mind(pipe: Pipeline, unet: Watching, sampler: str) -> None:
    """Worked out from the network's own output, which a step does not see."""
    before = [np.zeros(0)]
    checked = []

    def on_step(step: Step) -> None:
        if step.stage > 1:  # the first state is nobody's to read
            level = Level(*map(float, step._plan.levels[step.stage - 1]))
            expected = denoised(before[0], unet.output, level, "epsilon")
            np.testing.assert_allclose(step.predicted, expected, atol=5e-3 * np.abs(expected).max())
            checked.append(step.stage)
        before[0] = step.latents

    pipe(**CALL, sampler=sampler, guidance=1.0, n=2, on_step=on_step)
    assert len(checked) >= 5


def test_a_preview_is_of_the_predicted_picture_and_the_last_of_the_picture(pipe: Pipeline) -> None:
    seen: list[tuple[Array, Array, Array]] = []
    pipe(**CALL, sampler="euler", on_step=lambda step: seen.append((step.latents, step.predicted, step.preview)))
    space = pipe.manifest.latents
    for _, predicted, shown in seen:
        assert np.array_equal(shown, preview(predicted, space))
    np.testing.assert_allclose(seen[-1][1], seen[-1][0], atol=1e-3)


def test_the_demo_is_seen_early(demo_bundle: Path) -> None:
    """After a third of the steps the preview is nearer to the last one than what the noisy latents would show."""
    shown: list[tuple[Array, Array]] = []
    with Pipeline.load(demo_bundle, "cpu", threads=1) as pipe:
        space = pipe.manifest.latents

        def on_step(step: Step) -> None:
            alpha, sigma = step._plan.levels[step.stage]
            noisy = preview(step.latents * (alpha / (alpha**2 + sigma**2)), space)  # the best linear guess
            shown.append((step.preview.astype(float), noisy.astype(float)))

        pipe("a red circle on a blue background", steps=12, seed=1, sampler="ddim", guidance=3.0, on_step=on_step)
    last = shown[-1][0]
    predicted, noisy = (float(np.abs(picture - last).mean()) for picture in shown[3])
    assert predicted < 0.6 * noisy


def test_what_a_mask_keeps_is_the_image_from_the_first_stage_on(pipe: Pipeline) -> None:
    predicted: list[Array] = []
    latents: list[Array] = []

    def on_step(step: Step) -> None:
        predicted.append(step.predicted)
        latents.append(step.latents)

    pipe(**CALL, sampler="ddim", image=photo(), mask=left_half(), on_step=on_step)
    right = np.s_[..., 5:]
    for each in predicted:
        np.testing.assert_allclose(each[right], latents[-1][right], atol=1e-5)
    assert np.abs(predicted[0][..., :5] - latents[-1][..., :5]).max() > 0.1


def test_who_does_not_look_is_not_waited_for(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching alone, and keeping steps, reads nothing from where the engines run; looking reads once."""
    reads: list[str] = []
    read = NumpyWorkspace.read

    def look(self: NumpyWorkspace, name: str, rows: slice = ALL) -> Array:
        reads.append(name)
        return read(self, name, rows)

    def counted(on_step: Callable[[Step], object] | None) -> list[str]:
        reads.clear()
        pipe(**CALL, on_step=on_step)
        return sorted(reads)

    monkeypatch.setattr(NumpyWorkspace, "read", look)
    kept: list[Step] = []
    alone = counted(None)
    assert counted(kept.append) == alone and len(kept) == kept[0].stages
    looked = counted(lambda step: step.latents.sum() + step.latents.sum() if step.stage == 2 else None)
    assert looked == sorted([*alone, "state"])
