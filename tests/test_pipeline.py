"""What a call of the pipeline promises: seeds, sizes, batches, steps, threads, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.errors import ClosedError, DeadlineError, RequestError
from latentrt.runtime.draw.job import check_size
from latentrt.runtime.draw.step import Step
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Options, Request
from tests.refused import about

QUICK: dict[str, Any] = {"steps": 2, "sampler": "euler_ancestral", "guidance": 3.0}


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu") as opened:
        yield opened


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(pipe: Pipeline) -> None:
    first, again, other = (pipe("a circle", seed=seed, **QUICK).pixels for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_picture_of_a_batch_is_the_picture_of_its_own_seed(pipe: Pipeline) -> None:
    batch = pipe("a circle", seed=[4, 9, 2], n=3, **QUICK)
    assert batch.seeds == (4, 9, 2)
    for seed, pixels in zip(batch.seeds, batch.pixels, strict=True):
        alone = pipe("a circle", seed=seed, **QUICK).pixels[0]
        assert np.abs(alone.astype(int) - pixels.astype(int)).max() <= 1  # sums in another order


def test_without_a_seed_each_call_draws_its_own_and_tells_it(pipe: Pipeline) -> None:
    first, second = pipe("a circle", **QUICK), pipe("a circle", **QUICK)
    assert first.seeds != second.seeds
    assert np.array_equal(pipe("a circle", seed=first.seeds[0], **QUICK).pixels, first.pixels)


def test_the_default_size_is_the_checkpoints_and_any_multiple_is_drawn(pipe: Pipeline) -> None:
    assert pipe("a circle", **QUICK).pixels.shape == (1, 32, 32, 3)
    assert pipe("a circle", size=(40, 16), **QUICK).pixels.shape == (1, 16, 40, 3)
    assert pipe("a circle", size=(40, 16), **QUICK).images[0].size == (40, 16)


def test_several_prompts_make_one_batch(pipe: Pipeline) -> None:
    result = pipe(["a circle", "a square"], n=2, seed=0, **QUICK)
    assert [settings.prompt for settings in result.settings] == ["a circle"] * 2 + ["a square"] * 2
    assert result.seeds == (0, 1, 2, 3)


@contextmanager
def rows_counted(pipe: Pipeline) -> Iterator[list[int]]:
    """Note how many rows the UNet is given at each stage."""
    rows: list[int] = []
    engines = pipe.loaded.opened.engines

    class Counting:
        spec = engines["unet"].spec

        def __call__(self, inputs: Any) -> Any:
            rows.append(len(inputs["sample"]))
            return unet(inputs)

    unet = engines["unet"]
    engines["unet"] = Counting()  # type: ignore[assignment]
    yield rows
    engines["unet"] = unet


def test_guidance_one_needs_no_negative_rows(pipe: Pipeline) -> None:
    with rows_counted(pipe) as rows:
        for guidance in (1.0, 0.0, 2.0):
            pipe("a circle", steps=1, guidance=guidance, seed=0, sampler="euler")
    assert rows == [1, 1, 2]


def test_outside_the_guidance_interval_a_step_has_half_the_rows(pipe: Pipeline) -> None:
    with rows_counted(pipe) as rows:
        pipe("a circle", steps=4, guidance_interval=(0.25, 0.75), seed=0, sampler="euler")
    assert rows == [1, 2, 2, 1]


def test_a_deadline_ends_the_call(pipe: Pipeline) -> None:
    with pytest.raises(DeadlineError):
        pipe("a circle", deadline=1e-9, **QUICK)
    assert pipe("a circle", deadline=600, seed=0, **QUICK).pixels.any()


def test_a_call_that_waits_for_another_has_its_deadline_too(pipe: Pipeline) -> None:
    waiting: list[str] = []

    def on_step(step: Step) -> None:
        def second() -> None:
            with pytest.raises(DeadlineError):
                pipe("a circle", deadline=0.05, **QUICK)
            waiting.append("refused")

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    pipe("a circle", steps=1, sampler="euler", seed=0, on_step=on_step)
    assert waiting == ["refused"]


def test_the_noise_of_a_gpus_generator_draws_another_picture(pipe: Pipeline) -> None:
    cpu, cuda = (pipe("a circle", seed=0, noise=noise, **QUICK).pixels for noise in ("cpu", "cuda"))
    assert not np.array_equal(cpu, cuda)


def test_on_step_is_told_each_stage_and_ends_the_call_by_raising(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []

    class EnoughError(Exception):
        pass

    def on_step(step: Step) -> None:
        assert step.latents.shape == (1, 4, 8, 8)
        assert step.preview.shape == (1, 8, 8, 3) and step.preview.dtype == np.uint8
        seen.append((step.stage, step.stages))
        if step.stage == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        pipe("a circle", steps=5, seed=0, sampler="euler", on_step=on_step)
    assert seen == [(1, 5), (2, 5)]
    assert pipe("a circle", seed=0, **QUICK).pixels.any()  # and the pipeline goes on


def test_the_seconds_of_the_stages_fill_the_total(pipe: Pipeline) -> None:
    result = pipe("a circle", seed=0, **QUICK)
    assert set(result.seconds) == {"adapt", "tokenize", "encode", "denoise", "decode", "total"}
    stages = sum(value for name, value in result.seconds.items() if name != "total")
    assert 0 < stages <= result.seconds["total"]
    assert sum(result.step_seconds) <= result.seconds["denoise"]


def test_many_threads_get_each_its_own_picture(pipe: Pipeline) -> None:
    expected = {seed: pipe("a circle", seed=seed, **QUICK).pixels for seed in range(6)}
    found: dict[int, Any] = {}

    def draw(seed: int) -> None:
        found[seed] = pipe("a circle", seed=seed, **QUICK).pixels

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, pixels in expected.items():
        assert np.array_equal(found[seed], pixels)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", None]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"steps": 0}, "steps"),
        ({"sampler": "dimm"}, "sampler"),
        ({"size": (33, 32)}, "size"),
        ({"size": (32.0, 32)}, "size"),
        ({"size": (1 << 15, 1 << 15)}, "size"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": 1.5}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"n": 0}, "n"),
        ({"deadline": 0}, "deadline"),
        ({"noise": "gpu"}, "noise"),
        ({"guidance": "7"}, "guidance"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval"),
        ({"guidance_rescale": 2.0}, "guidance_rescale"),
        ({"prompt": "(circle", "prompt_syntax": "weighted"}, "prompt"),
        ({"prompt_syntax": "a1111"}, "prompt_syntax"),
        ({"clip_skip": 9}, "clip_skip"),
        ({"variation_seed": 3}, "variation_seed"),
        ({"variation_seed": 3, "variation_strength": 1.5}, "variation_strength"),
        ({"variation_seed": 3, "variation_strength": 0.5, "seed": [1]}, "variation_seed"),
        ({"spacing": "karas"}, "spacing"),
        ({"sampler": "euler", "steps": 3, "timesteps": [900, 10]}, "steps"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(pipe: Pipeline, request_: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        pipe(**({"prompt": "a circle"} | request_))


@given(width=st.integers(-9, 200), height=st.integers(-9, 200))
def test_every_size_is_either_drawable_or_refused(pipe: Pipeline, width: int, height: int) -> None:
    fits = width > 0 and height > 0 and width % 4 == 0 and height % 4 == 0
    try:
        assert check_size((width, height), pipe.manifest) == (width, height)
    except RequestError:
        assert not fits or width % 4 or height % 4


def test_a_closed_pipeline_says_so(sd1_bundle: Path) -> None:
    opened = Pipeline.load(sd1_bundle, "cpu")
    opened.close()
    with pytest.raises(ClosedError):
        opened("a circle", **QUICK)


def test_a_prompt_that_is_cut_is_said(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    cut = pipe("circle " * 100, seed=0, overflow="truncate", **QUICK)
    assert " 25 " in caplog.text
    assert not np.array_equal(cut.pixels, pipe("circle " * 100, seed=0, **QUICK).pixels)  # all of it is read


def test_weights_skipped_layers_and_learned_words_change_the_picture(pipe: Pipeline, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    plain = pipe("a red circle", seed=0, **QUICK).pixels
    weighted = pipe("a (red:1.5) circle", seed=0, prompt_syntax="weighted", **QUICK).pixels
    skipped = pipe("a red circle", seed=0, clip_skip=1, **QUICK).pixels
    file = tmp_path / "cat.safetensors"
    save_file({"<cat>": np.ones((2, 32), dtype=np.float32)}, str(file))
    unknown = pipe("a <cat>", seed=0, **QUICK).pixels
    assert pipe.add_embedding(file) == "<cat>" and pipe.embeddings == ("<cat>",)
    learned = pipe("a <cat>", seed=0, **QUICK).pixels
    pipe.remove_embedding("<cat>")
    assert np.array_equal(pipe("a <cat>", seed=0, **QUICK).pixels, unknown)
    pictures = [plain, weighted, skipped, unknown, learned]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_the_checkpoints_own_scheduler_is_the_default_sampler(pipe: Pipeline) -> None:
    assert pipe.manifest.schedule.scheduler == "PNDMScheduler"
    assert pipe("a circle", steps=2, seed=0).settings[0].sampler == "plms"


def test_variations_share_the_seed_and_count_their_own(pipe: Pipeline) -> None:
    plain = pipe("a circle", seed=3, **QUICK).pixels
    near, far = (
        pipe("a circle", seed=3, n=2, variation_seed=8, variation_strength=strength, **QUICK) for strength in (0.01, 1)
    )
    assert near.seeds == (3, 3)
    difference = [np.abs(one.pixels[0].astype(int) - plain[0]).mean() for one in (near, far)]
    assert 0 < difference[0] < difference[1]
    assert not np.array_equal(far.pixels[0], far.pixels[1])


def test_the_keywords_of_a_call_are_the_fields_of_a_request() -> None:
    fields = {*Request.__struct_fields__}
    assert fields == {"prompt", *Options.__annotations__}


def test_a_request_is_drawn_as_its_keywords_are(pipe: Pipeline) -> None:
    request = Request(prompt="a circle", steps=2, sampler="euler_ancestral", guidance=3.0, seed=5)
    assert np.array_equal(pipe.draw(request).pixels, pipe("a circle", seed=5, **QUICK).pixels)


def test_a_warm_up_is_optional_and_told(sd1_bundle: Path, pipe: Pipeline) -> None:
    assert pipe.warm_up_s == 0
    with Pipeline.load(sd1_bundle, "cpu", warm_up=True) as warm:
        assert warm.warm_up_s > 0
        assert np.array_equal(warm("a circle", seed=0, **QUICK).pixels, pipe("a circle", seed=0, **QUICK).pixels)
