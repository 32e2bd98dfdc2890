"""Models that were distilled to few steps, used as their authors say, draw the pictures of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.files import Bundle, write_manifest
from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import CheckpointError
from latentrt.engines.workspace.contract import ALL
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import WeightSource
from tests.conftest import Make
from tests.lora_files import kohya, make_factors, save
from tests.single_files import save_single_file, unet_tensors
from tests.test_families import LEAST, ours, psnr, reference, theirs
from tests.tiny import save_tiny

STABLE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
# As their authors publish them: the family, its pipeline, and what its scheduler's config says.
PIPELINES: dict[str, Any] = {
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SD-Turbo": ("sd2", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}),
    "SDXL-Turbo": ("sdxl", {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}),
}


def published(made: Make, name: str, folder: Path) -> tuple[Path, Path]:
    """Return a checkpoint with a published scheduler's config, and its bundle: only the manifest depends on that."""
    family, config = PUBLISHED[name]
    checkpoint, bundle = made(family, "")
    checkpoint = shutil.copytree(checkpoint, folder / "checkpoint")
    document = {**STABLE, "prediction_type": "epsilon", **config}
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(document))
    index = checkpoint / "model_index.json"
    named = {"scheduler": ["diffusers", config["_class_name"]]}
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    return checkpoint, with_schedule(bundle, open_checkpoint(str(checkpoint)).schedule, folder / "bundle")


def with_schedule(bundle: Path, schedule: TrainingSchedule, target: Path) -> Path:
    shutil.copytree(bundle, target)
    write_manifest(target, msgspec.structs.replace(Bundle.open(target).manifest, schedule=schedule))
    return target


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many model rows each stage had."""
    counted: list[int] = []
    run = NumpyWorkspace.run

    def count(self: NumpyWorkspace, program: str, rows: slice = ALL) -> None:
        if program == "unet":
            counted.append(rows.stop)
        run(self, program, rows)

    monkeypatch.setattr(NumpyWorkspace, "run", count)
    return counted


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_turbo_checkpoint_needs_no_options_but_steps(
    made: Make, name: str, steps: int, rows: list[int], tmp_path: Path
) -> None:
    """The scheduler and its spacing are the checkpoint's own, and a step computes one row a picture, not two."""
    checkpoint, bundle = published(made, name, tmp_path)
    pipe = PIPELINES[PUBLISHED[name][0]].from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    expected = theirs(pipe, guidance_scale=0.0, num_inference_steps=steps)
    for guidance in (0.0, 1.0):
        rows.clear()
        found = ours(bundle, guidance=guidance, steps=steps)
        assert psnr(found, expected) >= LEAST
        assert rows == [1] * steps


# What the authors of few-step UNets and LoRAs for SDXL say to use: diffusers' scheduler and its options, then ours.
RECIPES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Lightning, 2 steps": (
        diffusers.EulerDiscreteScheduler,
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 2},
        {"sampler": "euler", "spacing": "trailing", "steps": 2},
    ),
    "Hyper-SD, unified, 1 step": (
        diffusers.TCDScheduler,
        {},
        {"num_inference_steps": 1, "eta": 1.0},
        {"sampler": "tcd", "steps": 1, "eta": 1.0},
    ),
    "Hyper-SD, unified, 4 steps": (
        diffusers.TCDScheduler,
        {},
        {"num_inference_steps": 4, "eta": 0.3},
        {"sampler": "tcd", "steps": 4, "eta": 0.3},
    ),
    "Hyper-SD, 2 steps": (
        diffusers.DDIMScheduler,
        {"timestep_spacing": "trailing", "clip_sample": False},
        {"num_inference_steps": 2},
        {"sampler": "ddim", "spacing": "trailing", "steps": 2},
    ),
    "Hyper-SD, UNet, 1 step": (
        diffusers.LCMScheduler,
        {},
        {"num_inference_steps": 1, "timesteps": [800]},
        {"sampler": "lcm", "timesteps": [800]},
    ),
    "LCM-LoRA, 4 steps": (
        diffusers.LCMScheduler,
        {},
        {"num_inference_steps": 4},
        {"sampler": "lcm", "steps": 4},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_authors_say_to_use_is_a_request(made: Make, name: str) -> None:
    scheduler, config, asked, request = RECIPES[name]
    checkpoint, bundle = made("sdxl", "")
    pipe = reference(diffusers.StableDiffusionXLPipeline, checkpoint, scheduler, **config)
    expected = theirs(pipe, guidance_scale=0.0, **asked)
    found = ours(bundle, **{"guidance": 0.0, "steps": None, **request})
    assert psnr(found, expected) >= LEAST


def test_lightnings_one_step_predicts_the_picture(made: Make, tmp_path: Path) -> None:
    checkpoint, bundle = made("sdxl", "")
    opened = open_checkpoint(str(checkpoint), options=CheckpointOptions(prediction_type="sample"))
    bundle = with_schedule(bundle, opened.schedule, tmp_path / "bundle")
    config = {"timestep_spacing": "trailing", "prediction_type": "sample"}
    pipe = reference(diffusers.StableDiffusionXLPipeline, checkpoint, diffusers.EulerDiscreteScheduler, **config)
    expected = theirs(pipe, guidance_scale=0.0, num_inference_steps=1)
    found = ours(bundle, guidance=0.0, sampler="euler", spacing="trailing", steps=1)
    assert psnr(found, expected) >= LEAST


def unet_file(checkpoint: Path, path: Path, layout: str) -> Path:
    """Write a checkpoint's UNet as a file of its own: in diffusers' names, or in the original ones."""
    (file,) = (checkpoint / "unet").glob("*.safetensors")
    tensors, config = load_file(file), json.loads((checkpoint / "unet" / "config.json").read_text())
    if layout != "diffusers":
        tensors = unet_tensors(tensors, config)
    if layout == "bare":
        tensors = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in tensors.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def with_unet(base: Path, unet: Path) -> Checkpoint:
    return open_checkpoint(str(base), options=CheckpointOptions(unet=str(unet)))


@pytest.mark.parametrize("layout", ["diffusers", "original", "bare"])
@pytest.mark.parametrize("variant", ["", "lcm", "inpainting"])
def test_a_unet_is_taken_from_a_file(made: Make, variant: str, layout: str, tmp_path: Path) -> None:
    other = save_other(tmp_path / "other", variant)
    checkpoint = with_unet(made("sd1", "")[0], unet_file(other, tmp_path / "unet.safetensors", layout))
    weight_source = checkpoint.networks["unet"]
    assert isinstance(weight_source, WeightSource)
    (file,) = (other / "unet").glob("*.safetensors")
    expected = load_file(file)
    with written(weight_source, tmp_path / "written") as folder:
        found = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert set(found) == set(expected)
    assert all((found[key] == expected[key]).all() for key in expected)
    assert checkpoint.dimensions["guidance_width"] == (16 if variant == "lcm" else 0)
    assert checkpoint.dimensions["unet_channels"] == (9 if variant == "inpainting" else 4)
    assert "unet/unet.safetensors" in checkpoint.files


def save_other(path: Path, variant: str) -> Path:
    return save_tiny(path, family="sd1", variant=variant, seed=7)


def test_a_unet_is_taken_from_a_directory_or_a_checkpoint(made: Make, tmp_path: Path) -> None:
    other = save_other(tmp_path / "other", "lcm")
    for path in (other, other / "unet"):
        checkpoint = with_unet(made("sd1", "")[0], path)
        assert checkpoint.networks["unet"] == other / "unet"
        assert checkpoint.dimensions["guidance_width"] == 16


def test_what_holds_no_unet_is_refused(made: Make, tmp_path: Path) -> None:
    base = made("sd1", "")[0]
    lora = save(tmp_path / "lightning_lora.safetensors", kohya(make_factors(base, seed=1)))
    (vae,) = (base / "vae").glob("*.safetensors")
    for path, told in (
        (lora, "--lora FILE$"),
        (vae, "; .*--vae "),
        (tmp_path / "nothing", "^--unet '.*nothing'"),
    ):
        with pytest.raises(CheckpointError, match=told):
            with_unet(base, path)
    with pytest.raises(CheckpointError, match=r"^--unet .*optimum"):
        with_unet(made("sd1", "")[1] / "onnx", base)


def test_a_consistency_model_in_one_file_is_recognised(tmp_path: Path) -> None:
    checkpoint = save_other(tmp_path / "lcm", "lcm")
    file = save_single_file(checkpoint, tmp_path / "lcm.safetensors")
    opened = open_checkpoint(str(file), options=CheckpointOptions(config=str(checkpoint)))
    assert opened.dimensions["guidance_width"] == 16
    weight_source = opened.networks["unet"]
    assert isinstance(weight_source, WeightSource)
    with written(weight_source, tmp_path / "written") as folder:
        model = diffusers.UNet2DConditionModel.from_pretrained(folder)
    expected = load_file(next((checkpoint / "unet").glob("*.safetensors")))
    assert all((tensor == expected[key]).all() for key, tensor in model.state_dict().items())


def test_a_consistency_unet_for_sdxl_is_exported_from_its_file(made: Make, workshop: Path) -> None:
    """As `--unet lcm-sdxl.safetensors`: the file says that it takes its guidance, and the picture is diffusers'."""
    base, other = made("sdxl", "")[0], save_lcm(workshop / "sdxl-lcm-unet")
    bundle = workshop / "sdxl-lcm-file"
    export_checkpoint(str(base), bundle, precision="fp32", options=CheckpointOptions(unet=str(other[1])))
    unet = diffusers.UNet2DConditionModel.from_pretrained(other[0] / "unet")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base, unet=unet)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    expected = theirs(pipe, guidance_scale=6.0)
    assert psnr(ours(bundle, guidance=6.0, sampler="lcm"), expected) >= LEAST
    assert psnr(ours(bundle, guidance=8.0, sampler="lcm"), expected) < LEAST


def save_lcm(folder: Path) -> tuple[Path, Path]:
    """Return a checkpoint of a latent consistency model, and the file of its UNet; made if there is none yet."""
    file = folder.with_suffix(".safetensors")
    if not file.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        save_tiny(folder, family="sdxl", variant="lcm", seed=5)
        unet_file(folder, file, "original")
    return folder, file
