"""Nothing that is not finite is delivered, whatever it is that went: text, start, latents or pixels."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import EngineError, NotFiniteError, RequestError
from latentrt.engines.spec import Array, Engine, EngineView, Inputs
from latentrt.engines.verify.verify import _compare
from latentrt.engines.workspace.contract import WorkspaceShape, sums_of_squares
from latentrt.runtime.bench.measure import Asked, run_bench
from latentrt.runtime.draw.finite import LATENTS, PIXELS, START, TEXT, finite, one_coloured
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import KeyFrame
from tests.refused import about
from tests.test_pipeline_images import photo

CALL: dict[str, Any] = {"prompt": "a red circle", "steps": 3, "seed": 0}
LATENT = (4, 8, 8)


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as pipe:
        pipe.loaded.opened.engine("vae_encoder", WorkspaceShape(pictures=1, tokens=77, width=32, height=32))
        yield pipe


class Spoilt(EngineView):
    """An engine whose output is changed on the way out."""

    def __init__(self, engine: Engine, change: Callable[[dict[str, Array]], None]) -> None:
        super().__init__(engine)
        self._change = change

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        outputs = {name: array.copy() for name, array in self._engine(inputs).items()}
        self._change(outputs)
        return outputs


def spoil(pipe: Pipeline, patch: pytest.MonkeyPatch, component: str, change: Callable[[Any], None]) -> None:
    engines = pipe.loaded.opened.engines
    patch.setitem(engines, component, Spoilt(engines[component], change))


def failure(pipe: Pipeline, **asked: Any) -> NotFiniteError:
    with pytest.raises(NotFiniteError) as caught:
        pipe(**CALL | asked)
    assert isinstance(caught.value, EngineError)
    return caught.value


@pytest.mark.parametrize("options", [{}, {"tile": 16}, {"n": 2}, {"sampler": "heun"}], ids=str)
def test_absurd_guidance_is_no_grey_picture(pipe: Pipeline, options: dict[str, Any]) -> None:
    error = failure(pipe, guidance=1e30, **options)
    assert (error.place, error.stage, error.pictures) == (LATENTS, 1, tuple(range(options.get("n", 1))))
    assert "guidance" in str(error)


def test_large_guidance_that_can_still_be_computed_is_drawn(pipe: Pipeline) -> None:
    drawn = pipe(**CALL, guidance=1e15)
    assert drawn.pixels.std() > 0 and drawn.warnings == ()


def test_an_animation_is_ended_too(pipe: Pipeline) -> None:
    keys = [KeyFrame(prompt="a", seed=0), KeyFrame(prompt="b", seed=1)]
    with pytest.raises(NotFiniteError):
        list(pipe.animate(keys, 2, steps=2, guidance=1e30))


def test_the_text_is_named_where_it_went_first(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(outputs: dict[str, Array]) -> None:
        outputs["last_hidden_state"][:] = np.nan

    spoil(pipe, monkeypatch, "text_encoder", change)
    error = failure(pipe, prompt="words that no test before encoded")
    assert (error.place, error.stage, error.pictures) == (TEXT, None, (0,))


def test_the_start_is_named_where_the_image_went_first(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(outputs: dict[str, Array]) -> None:
        outputs["latent_parameters"][:, 0, 0, 0] = np.inf

    spoil(pipe, monkeypatch, "vae_encoder", change)
    assert failure(pipe, image=photo()).place == START


@pytest.mark.parametrize("options", [{}, {"tile": 16}], ids=str)
def test_one_picture_that_is_lost_fails_the_call_and_is_named(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def change(outputs: dict[str, Array]) -> None:
        outputs["squares"][1, 1] = np.nan

    spoil(pipe, monkeypatch, "vae_decoder", change)
    error = failure(pipe, n=3, **options)
    assert (error.place, error.pictures) == (PIXELS, (1,))
    assert "verify" in str(error)  # nothing that was asked for explains it


def test_latents_of_the_caller_are_looked_at(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((2, *LATENT))
    for number in (np.nan, np.inf, 1e300):  # 1e300 is finite, and is not in float32
        noise[1, 0, 0, 0] = number
        with pytest.raises(RequestError, check=about("latents")):
            pipe(**CALL, n=2, latents=noise)
    noise[1, 0, 0, 0] = 1e30
    error = failure(pipe, n=2, latents=noise)
    assert (error.place, error.pictures) == (START, (1,)) and "latents" in str(error)


def test_a_picture_of_one_colour_is_given_with_a_warning(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def change(outputs: dict[str, Array]) -> None:
        outputs["pixels"][1] = (255, 255, 0)

    spoil(pipe, monkeypatch, "vae_decoder", change)
    with caplog.at_level(logging.WARNING, logger="latentrt"):
        drawn = pipe(**CALL, n=2)
    assert len(drawn.warnings) == 1 and re.search(r" 2 .*\(255, 255, 0\)", drawn.warnings[0])
    assert [record.getMessage() for record in caplog.records] == list(drawn.warnings)


def test_one_pixel_of_another_colour_is_no_warning() -> None:
    pixels = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    assert len(one_coloured(pixels)) == 1
    pixels[0, 3, 3, 2] = 1
    assert one_coloured(pixels) == ()


def test_bench_does_not_count_what_is_not_finite(sd1_bundle: Path) -> None:
    asked = Asked(steps=(2,), guidances=(1e30,), rounds=1, cold=0, golden=False, backends=("cpu",), threads=(1,))
    with pytest.raises(NotFiniteError):
        run_bench(str(sd1_bundle), asked)


def test_verify_does_not_pass_a_decoder_that_is_not_finite(pipe: Pipeline) -> None:
    def change(outputs: dict[str, Array]) -> None:
        outputs["squares"][:] = np.nan

    decoder = pipe.loaded.opened.engines["vae_decoder"]
    latents = np.zeros((1, *LATENT), dtype=np.float32)
    pixels = decoder({"latent_sample": latents})["pixels"]
    sample = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    pair = ({"latent_sample": latents}, {"sample": sample})
    assert _compare(decoder, pair, 1e-2).ok
    assert not _compare(Spoilt(decoder, change), pair, 1e-2).ok


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e20])
def test_rows_belong_to_pictures_in_turn(number: float) -> None:
    rows = np.zeros((6, 5), dtype=np.float32)
    rows[5, 2] = number
    with pytest.raises(NotFiniteError) as caught:
        finite(rows, TEXT, pictures=3)
    assert caught.value.pictures == (2,)
    assert not np.isfinite(sums_of_squares(rows))[5] and np.isfinite(sums_of_squares(rows))[:5].all()
    with pytest.raises(NotFiniteError) as caught:
        finite(rows[5:], START, pictures=2)  # one image for both
    assert caught.value.pictures == (0, 1)
