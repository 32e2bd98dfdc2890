"""SD 3 in one file is its directory weight for weight; what it lacks is asked for by name, and may be elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.safetensors_header import read_header
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.published import CONFIGS
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.networks import loading
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import WeightSource
from latentrt.export.sources.transformer_file import transformer_config
from tests.single_files import save_header, save_single_file
from tests.single_sd3 import TEXTS, checkpoint_tensors, joint_tensors, make_square_sd3, save_sd3_file


@pytest.fixture(scope="module", params=[False, True], ids=["medium", "dual"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 3 as a directory; the second of 3.5 medium's kind."""
    return make_square_sd3(tmp_path_factory.mktemp("sd3") / "checkpoint", dual=request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_square_sd3(tmp_path_factory.mktemp("plain") / "checkpoint")


def state(network: Path | WeightSource, row: str, folder: Path) -> dict[str, Any]:
    takes = ("sample", "timestep", "encoder_hidden_states", "pooled_projections")
    if isinstance(network, Path):
        return loading.load(row, network, takes=takes).state_dict()
    with written(network, folder):
        return loading.load(row, folder, takes=takes).state_dict()


ROWS = {
    "text_encoder": "projected_text_encoder",
    **{name: name for name in ("text_encoder_2", "text_encoder_3", "transformer", "vae_decoder", "vae_encoder")},
}


def alike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key].numpy(), tensor.numpy(), strict=True, err_msg=key)


def test_every_weight_of_a_file_is_that_of_its_directory(directory: Path, tmp_path: Path) -> None:
    file = save_sd3_file(directory, tmp_path / "model.safetensors")
    ours = open_checkpoint(str(file), options=CheckpointOptions(config=str(directory)))
    theirs = open_checkpoint(str(directory))
    assert (ours.family, ours.tokenizers) == ("sd3", theirs.tokenizers)
    assert (ours.schedule, ours.latents, ours.default_size, ours.dimensions) == (
        theirs.schedule,
        theirs.latents,
        theirs.default_size,
        theirs.dimensions,
    )
    assert ours.networks.keys() == theirs.networks.keys() == ROWS.keys()
    for component, row in ROWS.items():
        expected = state(theirs.networks[component], row, tmp_path)
        alike(state(ours.networks[component], row, tmp_path / "written"), expected)


def split_texts(directory: Path, root: Path) -> dict[str, Path]:
    """Write each text encoder as ComfyUI has it: in a file of its own, under transformers' names."""
    root.mkdir()
    found = {}
    for name, short in TEXTS.items():
        (file,) = (directory / name).glob("*.safetensors")
        found[name] = root / f"{short}.safetensors"
        save_file(load_file(file), found[name])
    return found


def test_text_encoders_may_be_in_files_of_their_own_or_in_a_directory(plain: Path, tmp_path: Path) -> None:
    file, theirs = save_sd3_file(plain, tmp_path / "model.safetensors", texts=()), open_checkpoint(str(plain))
    files = split_texts(plain, tmp_path / "texts")
    for given in ([str(path) for path in files.values()], [str(plain)]):
        options = CheckpointOptions(config=str(plain), text_encoders=tuple(given))
        ours = open_checkpoint(str(file), options=options)
        for component in TEXTS:
            expected = state(theirs.networks[component], ROWS[component], tmp_path)
            alike(state(ours.networks[component], ROWS[component], tmp_path / "written"), expected)
        assert {f"{name}/" in " ".join(ours.files) for name in TEXTS} == {True}


def test_without_t5_zeros_stand_for_it(plain: Path, tmp_path: Path) -> None:
    file = save_sd3_file(plain, tmp_path / "model.safetensors", texts=("text_encoder", "text_encoder_2"))
    ours = open_checkpoint(str(file), options=CheckpointOptions(config=str(plain), t5=False))
    assert "text_encoder_3" not in ours.networks
    assert ours.tokenizers.keys() == {"tokenizer", "tokenizer_2"}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_files_of_small_numbers_are_read_as_they_are(plain: Path, tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {key: tensor.to(kind) for key, tensor in checkpoint_tensors(plain).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    options = CheckpointOptions(config=str(plain))
    ours, theirs = open_checkpoint(str(tmp_path / "model.safetensors"), options=options), open_checkpoint(str(plain))
    for component in ("transformer", "text_encoder_3", "vae_decoder"):
        expected = state(theirs.networks[component], ROWS[component], tmp_path)
        found = state(ours.networks[component], ROWS[component], tmp_path / "written")
        for key, tensor in expected.items():
            np.testing.assert_array_equal(found[key].numpy(), tensor.to(kind).float().numpy(), err_msg=key)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), options=CheckpointOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_that_is_missing_is_named_with_what_gives_it(plain: Path, tmp_path: Path) -> None:
    tensors = {key: one for key, one in checkpoint_tensors(plain, texts=()).items() if "first_stage" not in key}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    told = refusal(tmp_path / "model.safetensors", config=str(plain))
    assert all(word in told for word in ("CLIP L", "CLIP G", "--text-encoder", "--vae")) and "--tokenizer" not in told
    bare = tmp_path / "bare"
    shutil.copytree(plain, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    told = refusal(save_sd3_file(plain, tmp_path / "whole.safetensors"), config=str(bare))
    assert "--tokenizer" in told and "tokenizer_3" in told


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "scaled fp8": ({"text_encoders.t5xxl.transformer.shared.scale_weight": torch.ones(1)}, "scale_weight"),
    "whole numbers": ({"model.diffusion_model.x.weight": torch.ones(2, 2, dtype=torch.uint8)}, "quantised"),
    "strangers": ({"somebody.else": torch.ones(2)}, "--config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(plain: Path, tmp_path: Path, name: str) -> None:
    more, told = REFUSED[name]
    tensors = {key: tensor.contiguous().clone() for key, tensor in checkpoint_tensors(plain).items()}
    save_file(tensors | more, tmp_path / "model.safetensors")
    options = {} if name == "strangers" else {"config": str(plain)}
    assert told in refusal(tmp_path / "model.safetensors", **options)


@pytest.mark.parametrize("name", ["directory", "file of another family", "nothing", "no text encoder"])
def test_text_encoders_that_are_none_are_refused(plain: Path, sd1_checkpoint: Path, tmp_path: Path, name: str) -> None:
    file = save_sd3_file(plain, tmp_path / "model.safetensors", texts=())
    given = {"nothing": tmp_path / "x", "no text encoder": plain / "vae" / "diffusion_pytorch_model.safetensors"}
    base = {"directory": plain, "file of another family": save_single_file(sd1_checkpoint, tmp_path / "sd1")}
    told = refusal(
        base.get(name, file),
        config=str(sd1_checkpoint if "family" in name else plain),
        text_encoders=(str(given.get(name, plain)),),
    )
    assert "--text-encoder" in told


# --- published sizes ---

COMMON = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "3 medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
    "3.5 medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "3.5 large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
        "qk_norm": "rms_norm",
    },
}


def weightless(config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Return the tensors of diffusers' network, without memory."""
    import diffusers.models.embeddings
    from diffusers import SD3Transformer2DModel

    def table(width: int, side: int, **_: Any) -> torch.Tensor:
        return torch.empty(side * side, width)

    monkeypatch.setattr(diffusers.models.embeddings, "get_2d_sincos_pos_embed", table)
    with torch.device("meta"):
        return dict(SD3Transformer2DModel(**config).state_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_recognised_and_their_config_read_from_the_shapes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {**COMMON, **PUBLISHED[name]}
    shapes = joint_tensors(weightless(config, monkeypatch), prefix="model.diffusion_model.")
    file = save_header(tmp_path / "model.safetensors", shapes)
    seen = inspect_checkpoint(str(file))
    assert seen.model in ("Stable Diffusion 3", "Stable Diffusion 3.5")
    assert seen.problem is not None and "--text-encoder" in seen.problem
    assert transformer_config(read_header(file)) == {key: config[key] for key in config if key != "sample_size"}


def test_published_configs_of_text_encoders_and_the_vae_are_those_of_the_libraries() -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.device("meta"):
        texts = [
            CLIPTextModelWithProjection(CLIPTextConfig(**CONFIGS["sd3"][name]))
            for name in ("text_encoder", "text_encoder_2")
        ]
        third, vae = (
            T5EncoderModel(T5Config(**CONFIGS["sd3"]["text_encoder_3"])),
            AutoencoderKL.from_config(dict(CONFIGS["sd3"]["vae"])),
        )
    counts = [sum(weight.numel() for weight in network.parameters()) for network in (*texts, third, vae)]
    # as published: CLIP L and G with their projections, T5-XXL's encoder, the VAE of 16 channels
    assert [round(count / 1e6) for count in counts] == [124, 695, 4762, 84]


def test_shards_of_a_directory_are_read(plain: Path, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    target = Path(shutil.copytree(plain, tmp_path / "sharded"))
    shutil.rmtree(target / "text_encoder_3")
    T5EncoderModel.from_pretrained(plain / "text_encoder_3").half().save_pretrained(
        target / "text_encoder_3", max_shard_size="20KB", variant="fp16"
    )
    index = json.loads(next((target / "text_encoder_3").glob("*index*")).read_text())
    assert len(set(index["weight_map"].values())) > 1
    ours = open_checkpoint(str(target))
    found = state(ours.networks["text_encoder_3"], "text_encoder_3", tmp_path)
    for key, tensor in state(plain / "text_encoder_3", "text_encoder_3", tmp_path).items():
        np.testing.assert_array_equal(found[key].numpy(), tensor.half().float().numpy(), err_msg=key)
