"""Every family of checkpoints draws diffusers' pictures, from every start that it knows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.conditioning import embed_guidance
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import KeyFrame
from tests.conftest import Make
from tests.refused import about
from tests.test_pipeline_images import left_half, photo

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST = 50.0  # dB over the range of pixels: float32 sums in another order, amplified by random weights
PROMPT, NEGATIVE = "a red circle on blue", "square"
SEED, STEPS = 3, 4


def reference(kind: Any, checkpoint: Path, scheduler: Any, **config: Any) -> Any:
    pipe = kind.from_pretrained(checkpoint)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, **request: Any) -> Array:
    generator = torch.Generator().manual_seed(SEED)
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "np", "generator": generator}
    return np.asarray((pipe(**call | request).images * 255).round())


def ours(bundle: Path, **request: Any) -> Array:
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        return pipe(**{"prompt": PROMPT, "steps": STEPS, "seed": SEED} | request).pixels


def psnr(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else 20 * math.log10(255) - 10 * math.log10(error)


@pytest.mark.parametrize("guidance", [1.5, 6.5])
def test_a_consistency_model_is_told_its_guidance(made: Make, guidance: float) -> None:
    checkpoint, bundle = made("sd1", "lcm")
    pipe = reference(diffusers.StableDiffusionPipeline, checkpoint, diffusers.LCMScheduler)
    expected = theirs(pipe, guidance_scale=guidance)
    assert psnr(ours(bundle, guidance=guidance, sampler="lcm"), expected) >= LEAST
    assert psnr(ours(bundle, guidance=guidance + 2, sampler="lcm"), expected) < LEAST


def test_the_embedded_guidance_is_diffusers() -> None:
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    for width in (16, 256):
        expected = embed(None, torch.tensor([6.5]), embedding_dim=width).numpy()[0]
        np.testing.assert_allclose(embed_guidance(7.5, width), expected, atol=2e-3)  # angles of thousands in float32


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_inpainting_unet_repaints_as_diffusers_does(made: Make, strength: float) -> None:
    checkpoint, bundle = made("sd1", "inpainting")
    pipe = reference(diffusers.StableDiffusionInpaintPipeline, checkpoint, diffusers.DDIMScheduler, clip_sample=False)
    images = {"image": photo(), "mask_image": left_half(), "width": 40, "height": 32}
    expected = theirs(pipe, **images, strength=strength, guidance_scale=2.0)
    found = ours(bundle, image=photo(), mask=left_half(), strength=strength, guidance=2.0, sampler="ddim")
    assert psnr(found, expected) >= LEAST


def test_an_inpainting_unet_without_a_mask_is_refused(made: Make) -> None:
    _, bundle = made("sd1", "inpainting")
    with pytest.raises(RequestError, check=about("mask")):
        ours(bundle)


def test_sizes_are_for_checkpoints_that_were_told_them(made: Make) -> None:
    _, bundle = made("sd1", "lcm")
    with pytest.raises(RequestError, check=about("crop")):
        ours(bundle, crop=(3, 4))


WIDTHS = {"clip_l": 32, "clip_g": 48}  # of the tiny text encoders
XL: dict[str, Any] = {"guidance": 5.0, "size": (40, 32)}


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
def test_sdxl_draws_the_pictures_of_diffusers(made: Make, negative: str | None) -> None:
    """Where no negative prompt is given there are zeros, and an empty one is encoded."""
    checkpoint, bundle = made("sdxl", "")
    pipe = reference(diffusers.StableDiffusionXLPipeline, checkpoint, diffusers.EulerDiscreteScheduler)
    expected = theirs(pipe, negative_prompt=negative, guidance_scale=5.0, width=40, height=32)
    given = {} if negative is None else {"negative_prompt": negative}
    assert psnr(ours(bundle, **given, **XL), expected) >= LEAST
    other = {None: "", "": None, NEGATIVE: None}[negative]
    assert psnr(ours(bundle, negative_prompt=other, **XL), expected) < LEAST


def test_each_picture_of_sdxl_has_its_own_negative_prompt_or_none(made: Make) -> None:
    _, bundle = made("sdxl", "")
    negatives = [None, "", NEGATIVE]
    together = ours(bundle, prompt=[PROMPT] * 3, negative_prompt=negatives, seed=[SEED] * 3, **XL)
    for picture, negative in zip(together, negatives, strict=True):
        assert psnr(picture[None], ours(bundle, negative_prompt=negative, **XL)) >= LEAST


def test_key_frames_have_a_negative_prompt_or_none(made: Make) -> None:
    _, bundle = made("sdxl", "")
    keys = [KeyFrame(prompt=PROMPT, seed=SEED, negative_prompt=negative) for negative in (None, "")]
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        found = np.concatenate([result.pixels for result in pipe.animate(keys, 2, steps=STEPS, **XL)])
    for picture, key in zip(found, keys, strict=True):
        assert psnr(picture[None], ours(bundle, negative_prompt=key.negative_prompt, **XL)) >= LEAST


def test_sdxl_is_told_sizes_and_crops(made: Make) -> None:
    checkpoint, bundle = made("sdxl", "")
    pipe = reference(diffusers.StableDiffusionXLPipeline, checkpoint, diffusers.EulerDiscreteScheduler)
    sizes: dict[str, Any] = {"original_size": (96, 64), "target_size": (80, 64)}
    told = {name: size[::-1] for name, size in sizes.items()} | {"crops_coords_top_left": (3, 5)}
    expected = theirs(pipe, guidance_scale=5.0, width=40, height=32, **told)
    assert psnr(ours(bundle, crop=(3, 5), **sizes, **XL), expected) >= LEAST


@pytest.mark.parametrize("masked", [False, True])
def test_sdxl_starts_from_an_image(made: Make, masked: bool) -> None:
    checkpoint, bundle = made("sdxl", "")
    kinds = {False: diffusers.StableDiffusionXLImg2ImgPipeline, True: diffusers.StableDiffusionXLInpaintPipeline}
    pipe = reference(kinds[masked], checkpoint, diffusers.EulerDiscreteScheduler)
    sizes = {"mask_image": left_half(), "width": 40, "height": 32} if masked else {}
    expected = theirs(pipe, image=photo(), strength=0.6, guidance_scale=5.0, **sizes)
    request = {"mask": left_half()} if masked else {}
    assert psnr(ours(bundle, image=photo(), strength=0.6, guidance=5.0, **request), expected) >= LEAST


def test_sdxl_learns_words_as_diffusers_does(made: Make, tmp_path: Path) -> None:
    """A word of two vectors for each of the two text encoders, as files for SDXL have them."""
    checkpoint, bundle = made("sdxl", "")
    generator = np.random.default_rng(5)
    rows = {name: generator.normal(0, 0.5, (2, width)).astype(np.float32) for name, width in WIDTHS.items()}
    save_file(rows, tmp_path / "cat.safetensors")
    pipe = reference(diffusers.StableDiffusionXLPipeline, checkpoint, diffusers.EulerDiscreteScheduler)
    encoders = {"clip_l": (pipe.text_encoder, pipe.tokenizer), "clip_g": (pipe.text_encoder_2, pipe.tokenizer_2)}
    for name, (encoder, tokenizer) in encoders.items():
        pipe.load_textual_inversion(
            {"cat": torch.from_numpy(rows[name])}, token="<cat>", text_encoder=encoder, tokenizer=tokenizer
        )
    expected = theirs(pipe, prompt="a red <cat>", guidance_scale=5.0, width=40, height=32)
    with Pipeline.load(bundle, "cpu", threads=1) as opened:
        request: dict[str, Any] = {"prompt": "a red <cat>", "steps": STEPS, "seed": SEED, **XL}
        plain = opened(**request).pixels
        assert opened.add_embedding(tmp_path / "cat.safetensors", name="<cat>") == "<cat>"
        assert psnr(opened(**request).pixels, expected) >= LEAST
        assert psnr(plain, expected) < LEAST
        opened.remove_embedding("<cat>")
        assert np.array_equal(opened(**request).pixels, plain)


def test_words_for_other_text_encoders_are_refused(made: Make, tmp_path: Path) -> None:
    rows = {name: np.zeros((1, width), dtype=np.float32) for name, width in {"<cat>": 32, **WIDTHS}.items()}
    refused = {
        ("sd1", "lcm"): [("clip_l", "clip_g"), ("clip_g",)],
        ("sdxl", ""): [("<cat>",), ("clip_l",), ("clip_g",)],
    }
    for made_of, files in refused.items():
        with Pipeline.load(made(*made_of)[1], "cpu", threads=1) as pipe:
            for keys in files:
                save_file({key: rows[key] for key in keys}, tmp_path / "word.safetensors")
                with pytest.raises(RequestError, check=about("embeddings")):
                    pipe.add_embedding(tmp_path / "word.safetensors")
            assert pipe.embeddings == ()
    narrow = tmp_path / "narrow.safetensors"
    save_file({"clip_l": np.zeros((1, 32), dtype=np.float32), "clip_g": np.zeros((1, 7), dtype=np.float32)}, narrow)
    with Pipeline.load(made("sdxl", "")[1], "cpu", threads=1) as pipe:
        with pytest.raises(RequestError, check=about("embeddings")):
            pipe.add_embedding(narrow)
        assert pipe.embeddings == ()  # the first encoder has forgotten it again


def test_sdxl_skips_layers_as_diffusers_does(made: Make) -> None:
    checkpoint, bundle = made("sdxl", "")
    pipe = reference(diffusers.StableDiffusionXLPipeline, checkpoint, diffusers.EulerDiscreteScheduler)
    expected = theirs(pipe, clip_skip=1, guidance_scale=1.0, width=32, height=32)
    assert psnr(ours(bundle, clip_skip=1, guidance=1.0), expected) >= LEAST
