"""Videos are those of diffusers' AnimateDiff pipelines, and long ones are windows whose outputs are mixed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    MotionAdapter,
)
from PIL import Image
from safetensors.torch import save_file

from latentrt import Batcher
from latentrt.__main__ import cli
from latentrt.engines.bundle.windows import plan_windows, repeated, shares_of
from latentrt.engines.errors import CancelledError, DeadlineError, RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control, Lora, Request
from tests.conftest import Controlled

PROMPT, NEGATIVE, SIZE = "a red circle", "blue", (40, 32)
ASKED: dict[str, Any] = {"negative_prompt": NEGATIVE, "size": SIZE, "steps": 4, "spacing": "linspace"}
THEIR: dict[str, Any] = {
    "negative_prompt": NEGATIVE,
    "width": SIZE[0],
    "height": SIZE[1],
    "num_inference_steps": 4,
    "output_type": "latent",
}
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}


@pytest.fixture(scope="module")
def pipe(motion: Controlled) -> Iterator[Pipeline]:
    with Pipeline.load(motion.bundle, "cpu") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def base(motion: Controlled) -> AnimateDiffPipeline:
    adapter = MotionAdapter.from_pretrained(motion.networks["motion"])
    return AnimateDiffPipeline.from_pretrained(motion.checkpoint, motion_adapter=adapter)


def theirs(base: AnimateDiffPipeline, kind: Any = AnimateDiffPipeline, sampler: str = "ddim", **parts: Any) -> Any:
    """Return one of diffusers' pipelines, told the noise of AnimateDiff as its documentation tells it."""
    config = {"beta_schedule": "linear", "timestep_spacing": "linspace", "clip_sample": False}
    scheduler = SCHEDULERS[sampler].from_config(base.scheduler.config, **config)
    found = kind(**{**base.components, **parts, "scheduler": scheduler})
    found.set_progress_bar_config(disable=True)
    return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_frame(latents: Any) -> Array:
    """(b, C, F, h, w) -> (b * F, C, h, w)"""
    return np.asarray(latents.permute(0, 2, 1, 3, 4).flatten(0, 1).numpy())


def drawn(pipe: Pipeline, *arguments: Any, **options: Any) -> tuple[Any, Array]:
    """Return a video and its last latents."""
    seen: list[Array] = []
    found = pipe.video(*arguments, on_step=lambda step: seen.append(step.latents), **ASKED | options)
    return found, seen[-1]


def decibels(found: Array, expected: Array) -> float:
    return float(10 * np.log10(np.ptp(expected) ** 2 / np.mean((found - expected) ** 2)))


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", 7.5), ("euler", 7.5), ("euler_a", 1.0), ("lcm", 1.0)])
def test_a_video_is_that_of_diffusers(pipe: Pipeline, base: AnimateDiffPipeline, sampler: str, guidance: float) -> None:
    told = {**THEIR, "num_frames": 8, "guidance_scale": guidance}
    expected = theirs(base, sampler=sampler)(PROMPT, **told, generator=seeded(3)).frames
    spacing = None if sampler == "lcm" else "linspace"
    found, latents = drawn(pipe, PROMPT, 8, seed=3, sampler=sampler, guidance=guidance, spacing=spacing)
    assert found.frames.shape == (1, 8, SIZE[1], SIZE[0], 3)
    assert decibels(latents, by_frame(expected)) > 80
    with torch.no_grad():
        pixels = theirs(base).decode_latents(expected).permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5
    assert np.abs(found.frames / 255 - pixels.clip(0, 1)).max() < 1.01 / 255
    assert np.abs(np.diff(found.frames.astype(int), axis=1)).mean() > 5  # it moves


def test_two_videos_have_a_seed_each(pipe: Pipeline, base: AnimateDiffPipeline) -> None:
    told = {**THEIR, "num_frames": 4, "generator": [seeded(5), seeded(6)], "negative_prompt": [NEGATIVE] * 2}
    found, latents = drawn(pipe, PROMPT, 4, seed=5, n=2, sampler="ddim")
    assert decibels(latents, by_frame(theirs(base)([PROMPT] * 2, **told).frames)) > 80
    assert (found.frames.shape[:2], found.seeds) == ((2, 4), (5, 6))


def test_a_video_starts_from_images(pipe: Pipeline, base: AnimateDiffPipeline) -> None:
    images = [Image.fromarray(one) for one in np.random.default_rng(0).integers(0, 256, (5, 32, 40, 3), np.uint8)]
    told = {name: value for name, value in THEIR.items() if name not in ("width", "height")}
    video = theirs(base, AnimateDiffVideoToVideoPipeline)
    expected = video(images, prompt=PROMPT, strength=0.6, height=32, width=40, **told, generator=seeded(2)).frames
    _, latents = drawn(pipe, PROMPT, 5, seed=2, image=images, strength=0.6, sampler="ddim")
    assert decibels(latents, by_frame(expected)) > 80


def test_a_video_follows_an_image_for_each_frame(pipe: Pipeline, base: AnimateDiffPipeline, motion: Controlled) -> None:
    images = [Image.fromarray(one) for one in np.random.default_rng(1).integers(0, 256, (4, 32, 40, 3), np.uint8)]
    edges = ControlNetModel.from_pretrained(motion.networks["edges"])
    network = theirs(base, AnimateDiffControlNetPipeline, controlnet=edges)
    told = {**THEIR, "num_frames": 4, "conditioning_frames": images, "controlnet_conditioning_scale": 0.8}
    expected = network(PROMPT, **told, generator=seeded(4)).frames
    _, latents = drawn(
        pipe, PROMPT, 4, seed=4, sampler="ddim", controls=[Control(name="edges", image=images, scale=0.8)]
    )
    assert decibels(latents, by_frame(expected)) > 80


def test_a_long_video_is_windows_whose_outputs_are_mixed(pipe: Pipeline, base: AnimateDiffPipeline) -> None:
    frames, window, overlap, scale = 10, 4, 2, 7.5
    _, latents = drawn(pipe, PROMPT, frames, window=window, overlap=overlap, seed=8, sampler="ddim", guidance=scale)
    network = theirs(base)
    text = torch.cat([one.detach() for one in network.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)])
    network.scheduler.set_timesteps(4)
    sample = torch.randn((1, 4, frames, 4 * 2, 5 * 2), generator=seeded(8))
    for time in network.scheduler.timesteps:
        total, say = torch.zeros_like(sample), torch.zeros(frames)
        for start in (0, 2, 4, 6):
            part = slice(start, start + window)
            with torch.no_grad():
                own, negative = (
                    network.unet(sample[:, :, part], time, one[None].repeat(window, 1, 1)).sample for one in text
                )
            weights = torch.tensor([1.0, 2, 2, 1])
            total[:, :, part] += weights[:, None, None] * (negative + scale * (own - negative))
            say[part] += weights
        sample = network.scheduler.step(total / say[:, None, None], time, sample).prev_sample
    assert decibels(latents, by_frame(sample)) > 80


def test_a_lora_of_the_motion_modules_is_for_one_call(
    pipe: Pipeline, base: AnimateDiffPipeline, tmp_path: Path
) -> None:
    module = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_v"
    down, up = torch.randn(2, 16, generator=seeded(1)), torch.randn(16, 2, generator=seeded(2))
    file = tmp_path / "zoom-in.safetensors"
    save_file({f"unet.{module}.lora.down.weight": down, f"unet.{module}.lora.up.weight": up}, file)
    weight = base.unet.get_submodule(module).weight
    before, told = weight.data.clone(), {**THEIR, "num_frames": 4}
    _, plain = drawn(pipe, PROMPT, 4, seed=3, sampler="ddim")
    _, changed = drawn(pipe, PROMPT, 4, seed=3, sampler="ddim", loras=[Lora(file=file, scale=0.7)])
    weight.data += 0.7 * up @ down
    try:
        expected = theirs(base)(PROMPT, **told, generator=seeded(3)).frames
    finally:
        weight.data = before
    assert decibels(changed, by_frame(expected)) > 70
    assert decibels(plain, by_frame(expected)) < 60


def test_windows_cover_every_frame_and_their_shares_add_up() -> None:
    for frames, window, overlap in [(1, 16, 4), (16, 16, 4), (17, 16, 4), (40, 16, 0), (33, 8, 7), (9, 4, 1)]:
        windows = plan_windows(frames, window, overlap)
        assert {len(one) for one in windows} == {min(frames, window)}
        assert sorted({frame for one in windows for frame in one}) == list(range(frames))
        assert len(set(windows)) == len(windows)
        rows = np.array(windows).reshape(-1)
        assert np.allclose(np.bincount(rows, weights=shares_of(windows)), 1)
        assert (shares_of(windows) > 0).all()
    assert repeated(((0, 1), (1, 2)), 2, 3) == ((0, 1), (1, 2), (3, 4), (4, 5))


def test_text_is_mixed_between_frames(pipe: Pipeline) -> None:
    plain, first = drawn(pipe, PROMPT, 5, seed=1)
    same, again = drawn(pipe, {2: PROMPT}, 5, seed=1)
    assert np.array_equal(first, again)
    assert np.array_equal(plain.frames, same.frames)
    _, mixed = drawn(pipe, {0: PROMPT, 4: "a blue square"}, 5, seed=1)
    _, other = drawn(pipe, "a blue square", 5, seed=1)
    assert not np.allclose(mixed, first)
    assert not np.allclose(mixed, other)


def test_a_picture_of_a_motion_bundle_is_a_video_of_one_frame(pipe: Pipeline) -> None:
    video = pipe.video(PROMPT, 1, seed=9, **ASKED)
    pictures = pipe(PROMPT, n=2, seed=8, **ASKED)
    assert np.array_equal(video.frames[0, 0], pictures.pixels[1])


def test_a_motion_bundle_is_served_pictures(pipe: Pipeline) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "negative_prompt"}
    expected = pipe(PROMPT, seed=8, **asked).pixels
    with Batcher(pipe) as batcher:
        (ticket,) = batcher.submit(Request(prompt=PROMPT, seed=8, **asked))
        found = ticket.result(timeout=300).pixels
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_a_video_ends_at_its_deadline(pipe: Pipeline) -> None:
    with pytest.raises(DeadlineError):
        pipe.video(PROMPT, 4, deadline=1e-6, **ASKED)


def test_a_video_is_cancelled_between_two_stages(pipe: Pipeline) -> None:
    cancel = Cancellation()
    with pytest.raises(CancelledError):
        pipe.video(PROMPT, 4, cancel=cancel, on_step=lambda _: cancel.cancel(), **ASKED)


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 0},
        {"frames": 2.5},
        {"window": 25},
        {"window": 4, "overlap": 4},
        {"frames": 30, "guidance_rescale": 0.5},
        {"mask": np.zeros((32, 40), np.uint8), "image": np.zeros((32, 40, 3), np.uint8)},
        {"variation_seed": 1, "variation_strength": 0.5},
        {"image": [np.zeros((32, 40, 3), np.uint8)] * 3},
        {"prompt": {}},
        {"prompt": {16: "a"}},
        {"prompt": {"a": "b"}},
        {"negative_prompt": ["a", "b"]},
    ],
)
def test_what_no_video_has_is_refused(pipe: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        pipe.video(**{"prompt": PROMPT, "frames": 16, **ASKED, **options})


def test_the_command_writes_a_movie(motion: Controlled, tmp_path: Path) -> None:
    words = ["video", str(motion.bundle), "a red circle@0", "a blue square@3", "--frames", "4", "--steps", "2"]
    words += ["--size", "32x32", "--seed", "3", "--fps", "5", "--json", "--backend", "cpu"]
    done = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "first.gif")])
    assert done.exit_code == 0, done.output
    assert (json.loads(done.output)["frames"], json.loads(done.output)["seed"]) == (4, 3)
    with Image.open(tmp_path / "first.gif") as opened:
        assert (opened.size, opened.n_frames, opened.info["duration"]) == ((32, 32), 4, 200)  # type: ignore[attr-defined]
    again = [*words, "--image", str(tmp_path / "first.gif"), "--control", f"edges={tmp_path / 'first.gif'}"]
    done = CliRunner().invoke(cli, [*again, "-o", str(tmp_path / "second.webp")])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "second.webp") as opened:
        assert opened.n_frames == 4  # type: ignore[attr-defined]


def test_the_command_writes_an_mp4(motion: Controlled, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    words = ["video", str(motion.bundle), "a red circle", "--frames", "3", "--steps", "2", "--size", "32x32"]
    done = CliRunner().invoke(cli, [*words, "--fps", "5", "--backend", "cpu", "-o", str(tmp_path / "video.mp4")])
    assert done.exit_code == 0, done.output
    with av.open(str(tmp_path / "video.mp4")) as opened:
        stream = opened.streams.video[0]
        assert (sum(1 for _ in opened.decode(stream)), stream.width, float(stream.average_rate)) == (3, 32, 5)


def test_guidance_goes_from_the_first_frame_to_the_last(pipe: Pipeline) -> None:
    _, rising = drawn(pipe, PROMPT, 4, seed=3, guidance=6.0, first_guidance=1.5)
    _, alike = drawn(pipe, PROMPT, 4, seed=3, guidance=6.0)
    _, same = drawn(pipe, PROMPT, 4, seed=3, guidance=6.0, first_guidance=6.0)
    assert np.array_equal(alike, same)
    assert not np.allclose(rising, alike)


@pytest.mark.parametrize("name", ["motion_bucket", "noise_augmentation"])
def test_what_is_for_videos_of_an_image_is_refused(pipe: Pipeline, name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}"):
        pipe.video(PROMPT, 4, **{name: 1}, **ASKED)
    with pytest.raises(RequestError, match=r"^prompt"):
        pipe.video(frames=4, **ASKED)


@pytest.mark.parametrize(
    ("words", "kind"),
    [(["a", "b"], "RequestError"), (["a@0", "--frames", "0"], "RequestError"), (["a", "-o", "x.avi"], "RequestError")],
)
def test_the_command_refuses_in_one_sentence(
    motion: Controlled, tmp_path: Path, words: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["video", str(motion.bundle), "-o", "x.gif", *words, "--json", "--backend", "cpu"])
    assert (done.exit_code, json.loads(done.output)["error"]["type"]) == (2, kind)
    assert not list(tmp_path.iterdir())


def test_a_bundle_of_pictures_draws_no_video(sd1_bundle: Path) -> None:
    with Pipeline.load(sd1_bundle, "cpu") as pipe, pytest.raises(RequestError, match="--motion-adapter"):
        pipe.video(PROMPT)
