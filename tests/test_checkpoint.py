"""Opening a checkpoint: what it is comes from its configs, and what cannot be exported is refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from latentrt.engines.bundle.manifest import Family
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.families import FAMILIES
from latentrt.export.configs.schedule import training_schedule
from latentrt.export.sources import hub
from latentrt.export.sources.weight_files import find_weights

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def copy(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, change: Edit) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(name))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_sd1_and_sd2_are_told_apart_by_their_configs(sd1_checkpoint: Path, sd2_checkpoint: Path) -> None:
    one, two = open_checkpoint(str(sd1_checkpoint)), open_checkpoint(str(sd2_checkpoint))
    assert (one.family, two.family) == ("sd1", "sd2")
    assert (one.latents.channels, one.latents.factor, one.default_size) == (4, 4, (32, 32))
    assert (two.latents.channels, two.latents.factor, two.default_size) == (6, 2, (24, 24))
    assert (one.latents.scaling_factor, two.latents.scaling_factor) == (0.18215, 0.25)
    assert (one.schedule.prediction_type, two.schedule.prediction_type) == ("epsilon", "v_prediction")
    assert (one.schedule.scheduler, two.schedule.scheduler) == ("PNDMScheduler", "DDIMScheduler")


def test_the_demo_checkpoint_has_a_name() -> None:
    assert open_checkpoint("demo").family == "sd1"


def test_every_file_that_is_read_is_hashed(sd1_checkpoint: Path) -> None:
    hashes = open_checkpoint(str(sd1_checkpoint)).hashes()
    on_disk = {path.relative_to(sd1_checkpoint).as_posix() for path in sd1_checkpoint.rglob("*") if path.is_file()}
    assert set(hashes) == on_disk


def test_opening_imports_no_torch(sd1_checkpoint: Path) -> None:
    code = (
        "import sys; from latentrt.export.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(sd1_checkpoint)!r}); "
        "assert not {'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_absent_spacing_is_left_to_each_sampler_as_diffusers_leaves_it() -> None:
    from diffusers import EulerDiscreteScheduler, PNDMScheduler

    config = PNDMScheduler.from_config({"beta_schedule": "scaled_linear", "skip_prk_steps": True}).config
    assert EulerDiscreteScheduler.from_config(config).config.timestep_spacing == "linspace"
    assert training_schedule({"_class_name": "PNDMScheduler"}, where="x").timestep_spacing is None


def test_given_keys_of_a_schedule_are_kept() -> None:
    given: dict[str, Any] = {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    given |= {"rescale_betas_zero_snr": True, "trained_betas": [0.1, 0.2], "num_train_timesteps": 2}
    schedule = training_schedule(given, where="x")
    assert (schedule.timestep_spacing, schedule.prediction_type) == ("trailing", "v_prediction")
    assert (schedule.rescale_betas_zero_snr, schedule.trained_betas) == (True, (0.1, 0.2))


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path / "absent")
    assert f"'{tmp_path / 'absent'}'" in said and "'demo'" in said


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_damaged_single_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    said = refusal(tmp_path / name)
    assert str(tmp_path / name) in said and ("--allow-pickle" in said) == (name == "model.ckpt")


def test_weights_that_are_only_a_pickle_are_refused(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "(diffusion_pytorch_model.bin)" in refusal(copy)


@pytest.mark.parametrize("folder", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_component_is_named(copy: Path, folder: str) -> None:
    shutil.rmtree(copy / folder)
    assert f" {folder}/;" in refusal(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert re.search(r"/vae\b.*\(diffusion_pytorch_model\.safetensors\)", refusal(copy))


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_weights_are_refused(copy: Path, keep: int) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert str(weights) in refusal(copy)


def test_a_header_that_is_noise_is_refused(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\x10" + b"\x00" * 7 + b"not json at all!" * 4)
    assert str(weights) in refusal(copy)


def test_a_config_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("{")
    assert re.search(r"unet/config\.json .*JSON", refusal(copy))


OTHERS: list[tuple[str, Edit, str]] = [
    ("model_index.json", lambda d: d.update(transformer=["diffusers", "NewModel"], unet=None), "Stable Diffusion"),
    ("model_index.json", lambda d: d.update(transformer=["diffusers", "FluxTransformer2DModel"]), "Flux"),
    ("model_index.json", lambda d: d.update(unet=[None, None], _class_name="WuerstchenDecoderPipeline"), "Wuerstchen"),
    ("model_index.json", lambda d: d.update(unet=[None, None], _class_name="NewPipeline"), "NewPipeline"),
    (
        "unet/config.json",
        lambda d: d.update(addition_embed_type="text_time"),
        "text_encoder_2",
    ),
    ("unet/config.json", lambda d: d.update(addition_embed_type="image"), "addition_embed_type: image"),
    ("unet/config.json", lambda d: d.update(class_embed_type="timestep"), "class_embed_type: timestep"),
    ("unet/config.json", lambda d: d.update(in_channels=7), " 7 "),
    ("unet/config.json", lambda d: d.update(cross_attention_dim=64), "cross_attention_dim"),
    ("text_encoder/config.json", lambda d: d.update(hidden_act="relu"), "hidden_act 'relu'"),
    ("text_encoder/config.json", lambda d: d.update(architectures=["T5EncoderModel"]), "T5EncoderModel"),
    ("scheduler/scheduler_config.json", lambda d: d.update(_class_name="MyScheduler"), "'MyScheduler'"),
    ("scheduler/scheduler_config.json", lambda d: d.update(prediction_type="flow"), "$.prediction_type: "),
    ("vae/config.json", lambda d: d.pop("block_out_channels"), "3 down_block_types and 1 block_out_channels"),
]


@pytest.mark.parametrize(("file", "change", "named"), OTHERS, ids=[row[2] for row in OTHERS])
def test_what_is_not_supported_is_named_with_what_was_recognised(
    copy: Path, file: str, change: Edit, named: str
) -> None:
    edit(copy / file, change)
    assert named in refusal(copy)


def test_weights_in_a_variant_and_in_shards_are_found(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert find_weights(copy / "unet").variant == "fp16"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in open_checkpoint(str(copy)).files
    shard = weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").rename(shard)
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard.name}}))
    files = open_checkpoint(str(copy)).files
    assert {f"unet/{shard.name}", f"unet/{index.name}"} <= set(files)


def test_the_hub_serves_configs_and_one_variant_and_never_a_pickle() -> None:
    weights = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
    files = [f"{w}{v}" for w in weights for v in (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin")]
    files = [file for file in files if file != "vae/diffusion_pytorch_model.safetensors"]
    files += ["model_index.json", "v1-5.ckpt", "v1-5.safetensors", "unet/config.json", "tokenizer/merges.txt"]
    files += ["safety_checker/model.safetensors", "README.md"]
    assert set(hub.choose_files(files)) == {
        "model_index.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
    }


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sentence = refusal("someone/some-model")
    assert "someone/some-model" in sentence
    assert "HF_HUB_OFFLINE" in sentence


def test_families_are_told_apart_by_what_a_checkpoint_holds() -> None:
    assert set(FAMILIES) == set(get_args(Family))
    marks = [(row.sized, row.networks, row.activation) for row in FAMILIES.values()]
    assert len(set(marks)) == len(marks)
    assert all(row.refines in (None, *FAMILIES) for row in FAMILIES.values())
