"""SD 3 and 3.5 in one file, as the first authors publish them: what it is, and that its weights are the directory's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.published import CONFIGS
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.networks import conversion, loading, modules
from latentrt.export.networks.components import COMPONENTS
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.hub import choose_files
from latentrt.export.sources.parts import WeightSource
from tests.sd3 import TRANSFORMER, VAE, make_sd3
from tests.single_sd3 import save_sd3_file

NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd3(tmp_path_factory.mktemp("sd3") / "checkpoint", t5=True, dual=True)


@pytest.fixture(scope="module")
def single(checkpoint: Path) -> Path:
    return save_sd3_file(checkpoint, checkpoint.parent / "whole.safetensors")


def test_a_file_has_the_weights_of_the_directory(checkpoint: Path, single: Path, tmp_path: Path) -> None:
    options = CheckpointOptions(config=str(checkpoint), tokenizer=str(checkpoint))
    one, other = open_checkpoint(str(single), options=options), open_checkpoint(str(checkpoint))
    assert (one.family, one.latents, one.dimensions, one.default_size, one.schedule) == (
        other.family,
        other.latents,
        other.dimensions,
        other.default_size,
        other.schedule,
    )
    assert set(one.networks) == set(other.networks) == set(NETWORKS)
    for name in NETWORKS:
        source, folder = one.networks[name], other.networks[name]
        assert isinstance(source, WeightSource) and isinstance(folder, Path)
        row = one.rows.get(name, name)
        takes = tuple(tensor.name for tensor in COMPONENTS[row].takes(one.dimensions))
        expected = loading.load(row, folder, takes=takes).state_dict()
        with conversion.written(source, tmp_path / name) as made:
            found = loading.load(row, made, takes=takes).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


def test_the_transformers_config_is_read_from_its_weights(checkpoint: Path, single: Path) -> None:
    """The rest is what was published, with whose text encoders this tiny one does not go."""
    with pytest.raises(CheckpointError, match="joint_attention_dim"):
        open_checkpoint(str(single), options=CheckpointOptions(tokenizer=str(checkpoint)))
    options = CheckpointOptions(config=str(checkpoint), tokenizer=str(checkpoint))
    found = open_checkpoint(str(single), options=options).configs["transformer"]
    known = json.loads((checkpoint / "transformer" / "config.json").read_text())
    assert {key: found[key] for key in TRANSFORMER} == {key: known[key] for key in TRANSFORMER}
    seen = inspect_checkpoint(str(single))
    assert seen.model == "Stable Diffusion 3.5" and str(seen.prediction).startswith("flow_prediction")
    assert {network.name for network in seen.networks} == {"vae", *NETWORKS[:4]}


def test_a_file_without_text_encoders_says_so(checkpoint: Path, tmp_path: Path) -> None:
    bare = save_sd3_file(checkpoint, tmp_path / "bare.safetensors", texts=())
    with pytest.raises(CheckpointError, match=r"CLIP L.*CLIP G"):
        open_checkpoint(str(bare))


def test_t5_can_be_left_in_the_file(checkpoint: Path, single: Path) -> None:
    config, clip = str(checkpoint), str(checkpoint / "tokenizer")
    with pytest.raises(CheckpointError, match="--no-t5"):
        open_checkpoint(str(single), options=CheckpointOptions(tokenizer=clip))
    left = open_checkpoint(str(single), options=CheckpointOptions(config=config, tokenizer=clip, t5=False))
    assert set(left.networks) == set(NETWORKS) - {"text_encoder_3"}
    assert set(left.tokenizers) == {"tokenizer", "tokenizer_2"} and left.options["t5"]


def test_published_configs_are_those_of_diffusers_shapes() -> None:
    """Sizes of the published SD 3.5 medium: what its transformer attends to is as wide as T5-XXL."""
    published: Any = CONFIGS["sd3"]
    widths = [published[name]["projection_dim"] for name in ("text_encoder", "text_encoder_2")]
    assert published["text_encoder_3"]["d_model"] == 4096 and sum(widths) == 2048
    assert (published["vae"]["scaling_factor"], published["vae"]["shift_factor"]) == (1.5305, 0.0609)


def test_a_tiny_decoder_takes_latents_as_the_denoiser_sees_them() -> None:
    """TAESD3's kind has a scale of 1 and no shift, and is given what the VAE would be."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            latent_channels=16, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        ).eval()  # fmt: skip
        seen = torch.randn(1, 16, 4, 4)
        latents = seen / VAE["scaling_factor"] + VAE["shift_factor"]
        module = modules.TinyDecoder(tiny, scaling_factor=VAE["scaling_factor"], shift=VAE["shift_factor"])
        torch.testing.assert_close(module(latents), tiny.decode(seen).sample, atol=1e-5, rtol=1e-5)


HUB = [
    "model_index.json",
    "sd3.5_medium.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoders/clip_g.safetensors",
    *(f"{name}/config.json" for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")),
    *(f"{name}/model.safetensors" for name in ("text_encoder", "text_encoder_2")),
    *(f"text_encoder_3/model-0000{number}-of-00002.safetensors" for number in (1, 2)),
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer/vocab.json",
    "tokenizer_3/tokenizer.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_of_a_repository_what_is_needed_is_fetched() -> None:
    whole = {file for file in HUB if file not in ("sd3.5_medium.safetensors", "text_encoders/clip_g.safetensors")}
    assert set(choose_files(HUB)) == whole
    left = {file for file in whole if not file.startswith(("text_encoder_3/", "tokenizer_3/"))}
    assert set(choose_files(HUB, without=("text_encoder_3",))) == left
