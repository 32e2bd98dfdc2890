"""A video of an image is that of diffusers' StableVideoDiffusionPipeline; what it has not is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image
from safetensors.torch import save_file

from latentrt import Batcher
from latentrt.__main__ import cli
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CancelledError, CheckpointError, DeadlineError, RequestError
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption, LoraOption
from latentrt.export.sources.hub import choose_files
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.images.clip import DEVIATION, MEAN, read_whole_for_clip
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control, ImagePrompt, Lora, Request
from latentrt.runtime.verify.stages import verify_stages
from tests.refused import about

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, STEPS, SEED = (40, 32), 3, 3
ASKED: dict[str, Any] = {"size": SIZE, "steps": STEPS, "seed": SEED}
THEIR: dict[str, Any] = {"width": SIZE[0], "height": SIZE[1], "num_inference_steps": STEPS}
LEAST = 80.0  # dB of the last latents over their range


def picture(width: int = 260, height: int = 300, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.fixture(scope="module")
def pipe(svd: tuple[Path, Path]) -> Iterator[Pipeline]:
    with Pipeline.load(svd[1], "cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def theirs(svd: tuple[Path, Path]) -> StableVideoDiffusionPipeline:
    found = StableVideoDiffusionPipeline.from_pretrained(svd[0])
    found.set_progress_bar_config(disable=True)
    return found


def expected(theirs: StableVideoDiffusionPipeline, *, seed: int = SEED, **told: Any) -> tuple[Array, Array]:
    """Return diffusers' last latents, (frames, C, h, w), and its pixels, (frames, height, width, 3), 0 to 1."""
    told = {"image": picture(), "num_frames": 6, **THEIR, **told}
    latents = theirs(**told, output_type="latent", generator=torch.Generator().manual_seed(seed)).frames
    chunk = told.get("decode_chunk_size") or told["num_frames"]
    with torch.no_grad():
        pixels = theirs.decode_latents(latents, told["num_frames"], chunk)
    return latents[0].numpy(), (pixels[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5).clip(0, 1)


def drawn(pipe: Pipeline, **asked: Any) -> tuple[Array, Array]:
    """Return the last latents of a video, and its frames."""
    seen: list[Array] = []
    found = pipe.video(**{"image": picture(), **ASKED, **asked}, on_step=lambda step: seen.append(step.latents))
    return seen[-1], found.frames


def decibels(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(10 * np.log10(np.ptp(expected) ** 2 / np.mean((found - expected) ** 2)))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "frames": ({"frames": 3}, {"num_frames": 3}),
    "two frames": ({"frames": 2}, {"num_frames": 2}),
    "told": (
        {"fps": 14, "motion_bucket": 220, "noise_augmentation": 0.3},
        {"fps": 14, "motion_bucket_id": 220, "noise_aug_strength": 0.3},
    ),
    "not noised": ({"noise_augmentation": 0, "fps": 1}, {"noise_aug_strength": 0.0, "fps": 1}),
    "guided alike": ({"first_guidance": 2.5, "guidance": 2.5}, {"min_guidance_scale": 2.5, "max_guidance_scale": 2.5}),
    "guided from below 1": (
        {"first_guidance": 0.4, "guidance": 4.0},
        {"min_guidance_scale": 0.4, "max_guidance_scale": 4.0},
    ),
    "not guided": ({"guidance": 1.0}, {"max_guidance_scale": 1.0}),
    "decoded in chunks": ({"decode_chunk": 2}, {"decode_chunk_size": 2}),
    "decoded in uneven chunks": ({"decode_chunk": 4}, {"decode_chunk_size": 4}),
    "decoded one by one": ({"decode_chunk": 1}, {"decode_chunk_size": 1}),
    "another size": ({"size": (56, 24)}, {"width": 56, "height": 24}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_video_of_an_image_is_that_of_diffusers(
    pipe: Pipeline, theirs: StableVideoDiffusionPipeline, case: str
) -> None:
    asked, told = CASES[case]
    latents, pixels = expected(theirs, **told)
    found, frames = drawn(pipe, **asked)
    assert decibels(found, latents) > LEAST
    assert np.abs(frames[0] / 255 - pixels).max() < 1.01 / 255


def test_what_a_video_is_told_changes_it(pipe: Pipeline) -> None:
    plain = drawn(pipe)[0]
    for other in (
        {"fps": 14},
        {"motion_bucket": 220},
        {"noise_augmentation": 0.3},
        {"first_guidance": 3.0},
        {"image": picture(seed=1)},
    ):
        assert decibels(drawn(pipe, **other)[0], plain) < 60, other
    assert not np.array_equal(drawn(pipe)[1], drawn(pipe, decode_chunk=2)[1])  # the decoder sees neighbours


@pytest.mark.parametrize(
    ("sampler", "options"), [("euler", {}), ("euler_ancestral", {}), ("dpmpp_2m", {}), ("heun", {})]
)
def test_every_sampler_walks_the_noise_of_this_kind(pipe: Pipeline, sampler: str, options: dict[str, Any]) -> None:
    latents, _ = drawn(pipe, sampler=sampler, steps=4, **options)
    assert np.isfinite(latents).all()
    assert latents.std() < 5  # from 700


def test_the_same_noise_in_other_steps_is_diffusers(pipe: Pipeline, theirs: StableVideoDiffusionPipeline) -> None:
    scheduler = theirs.scheduler
    theirs.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    try:
        latents, _ = expected(theirs, num_inference_steps=7)
    finally:
        theirs.scheduler = scheduler
    assert decibels(drawn(pipe, steps=7)[0], latents) > LEAST


def test_videos_of_several_images_have_a_seed_each(pipe: Pipeline, theirs: StableVideoDiffusionPipeline) -> None:
    images = [picture(seed=seed) for seed in (1, 2)]
    told = {"image": images, "generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)], **THEIR}
    latents = theirs(**told, num_frames=4, output_type="latent").frames.flatten(0, 1).numpy()
    found, frames = drawn(pipe, image=images, n=2, seed=5, frames=4)
    assert decibels(found, latents) > LEAST
    assert frames.shape == (2, 4, SIZE[1], SIZE[0], 3)
    alone = drawn(pipe, image=images[1], seed=6, frames=4)[1]
    assert np.abs(frames[1].astype(int) - alone[0]).max() <= 1
    chunked = drawn(pipe, image=images, n=2, seed=5, frames=4, decode_chunk=3)[1]
    assert np.array_equal(chunked[1], drawn(pipe, image=images[1], seed=6, frames=4, decode_chunk=3)[1][0])


@pytest.mark.parametrize("size", [(500, 331), (224, 224), (17, 9), (1, 1), (90, 700)])
def test_an_image_is_shown_to_clip_as_diffusers_shows_it(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), np.uint8))
    found = read_whole_for_clip(image, side=224, name="image")
    if min(size) > 1:  # torch mirrors no picture of one pixel
        signed = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None] / 255 * 2 - 1
        shown = _resize_with_antialiasing(signed, (224, 224)) / 2 + 0.5
        wanted = (shown.numpy() - MEAN.reshape(3, 1, 1)) / DEVIATION.reshape(3, 1, 1)
        assert np.abs(found - wanted).max() < 1e-4
    assert found.shape == (1, 3, 224, 224)
    assert np.isfinite(found).all()


def test_previews_and_progress_have_a_row_for_each_frame(pipe: Pipeline) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    pipe.video(image=picture(), **ASKED, on_step=lambda step: seen.append((step.stage, step.preview.shape)))
    assert seen == [(stage, (6, 8, 10, 3)) for stage in (1, 2, 3)]


def test_a_video_of_an_image_ends_at_its_deadline_and_when_it_is_cancelled(pipe: Pipeline) -> None:
    with pytest.raises(DeadlineError):
        pipe.video(image=picture(), deadline=1e-6, **ASKED)
    cancel = Cancellation()
    with pytest.raises(CancelledError):
        pipe.video(image=picture(), cancel=cancel, on_step=lambda _: cancel.cancel(), **ASKED)


def test_tiles_cut_the_picture_and_not_the_video(pipe: Pipeline) -> None:
    whole, tiled = (drawn(pipe, size=(64, 64), tile=tile)[1].astype(int) for tile in (None, 48))
    assert tiled.shape == whole.shape
    assert np.abs(tiled - whole).mean() < 12  # seams are blended, and tiny networks see far


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image", {"image": None}),
        ("image", {"image": [picture()] * 2}),
        ("image", {"image": b"no picture"}),
        ("image", {"image": "no-such-file.png"}),
        ("prompt", {"prompt": "a red circle"}),
        ("frames", {"frames": 0}),
        ("frames", {"frames": 65}),
        ("window", {"window": 4}),
        ("overlap", {"overlap": 1}),
        ("fps", {"fps": -1}),
        ("fps", {"fps": 0.5}),
        ("fps", {"fps": float("nan")}),
        ("motion_bucket", {"motion_bucket": 256}),
        ("motion_bucket", {"motion_bucket": "much"}),
        ("noise_augmentation", {"noise_augmentation": -0.1}),
        ("first_guidance", {"first_guidance": -1.0}),
        ("guidance", {"guidance": float("inf")}),
        ("decode_chunk", {"decode_chunk": 0}),
        ("size", {"size": (33, 32)}),
        ("negative_prompt", {"negative_prompt": "blurred"}),
        ("loras", {"loras": [Lora(file="a.safetensors")]}),
        ("controls", {"controls": [Control(name="edges", image=picture())]}),
        ("image_prompts", {"image_prompts": [ImagePrompt(name="plus", image=picture())]}),
        ("strength", {"strength": 0.5}),
        ("mask", {"mask": np.full((32, 40), 255, np.uint8)}),
        ("refine_from", {"refine_from": 0.8}),
        ("original_size", {"original_size": (512, 512)}),
    ],
)
def test_what_no_video_of_an_image_has_is_refused(pipe: Pipeline, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, check=about(name)):
        pipe.video(**{"image": picture(), **ASKED, **options})


def test_pictures_are_refused_in_one_sentence(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="latentrt video"):
        pipe("a red circle")
    with Batcher(pipe) as batcher, pytest.raises(RequestError, match="latentrt video"):
        batcher.submit(Request(prompt="a red circle"))


def test_the_bundle_is_verified_stage_by_stage(svd: tuple[Path, Path]) -> None:
    bundle = Bundle.open(svd[1])
    rows = [*verify(bundle, backend="cpu"), *verify_stages(bundle, backend="cpu")]
    assert all(row.ok for row in rows), rows
    assert {row.what for row in rows} >= {"unet", "image_encoder", "vae_decoder", "vae_encoder"}


@pytest.mark.parametrize("ending", ["gif", "webp", "mp4"])
def test_the_command_writes_a_movie_of_an_image(svd: tuple[Path, Path], tmp_path: Path, ending: str) -> None:
    if ending == "mp4":
        pytest.importorskip("av")
    picture().save(tmp_path / "picture.png")
    words = ["video", str(svd[1]), "--image", str(tmp_path / "picture.png"), "--frames", "4", "--steps", "2"]
    words += ["--size", "32x32", "--seed", "3", "--fps", "5", "--json", "--backend", "cpu"]
    done = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / f"moving.{ending}")])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.output)
    assert (summary["frames"], summary["seed"], summary["fps"]) == (4, 3, 5)
    frames, size, rate = played(tmp_path / f"moving.{ending}")
    assert (frames, size, rate) == (4, (32, 32), 5)


def played(file: Path) -> tuple[int, tuple[int, int], float]:
    if file.suffix == ".mp4":
        import av

        with av.open(str(file)) as opened:
            stream = opened.streams.video[0]
            assert stream.average_rate is not None
            return sum(1 for _ in opened.decode(stream)), (stream.width, stream.height), float(stream.average_rate)
    with Image.open(file) as opened:
        opened.seek(1)
        opened.load()
        return opened.n_frames, opened.size, 1000 / opened.info["duration"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "words",
    [[], ["a red circle", "--image", "picture.png"], ["--image", "picture.png", "--fps", "-1"]],
)
def test_the_command_refuses_a_video_of_no_image(
    svd: tuple[Path, Path], tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("picture.png")
    done = CliRunner().invoke(cli, ["video", str(svd[1]), "-o", "x.gif", *words, "--json", "--backend", "cpu"])
    assert (done.exit_code, json.loads(done.output)["error"]["type"]) == (2, "RequestError")
    assert not Path("x.gif").exists()


def test_the_checkpoint_is_recognised(svd: tuple[Path, Path]) -> None:
    opened = open_checkpoint(str(svd[0]))
    assert (opened.family, opened.default_size) == ("svd", (40, 24))  # 16:9 of the square of its sample size
    assert opened.frames is not None
    assert (opened.frames.window, opened.frames.whole, opened.frames.guidance) == (6, True, (1.0, 3.0))
    manifest = Bundle.open(svd[1]).manifest
    assert manifest.schedule.edm is not None
    assert (manifest.schedule.edm.sigma_max, manifest.denoisers["unet"].shown) == (700, "image_encoder")


@pytest.mark.parametrize("part", ["image_encoder", "vae", "scheduler", "unet/config.json"])
def test_a_checkpoint_without_a_part_is_refused(svd: tuple[Path, Path], tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(svd[0], tmp_path / "checkpoint")
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(CheckpointError, match=f"[ /]{part}"):
        open_checkpoint(str(copy))


def test_an_image_encoder_of_another_width_is_refused(svd: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(svd[0], tmp_path / "checkpoint")
    config = json.loads((copy / "image_encoder" / "config.json").read_text())
    (copy / "image_encoder" / "config.json").write_text(json.dumps(config | {"projection_dim": 20}))
    with pytest.raises(CheckpointError, match="cross_attention_dim"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("--lora", {"loras": (LoraOption(path="a.safetensors", strength=1.0),)}),
        ("--vae", {"vae": "a"}),
        ("--unet", {"unet": "a"}),
        ("--controlnet", {"controlnets": (ControlNetOption(name="a", path="a"),)}),
        ("--adapter", {"adapters": (ControlNetOption(name="a", path="a"),)}),
        ("--ip-adapter", {"ip_adapters": (ControlNetOption(name="a", path="a"),)}),
        ("--motion-adapter", {"motion_adapter": "a"}),
        ("--refiner", {"refiner": "a"}),
        ("--skip-layers", {"skip_layers": (1,)}),
    ],
)
def test_what_is_for_pictures_is_refused_at_export(
    svd: tuple[Path, Path], option: str, options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=f"^{option}\\b"):
        open_checkpoint(str(svd[0]), options=CheckpointOptions(**options))


def test_a_single_file_is_refused_by_name(tmp_path: Path) -> None:
    names = {"input_blocks.0.0.weight": (8, 8, 3, 3), "middle_block.1.time_stack.0.attn1.to_q.weight": (8, 8)}
    tensors = {f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in names.items()}
    save_file(tensors, tmp_path / "svd_xt.safetensors")
    with pytest.raises(CheckpointError, match="Stable Video Diffusion"):
        open_checkpoint(str(tmp_path / "svd_xt.safetensors"))


def test_the_hub_is_asked_for_the_image_encoder_where_no_text_is_read() -> None:
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model")
    files = [f"{part}.safetensors" for part in parts]
    assert set(choose_files([*files, "svd_xt.safetensors"])) == set(files)
    assert "image_encoder/model.safetensors" not in choose_files([*files, "text_encoder/model.safetensors"])
