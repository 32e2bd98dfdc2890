"""SD 3 and 3.5 draw diffusers' pictures, from every start, with what a bundle holds of their text encoders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from latentrt import Batcher, BatcherOptions, Pipeline, Request
from latentrt.__main__ import cli
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError, RequestError
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PIXELS
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.preview import PICTURES as PREVIEW_PICTURES
from latentrt.export.graphs.preview import SIDE as PREVIEW_SIDE
from latentrt.export.graphs.preview import made_up_picture
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.options import CheckpointOptions
from latentrt.runtime.images.preview import preview
from tests.conftest import Make
from tests.refused import about
from tests.sd3 import TRANSFORMER, VAE, diffusers_sd3
from tests.test_families import LEAST, psnr
from tests.test_pipeline_images import left_half, photo

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, SEED, STEPS = "a red circle on blue", 3, 5
SIZE = (48, 32)
FACTOR, SIDE = 4, 16  # pixels a latent, and the longest side of the tiny checkpoint's in patches
LONG = "a red circle on blue and a square, " * 12


@pytest.fixture(scope="module", params=["", "dual t5"])
def kind(request: pytest.FixtureRequest, made: Make) -> tuple[Path, Path]:
    """Return a checkpoint and its bundle: of SD 3's kind, and of 3.5 medium's with T5."""
    return made("sd3", str(request.param))


@pytest.fixture(scope="module")
def plain(made: Make) -> tuple[Path, Path]:
    return made("sd3", "")


@pytest.fixture(scope="module")
def whole(made: Make) -> tuple[Path, Path]:
    return made("sd3", "dual t5")


@pytest.fixture(scope="module")
def ours() -> Iterator[Callable[..., Array]]:
    """Draw with a bundle, which stays open for the tests of this module."""
    opened: dict[Path, Pipeline] = {}

    def draw(bundle: Path, **request: Any) -> Array:
        if bundle not in opened:
            opened[bundle] = Pipeline.load(bundle, "cpu", threads=1)
        return opened[bundle](**{"prompt": PROMPT, "steps": STEPS, "seed": SEED} | request).pixels

    yield draw
    for pipe in opened.values():
        pipe.close()


def theirs(checkpoint: Path, name: str = "StableDiffusion3Pipeline", *, t5: bool = True, **request: Any) -> Array:
    return np.asarray((drawn(diffusers_sd3(checkpoint, name, t5=t5), output_type="np", **request) * 255).round())


def drawn(pipe: Any, **request: Any) -> Any:
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(SEED)}
    return pipe(**call | request).images


@pytest.mark.parametrize(
    ("request_", "call"),
    [
        ({"guidance": 4.0, "size": SIZE}, {"guidance_scale": 4.0, "width": 48, "height": 32}),
        ({"guidance": 7.0, "negative_prompt": "square"}, {"guidance_scale": 7.0, "negative_prompt": "square"}),
        ({"guidance": 1.0, "steps": 4}, {"guidance_scale": 1.0, "num_inference_steps": 4}),  # as Turbo is drawn
        ({"guidance": 4.0, "clip_skip": 1}, {"guidance_scale": 4.0, "clip_skip": 1}),
    ],
    ids=["guided", "negative and default size", "turbo", "clip skip"],
)
def test_pictures_are_those_of_diffusers(
    kind: tuple[Path, Path], ours: Callable[..., Array], request_: dict[str, Any], call: dict[str, Any]
) -> None:
    checkpoint, bundle = kind
    expected = theirs(checkpoint, **call)
    assert psnr(ours(bundle, **request_), expected) >= LEAST
    assert psnr(ours(bundle, **request_ | {"prompt": "blue"}), expected) < LEAST


def test_a_request_can_leave_t5_out(whole: tuple[Path, Path], ours: Callable[..., Array]) -> None:
    """Then zeros stand for what it would give, as where a checkpoint has none."""
    checkpoint, bundle = whole
    call: dict[str, Any] = {"prompt": LONG, "guidance_scale": 4.0, "width": 48, "height": 32}
    request: dict[str, Any] = {"prompt": LONG, "guidance": 4.0, "size": SIZE, "overflow": "truncate"}
    read, not_read = theirs(checkpoint, **call), theirs(checkpoint, **call, t5=False)
    assert psnr(read, not_read) < LEAST
    assert psnr(ours(bundle, **request), read) >= LEAST
    assert psnr(ours(bundle, **request, t5=False), not_read) >= LEAST
    with pytest.raises(RequestError, check=about("t5")):
        ours(bundle, t5=None)


def test_an_export_can_leave_t5_out(whole: tuple[Path, Path]) -> None:
    left = open_checkpoint(str(whole[0]), options=CheckpointOptions(t5=False))
    kept = open_checkpoint(str(whole[0]))
    assert set(kept.networks) - set(left.networks) == {"text_encoder_3"}
    assert set(kept.tokenizers) - set(left.tokenizers) == {"tokenizer_3"}
    assert not any("_3/" in name for name in left.files) and left.options != kept.options
    assert any("text_encoder_3/" in name for name in kept.files)


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.99, 1.0])
def test_an_image_is_changed_as_diffusers_does(
    plain: tuple[Path, Path], ours: Callable[..., Array], strength: float
) -> None:
    checkpoint, bundle = plain
    sizes = {"width": 32, "height": 32}
    expected = theirs(
        checkpoint,
        "StableDiffusion3Img2ImgPipeline",
        image=photo().resize((32, 32)),
        strength=strength,
        guidance_scale=4.0,
        **sizes,
    )
    found = ours(bundle, image=photo().resize((32, 32)), strength=strength, guidance=4.0)
    assert psnr(found, expected) >= LEAST


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.99, 1.0])
def test_a_mask_is_repainted_as_diffusers_does(
    plain: tuple[Path, Path], ours: Callable[..., Array], strength: float
) -> None:
    """diffusers 0.42.1 forgets the shift where its inpainting pipeline decodes: its latents are decoded here."""
    checkpoint, bundle = plain
    images = {"image": photo(), "mask_image": left_half(), "width": 40, "height": 32}
    pipe = diffusers_sd3(checkpoint, "StableDiffusion3InpaintPipeline")
    latents = drawn(pipe, **images, strength=strength, guidance_scale=4.0, output_type="latent")
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / VAE["scaling_factor"] + VAE["shift_factor"]).sample
    expected = np.asarray((pipe.image_processor.postprocess(decoded, output_type="np") * 255).round())
    found = ours(bundle, image=photo(), mask=left_half(), strength=strength, guidance=4.0)
    assert psnr(found, expected) >= LEAST


def test_the_manifest_says_what_the_configs_say(plain: tuple[Path, Path]) -> None:
    manifest = Bundle.open(plain[1]).manifest
    space, denoiser = manifest.latents, manifest.denoisers[manifest.denoiser]
    assert (space.channels, space.factor, space.multiple, space.largest) == (16, FACTOR, 2, 2 * SIDE)
    assert (space.scaling_factor, space.shift) == (VAE["scaling_factor"], VAE["shift_factor"])
    assert manifest.default_size == (TRANSFORMER["sample_size"] * FACTOR,) * 2
    assert denoiser.text_width == TRANSFORMER["joint_attention_dim"] and not denoiser.zero_negative
    *clips, third = denoiser.text_encoders
    assert [text.pooled for text in clips] == ["text_embeds"] * 2 and [text.skip for text in clips] == [1, 1]
    assert (third.component, third.tokenizer, third.tokens, third.join) == (None, None, 256, "length")


@pytest.mark.parametrize("size", [(36, 32), (32, 36), (4, 32), (136, 32), (32, 136)])
def test_sizes_beyond_the_positions_and_odd_ones_are_refused(
    plain: tuple[Path, Path], ours: Callable[..., Array], size: tuple[int, int]
) -> None:
    """Patches are 8 pixels here, and there are positions for 16 of them a side."""
    with pytest.raises(RequestError, check=about("size")):
        ours(plain[1], size=size)


def test_the_largest_size_and_one_patch_are_drawn(plain: tuple[Path, Path], ours: Callable[..., Array]) -> None:
    for size in ((128, 8), (8, 128)):
        found = ours(plain[1], size=size, guidance=1.0)
        expected = theirs(plain[0], width=size[0], height=size[1], guidance_scale=1.0)
        assert psnr(found, expected) >= LEAST


def test_an_image_is_cut_to_whole_patches(plain: tuple[Path, Path], ours: Callable[..., Array]) -> None:
    found = ours(plain[1], image=np.zeros((45, 39, 3), dtype=np.uint8), strength=0.5)
    assert found.shape[1:3] == (40, 32)


def test_a_long_prompt_is_read_in_chunks_and_cut_as_diffusers_does(
    plain: tuple[Path, Path], ours: Callable[..., Array]
) -> None:
    checkpoint, bundle = plain
    expected = theirs(checkpoint, prompt=LONG, guidance_scale=4.0, width=48, height=32)
    cut = ours(bundle, prompt=LONG, overflow="truncate", guidance=4.0, size=SIZE)
    assert psnr(cut, expected) >= LEAST
    assert psnr(ours(bundle, prompt=LONG, guidance=4.0, size=SIZE), expected) < LEAST


def test_a_picture_that_shares_its_stages_is_the_one_drawn_alone(plain: tuple[Path, Path]) -> None:
    asked = [
        Request(prompt="a red circle", seed=1, steps=4, size=SIZE, guidance=4.0),
        Request(prompt="blue", negative_prompt="square", seed=2, steps=6, size=SIZE, guidance=7.0),
        Request(prompt="a square", seed=3, steps=5, size=SIZE, guidance=1.0),
        Request(prompt="a red circle", seed=4, image=photo().resize(SIZE), strength=0.7, steps=5, guidance=4.0),
    ]
    with Pipeline.load(plain[1], "cpu", threads=1) as pipe:
        alone = [pipe.draw(request).pixels for request in asked]
        with Batcher(pipe, BatcherOptions(slots=4)) as batcher:
            shared = [future.result(120).pixels for future in [batcher.submit(one)[0] for one in asked]]
    for one, other in zip(shared, alone, strict=True):
        assert psnr(one, other) >= LEAST


def test_the_preview_was_fitted_on_latents_with_their_shift(plain: tuple[Path, Path]) -> None:
    """Over the pictures that it was fitted on, its mean colour is that of what the decoder makes of them."""
    bundle = Bundle.open(plain[1])
    space, generator = bundle.manifest.latents, np.random.default_rng(0)
    pictures = np.stack([made_up_picture(generator, PREVIEW_SIDE * FACTOR) for _ in range(PREVIEW_PICTURES)])
    with closing(open_engines(bundle, "cpu", components=("vae_encoder", "vae_decoder"), threads=1)) as opened:
        encoded = opened.engines["vae_encoder"]({"sample": pictures})["latent_parameters"]
        means = encoded[:, : space.channels].copy()
        colours = opened.engines["vae_decoder"]({"latent_sample": means})[PIXELS].mean(axis=(0, 1, 2))
    latents = space.scaled(means)
    np.testing.assert_allclose(preview(latents, space).mean(axis=(0, 1, 2)), colours, atol=1.0)
    np.testing.assert_allclose(space.unscaled(latents), means, atol=1e-5)


def test_what_a_checkpoint_is_can_be_seen_before_it_is_exported(plain: tuple[Path, Path]) -> None:
    seen = inspect_checkpoint(str(plain[0]))
    assert seen.problem is None and seen.picture == (64, 64) and "without T5" in seen.model
    kinds = {network.name for network in seen.networks}
    assert kinds == {"text_encoder", "text_encoder_2", "transformer", "vae"}


@pytest.mark.parametrize("option", ["unet", "adapters"])
def test_what_is_for_a_unet_is_refused(plain: tuple[Path, Path], option: str) -> None:
    given: Any = "x" if option == "unet" else ("x",)
    with pytest.raises(CheckpointError, match="transformer"):
        open_checkpoint(str(plain[0]), options=CheckpointOptions(**{option: given}))


def _edited(checkpoint: Path, target: Path, part: str, **changes: Any) -> Path:
    import json

    shutil.copytree(checkpoint, target)
    path = target / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("transformer", {"joint_attention_dim": 32}, "joint_attention_dim"),
        ("transformer", {"pooled_projection_dim": 65}, "pooled_projection_dim"),
        ("transformer", {"in_channels": 4, "out_channels": 4}, "channels"),
        ("transformer", {"pos_embed_max_size": None}, "pos_embed_max_size"),
        ("vae", {"shift_factor": "x"}, "shift_factor"),
    ],
)
def test_networks_that_do_not_belong_together_are_refused(
    plain: tuple[Path, Path], tmp_path: Path, part: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(str(_edited(plain[0], tmp_path / "other", part, **changes)))


def test_the_command_line_draws_and_verifies(whole: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, bundle = whole
    call = ["generate", str(bundle), PROMPT, "--seed", str(SEED), "--steps", str(STEPS), "--guidance", "4"]
    call += ["--size", "48x32", "--no-t5", "--backend", "cpu", "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(cli, call, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = np.asarray(Image.open(tmp_path / "a.png"))[None]
    assert psnr(found, theirs(checkpoint, t5=False, guidance_scale=4.0, width=48, height=32)) >= LEAST
    checked = CliRunner().invoke(cli, ["verify", str(bundle), "--backend", "cpu"], catch_exceptions=False)
    assert checked.exit_code == 0, checked.output
    refused = CliRunner().invoke(cli, [*call, "--size", "44x32", "--json"])
    assert refused.exit_code == 2


@pytest.mark.slow
def test_half_precision_draws_nearly_the_same(
    whole: tuple[Path, Path], ours: Callable[..., Array], tmp_path: Path
) -> None:
    """The weights and all of the transformer, T5 and both CLIPs in float16; on a CPU they compute in float32."""
    export_checkpoint(str(whole[0]), tmp_path / "half", precision="fp16")
    manifest = Bundle.open(tmp_path / "half").manifest
    assert all(one.error is not None and one.error < 1e-2 for one in manifest.components.values())
    request: dict[str, Any] = {"guidance": 4.0, "size": SIZE}
    assert psnr(ours(tmp_path / "half", **request), ours(whole[1], **request)) >= 30
