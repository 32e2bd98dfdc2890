"""The demo checkpoint: its pictures, its checker, its tokenizer, its constructed encoder, its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentrt.export.demo.checker import check_picture, count_right, read_picture
from latentrt.export.demo.drawing import (
    COLOURS,
    PATTERNS,
    SHAPES,
    Item,
    Pixels,
    Scene,
    any_scene,
    draw_scene,
    is_held_out,
    random_scene,
)
from latentrt.export.demo.training.autoencoder import SCALING, make_autoencoder, patch_statistics
from latentrt.export.demo.training.dataset import ATTRIBUTES, name_attributes
from latentrt.export.demo.training.decoder import make_decoder_state, train_decoder
from latentrt.export.demo.training.denoiser import FullPrecisionAttention, Schedule, make_state, make_unet
from latentrt.export.demo.training.evaluate import draw, load_pipeline
from latentrt.export.demo.training.saving import save_checkpoint
from latentrt.export.demo.training.tokens import CONTEXT, train_tokenizer
from latentrt.export.demo.training.train import CHECKPOINT
from latentrt.export.demo.wording import ONE_OBJECT, describe, fill, held_out_pairs, held_out_scenes

WHOLE_FOLDER_BYTES = 12_000_000
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def one_object(shape: str, colour: str, background: str, pattern: str = "plain", radius: float = 30.0) -> Scene:
    item = Item(shape=shape, colour=colour, centre=(64.0, 64.0), radius=radius)
    return Scene(items=(item,), background=background, pattern=pattern)


def sample_scenes(count: int, pairs: float = 0.0) -> list[Scene]:
    generator = np.random.default_rng(11)
    return [any_scene(generator, pairs=pairs) for _ in range(count)]


def draw_all(scenes: list[Scene]) -> Pixels:
    return np.stack([draw_scene(scene) for scene in scenes])


# ---------------------------------------------------------------- pictures and checker


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_every_drawn_picture_is_judged_right(pairs: float) -> None:
    scenes = sample_scenes(60, pairs)
    verdicts = [check_picture(draw_scene(scene), scene) for scene in scenes]
    assert count_right(verdicts) == dict.fromkeys(("shape", "colour", "background", "pattern", "right"), 1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [22.0, 39.0])
def test_every_shape_is_read_at_every_size(shape: str, radius: float) -> None:
    found = read_picture(draw_scene(one_object(shape, "red", "white", "checkered", radius))).objects[0]
    assert found is not None
    assert (found.shape, found.colour) == (shape, "red")
    assert found.overlap > 0.9


@pytest.mark.parametrize("background", COLOURS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_colour_is_read_before_every_background(background: str, pattern: str) -> None:
    for colour in COLOURS:
        if colour != background:
            reading = read_picture(draw_scene(one_object("circle", colour, background, pattern)))
            assert (reading.background, reading.pattern) == (background, pattern)
            assert reading.objects[0] is not None
            assert reading.objects[0].colour == colour


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        (one_object("square", "red", "blue"), "shape"),
        (one_object("circle", "green", "blue"), "colour"),
        (one_object("circle", "red", "yellow"), "background"),
    ],
)
def test_a_wrong_picture_is_judged_wrong(asked: Scene, wrong: str) -> None:
    verdict = check_picture(draw_scene(one_object("circle", "red", "blue")), asked)
    assert not getattr(verdict, wrong)
    assert not verdict.right


@pytest.mark.parametrize("kind", ["flat", "noise"])
def test_a_picture_without_an_object_is_judged_wrong(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    pixels = noise if kind == "noise" else np.full_like(noise, 245)
    assert not check_picture(pixels, one_object("circle", "red", "white")).shape


def test_exchanged_objects_are_judged_wrong() -> None:
    scene = sample_scenes(1, pairs=1.0)[0]
    verdict = check_picture(np.ascontiguousarray(draw_scene(scene)[:, ::-1]), scene)
    assert not verdict.colour


# ---------------------------------------------------------------- held-out rule and wording


def test_training_never_sees_a_held_out_combination() -> None:
    generator = np.random.default_rng(0)
    assert not any(random_scene(generator).held_out for _ in range(300))
    assert all(scene.held_out for scene in [*held_out_scenes(80, generator), *held_out_pairs(20, generator)])


def test_about_one_combination_in_ten_is_held_out() -> None:
    flags = [is_held_out(colour, shape, background) for colour in COLOURS for shape in SHAPES for background in COLOURS]
    assert 0.07 < np.mean(flags) < 0.13


def test_a_prompt_names_what_its_picture_shows() -> None:
    scene = one_object("circle", "orange", "blue", "striped", 22.0)
    assert fill(ONE_OBJECT[0], scene) == "a small orange circle on a striped blue background"
    assert fill(ONE_OBJECT[3], scene) == "an orange circle on a blue background"
    assert len(name_attributes(scene, fill(ONE_OBJECT[0], scene))) == len(ATTRIBUTES)


# ---------------------------------------------------------------- tokenizer


def test_every_word_of_the_prompts_is_one_token() -> None:
    generator = np.random.default_rng(0)
    prompts = [describe(random_scene(generator), generator) for _ in range(2000)]
    tokenizer = train_tokenizer(prompts)
    for prompt in prompts[:50]:
        tokens = tokenizer.tokenize(prompt)
        assert tokens == [f"{word}</w>" for word in prompt.replace(",", " ,").split()]


@pytest.mark.parametrize("text", ["zebra", "grüße", "世界", "🐈", "a red circle"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = train_tokenizer(["a red circle"])
    ids = tokenizer(text).input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-3), (torch.float16, 2e-2)])
def test_the_constructed_encoder_computes_patch_statistics(dtype: torch.dtype, tolerance: float) -> None:
    # tolerance: the group norm sees the signal beside its constants; float16 has 11 bits
    pictures = draw_all(sample_scenes(8))
    pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype)
    with torch.no_grad():
        latents = make_autoencoder().to(dtype).encode(pixels).latent_dist.mean.float().numpy() * SCALING
    np.testing.assert_allclose(latents, patch_statistics(pictures), atol=tolerance, rtol=tolerance)


def test_latents_have_about_unit_variance() -> None:
    spread = patch_statistics(draw_all(sample_scenes(200))).std((0, 2, 3))
    assert (spread[:3] > 0.8).all()
    assert (spread[:3] < 1.3).all()


def test_attention_in_full_precision_is_the_same_attention() -> None:
    torch.manual_seed(0)
    unet = make_unet().eval()
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, CONTEXT, 64))
    with torch.no_grad():
        expected = unet(*inputs).sample
        unet.set_attn_processor(FullPrecisionAttention())
        torch.testing.assert_close(unet(*inputs).sample, expected, atol=1e-5, rtol=1e-4)


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    schedule = Schedule(steps=1000, cool_down=200)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] < rates[50] < rates[100] == rates[800] == schedule.peak
    assert rates[-1] < schedule.peak / 20


def test_training_goes_on_from_its_file_as_if_never_stopped(tmp_path: Path) -> None:
    straight = make_decoder_state(0)
    list(train_decoder(straight, steps=2, batch=2, side=32, pool=4))
    halted, resumed = make_decoder_state(0), make_decoder_state(1)
    next(iter(train_decoder(halted, steps=2, batch=2, side=32, pool=4)))
    halted.save(tmp_path / "decoder.pt")
    resumed.load(tmp_path / "decoder.pt")
    list(train_decoder(resumed, steps=2, batch=2, side=32, pool=4))
    for name, weights in straight.vae.state_dict().items():
        torch.testing.assert_close(resumed.vae.state_dict()[name], weights, atol=1e-6, rtol=1e-5)


def test_a_saved_checkpoint_draws(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red circle"])
    model = make_state(len(tokenizer), tokenizer.eos_token_id, 0).average
    expected = {name: value.half() for name, value in model.text.state_dict().items()}
    save_checkpoint(tmp_path, tokenizer=tokenizer, text_encoder=model.text, unet=model.unet, vae=make_autoencoder())
    pipeline = load_pipeline(tmp_path)
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(value.half(), expected[name]), name
    assert draw(pipeline, ["a red circle"], 0, steps=2, guidance=3.0).shape == (1, 128, 128, 3)


# ---------------------------------------------------------------- the checkpoint in the repository


def test_the_checkpoint_has_the_files_of_stable_diffusion() -> None:
    files = {path.relative_to(CHECKPOINT).as_posix() for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < WHOLE_FOLDER_BYTES


def test_the_text_encoder_has_the_key_names_of_real_checkpoints() -> None:
    weights = load_file(CHECKPOINT / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_the_text_encoder_ends_where_the_tokenizer_does() -> None:
    settings = json.loads((CHECKPOINT / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((CHECKPOINT / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == vocabulary["<|endoftext|>"]
    assert settings["vocab_size"] == len(vocabulary)


def test_the_trained_decoder_restores_pictures() -> None:
    vae = load_pipeline(CHECKPOINT).vae
    pictures = draw_all(sample_scenes(12))
    with torch.no_grad():
        output = vae.decode(torch.from_numpy(patch_statistics(pictures)) / SCALING).sample
    error = output.permute(0, 2, 3, 1).clamp(-1, 1).numpy() - (pictures / 127.5 - 1)
    assert -10 * np.log10(np.mean(error**2) / 4) > 32


def judge(count: int) -> dict[str, float]:
    """Draw held-out prompts with diffusers and count what is right."""
    scenes = held_out_scenes(count, np.random.default_rng(0))
    prompts = [fill(ONE_OBJECT[0], scene) for scene in scenes]
    pictures = draw(load_pipeline(CHECKPOINT), prompts, 0, steps=20, guidance=3.0)
    verdicts = [check_picture(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return count_right(verdicts)


def test_six_held_out_prompts_come_out_right() -> None:
    assert judge(6)["right"] >= 5 / 6


@pytest.mark.slow
def test_most_held_out_prompts_come_out_right() -> None:
    assert judge(50)["right"] >= 0.9
