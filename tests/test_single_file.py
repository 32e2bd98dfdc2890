"""A checkpoint in one file is its directory weight for weight; what the file cannot say is asked for by name.

tests/test_lora.py draws pictures from a bundle that was exported from one file.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from click.testing import CliRunner

from latentrt.engines.bundle.manifest import Family
from latentrt.engines.errors import CheckpointError, LatentrtError
from latentrt.export.checkpoint import DEMO, open_checkpoint
from latentrt.export.cli import export
from latentrt.export.configs.published import CONFIGS
from latentrt.export.networks import loading
from latentrt.export.networks.conversion import read_tensors, written
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import WeightSource
from latentrt.export.sources.tokenizer import read_tokenizer
from latentrt.export.work.jobs import ExportJob, run_job
from tests.single_files import checkpoint_tensors, save_header, save_single_file, vae_tensors
from tests.test_inspection import ONE, OPEN, REFINER, SD2, SECOND, TWO, XL, Texts, published
from tests.tiny import save_tiny

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl", "sdxl_refiner")
# The numbers of the yaml files that the first authors published beside their checkpoints, in their words.
ORIGINAL_UNET: dict[str, dict[str, Any]] = {
    "sd1": {"num_heads": 8, "context_dim": 768},
    "sd2": {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True},
    "sdxl": {
        "num_head_channels": 64,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [1, 2, 10],
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    "sdxl_refiner": {
        "model_channels": 384,
        "num_head_channels": 64,
        "context_dim": [1280, 1280, 1280, 1280],
        "use_linear_in_transformer": True,
        "attention_resolutions": [4, 2],
        "transformer_depth": 4,
        "num_classes": "sequential",
        "adm_in_channels": 2560,
    },
}


def original_config(family: str) -> dict[str, Any]:
    unet = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": 1,
        **ORIGINAL_UNET[family],
    }
    vae = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    params = {
        "scale_factor": 0.13025 if "xl" in family else 0.18215,
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"ddconfig": vae}},
    }
    return {"model": {"params": params}}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_configs_are_those_that_diffusers_derives_from_the_original_ones(family: Family) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as diffusers

    original = original_config(family)
    rows: list[tuple[str, Any, Callable[..., dict[str, Any]]]] = [
        ("unet", UNet2DConditionModel, diffusers.create_unet_diffusers_config_from_ldm),
        ("vae", AutoencoderKL, diffusers.create_vae_diffusers_config_from_ldm),
    ]
    for name, kind, create in rows:
        with torch.device("meta"):
            theirs = kind.from_config(create(original, {})).config
            ours = kind.from_config(dict(CONFIGS[family][name]) | {"sample_size": theirs["sample_size"]}).config
        differing = {key for key in theirs if key[0] != "_" and _plain(theirs[key]) != _plain(ours[key])}
        assert differing <= {"upcast_attention", "force_upcast"}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


FULL_SIZE: dict[str, tuple[dict[str, Any], Texts, tuple[int, int]]] = {
    "sd1": ({"cross_attention_dim": 768}, ONE, (512, 512)),
    "sd2": (SD2, OPEN, (768, 768)),
    "sdxl": (XL, TWO, (1024, 1024)),
    "sdxl_refiner": (REFINER, SECOND, (1024, 1024)),
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_a_file_in_published_sizes_has_all_that_its_networks_need(tmp_path: Path, family: str) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet, texts, picture = FULL_SIZE[family]
    file = save_header(tmp_path / "model.safetensors", published(unet, texts))
    options = CheckpointOptions(tokenizer=str(DEMO), prediction_type="v_prediction")
    checkpoint = open_checkpoint(str(file), options=options)
    assert (checkpoint.family, checkpoint.schedule.prediction_type) == (family, "v_prediction")
    assert checkpoint.default_size == picture
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
        "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
        "unet": UNet2DConditionModel.from_config,
        "vae_decoder": AutoencoderKL.from_config,
    }
    for component, weight_source in checkpoint.networks.items():
        if component == "vae_encoder":
            continue
        assert isinstance(weight_source, WeightSource)
        with torch.device("meta"):
            expected = makers[component](json.loads(weight_source.config)).state_dict()
        found = {key.removeprefix("text_model."): tensor.shape for key, tensor in read_tensors(weight_source).items()}
        assert found == {key.removeprefix("text_model."): tensor.shape for key, tensor in expected.items()}
    assert len(checkpoint.tokenizers) == len(texts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Make a tiny directory of a family, and the same as one file."""

    @functools.cache
    def make(family: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(family)
        name, _, variant = family.partition("_")
        directory = save_tiny(root / "checkpoint", family=name, variant=variant)
        return directory, save_single_file(directory, root / "model.safetensors")

    return make


CASES = [
    (family, component)
    for family in FAMILIES
    for component in ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
    if (component != "text_encoder_2" or "xl" in family) and (component != "text_encoder" or "refiner" not in family)
]


def weights(network: Path | WeightSource, component: str, folder: Path) -> dict[str, Any]:
    if isinstance(network, Path):
        return loading.load(component, network).state_dict()
    with written(network, folder):
        found = loading.load(component, folder).state_dict()
    assert not folder.exists()
    return found


@pytest.mark.parametrize(("family", "component"), CASES)
def test_every_weight_of_a_file_is_that_of_its_directory(
    tiny: Any, family: str, component: str, tmp_path: Path
) -> None:
    directory, file = tiny(family)
    options = CheckpointOptions(config=str(directory))
    ours = open_checkpoint(str(file), options=options)
    theirs = open_checkpoint(str(directory))
    assert (ours.family, ours.tokenizers.keys()) == (family, theirs.tokenizers.keys())
    assert (ours.schedule, ours.latents, ours.default_size, ours.dimensions) == (
        theirs.schedule,
        theirs.latents,
        theirs.default_size,
        theirs.dimensions,
    )
    expected = weights(theirs.networks[component], component, tmp_path)
    found = weights(ours.networks[component], component, tmp_path / "written")
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key].numpy(), tensor.numpy(), strict=True)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), options=CheckpointOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def full_size(tmp_path: Path) -> Path:
    """SD 2.x at full size, without data, VAE and metadata: nothing is cached either (conftest.py)."""
    tensors = {key: tensor for key, tensor in published(SD2, OPEN).items() if "first_stage" not in key}
    return save_header(tmp_path / "sd2.safetensors", tensors)


def test_all_that_a_file_lacks_is_asked_for_at_once(full_size: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(full_size.parent))
    sentence = refusal(full_size)
    lacking = ("(Stable Diffusion 2.x)", "--vae PATH", "--prediction-type epsilon", "--tokenizer DIRECTORY")
    assert all(option in sentence for option in lacking)
    given = {"vae": str(DEMO), "tokenizer": str(DEMO)}
    said = refusal(full_size, **given)
    assert "--prediction-type epsilon or v_prediction" in said and "--vae" not in said


@pytest.mark.parametrize(("prediction", "side"), [("epsilon", 512), ("v_prediction", 768)])
def test_what_sd2_predicts_tells_its_pictures_size(full_size: Path, prediction: Any, side: int) -> None:
    vae = save_header(full_size.with_name("vae.safetensors"), full_vae())
    options = CheckpointOptions(vae=str(vae), tokenizer=str(DEMO), prediction_type=prediction)
    checkpoint = open_checkpoint(str(full_size), options=options)
    assert (checkpoint.schedule.prediction_type, checkpoint.default_size) == (prediction, (side, side))
    assert checkpoint.options == {"prediction_type": prediction}
    assert {"vae/vae.safetensors", "sd2.safetensors", "tokenizer/vocab.json"} <= set(checkpoint.files)


def full_vae() -> dict[str, Any]:
    return {key.removeprefix("first_stage_model."): t for key, t in published({}, {}).items() if "first_stage" in key}


def test_what_the_file_says_of_its_prediction_wins_over_configs(sd1_checkpoint: Path, tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "v"}
    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", metadata=metadata)
    options = CheckpointOptions(config=str(sd1_checkpoint))
    assert open_checkpoint(str(file), options=options).schedule.prediction_type == "v_prediction"
    options = CheckpointOptions(config=str(sd1_checkpoint), prediction_type="epsilon")
    assert open_checkpoint(str(file), options=options).schedule.prediction_type == "epsilon"


def test_a_vocabulary_is_found_in_the_hubs_cache(
    full_size: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(DEMO / "tokenizer", repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    options = CheckpointOptions(vae=str(DEMO), prediction_type="epsilon")
    assert open_checkpoint(str(full_size), options=options).tokenizers["tokenizer"] == repository / "snapshots" / "0123"


def test_published_families_pad_as_they_were_trained_whatever_the_vocabulary_says(full_size: Path) -> None:
    """CLIP's own tokenizer pads with its end token, SD 2.x with an exclamation mark."""
    options = CheckpointOptions(vae=str(DEMO), prediction_type="epsilon", tokenizer=str(DEMO))
    checkpoint = open_checkpoint(str(full_size), options=options)
    folder, special = checkpoint.tokenizers["tokenizer"], checkpoint.special_tokens["tokenizer"]
    assert read_tokenizer(folder).pad_token == "<|endoftext|>"
    assert read_tokenizer(folder, special=special).pad_token == "!"


def as_is(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return tensors


def in_a_checkpoint(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return vae_tensors(tensors, config, prefix="first_stage_model.")


def alone(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    import torch

    return vae_tensors(tensors, config, prefix="") | {"loss.logvar": torch.zeros(1)}  # which training leaves


@pytest.mark.parametrize("layout", [as_is, in_a_checkpoint, alone])
def test_a_vae_is_taken_from_a_file(sd1_checkpoint: Path, other_vae: Path, layout: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    config = json.loads((other_vae / "config.json").read_text())
    file = tmp_path / "vae.safetensors"
    tensors = layout(load(other_vae / "diffusion_pytorch_model.safetensors"), config)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    check_vae(sd1_checkpoint, file, other_vae, tmp_path)


def test_a_vae_is_taken_from_a_directory_and_from_a_checkpoint(
    sd1_checkpoint: Path, other_vae: Path, tmp_path: Path
) -> None:
    check_vae(sd1_checkpoint, other_vae, other_vae, tmp_path)
    check_vae(sd1_checkpoint, other_vae.parent, other_vae, tmp_path)


@pytest.fixture(scope="module")
def other_vae(sd1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("other") / "checkpoint", family="sd1", seed=5) / "vae"


def check_vae(checkpoint: Path, given: Path, expected: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint), options=CheckpointOptions(vae=str(given)))
    assert not any(name.startswith("vae/") and path.parent == checkpoint / "vae" for name, path in opened.files.items())
    theirs = loading.load("vae_decoder", expected).state_dict()
    for key, tensor in weights(opened.networks["vae_decoder"], "vae_decoder", tmp_path / "written").items():
        np.testing.assert_array_equal(tensor.numpy(), theirs[key].numpy())
    assert opened.networks["vae_encoder"] == opened.networks["vae_decoder"]
    assert opened.networks["unet"] == checkpoint / "unet"


def test_what_is_no_vae_is_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    lora = save_header(tmp_path / "a.safetensors", {"x.lora_down.weight": (4, 4)})
    assert "--lora" in refusal(sd1_checkpoint, vae=str(lora))
    assert f"'{tmp_path / 'absent'}'" in refusal(sd1_checkpoint, vae=str(tmp_path / "absent"))
    assert "config.json" in refusal(sd1_checkpoint, vae=str(tmp_path))


def test_tensors_of_another_architecture_are_refused_by_name(sd1_checkpoint: Path, tmp_path: Path) -> None:
    """diffusers' conversion leaves out what it does not know, without a word."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in checkpoint_tensors(sd1_checkpoint).items()}
    extra, absent = "model.diffusion_model.time_gate.weight", "model.diffusion_model.middle_block.1.proj_in.weight"
    save_file(tensors | {extra: tensors["betas"].clone()}, tmp_path / "more.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if key != absent}, tmp_path / "less.safetensors")
    for name, told in (
        ("more", f"({extra}"),
        ("less", f"{tmp_path}/less.safetensors: 1 "),
    ):
        options = CheckpointOptions(config=str(sd1_checkpoint))
        checkpoint = open_checkpoint(str(tmp_path / f"{name}.safetensors"), options=options)
        weight_source = checkpoint.networks["unet"]
        assert isinstance(weight_source, WeightSource)
        job = ExportJob(
            component="unet",
            row="unet",
            source="torch",
            folder=str(tmp_path / "weights"),
            weight_source=weight_source,
            root=str(tmp_path),
            precision="fp32",
            dimensions=checkpoint.dimensions,
            scaling_factor=1.0,
        )
        with pytest.raises(CheckpointError) as caught:
            run_job(job)
        assert told in str(caught.value)


def test_files_that_are_no_whole_checkpoint_are_refused(tmp_path: Path) -> None:
    named = {
        "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (4, 4)}, "Flux"),
        "lora": ({"x.lora_down.weight": (4, 4)}, "LoRA"),
        "what": ({"x.y": (4, 4, 4)}, "`latentrt inspect`"),
        "less": (published({"cross_attention_dim": 768}, {}), " text_encoder"),
        "half": (published(XL, SECOND), " text_encoder;"),
        "xl": ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "--config DIRECTORY"),
    }
    for name, (tensors, told) in named.items():
        assert told in refusal(save_header(tmp_path / f"{name}.safetensors", tensors), tokenizer=str(DEMO))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "a.gguf'" in refusal(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tokenizer", "absent"), "--tokenizer 'absent'"),
        (("--config", "absent"), "--config 'absent'"),
    ],
)
def test_the_command_refuses_in_one_sentence(full_size: Path, arguments: tuple[str, ...], told: str) -> None:
    command = [str(full_size), str(full_size.with_name("bundle")), "--no-build", "--json", *arguments]
    result = CliRunner().invoke(export, command)
    assert isinstance(result.exception, LatentrtError)
    assert told in str(result.exception)
