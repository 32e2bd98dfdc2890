"""What a file says outside its networks: marks that change how it draws, leftovers, and keys that nobody knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import DEMO, open_checkpoint
from latentrt.export.cli import export
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import Parts
from latentrt.export.sources.single_file import open_file
from tests.single_files import save_header, save_single_file
from tests.test_inspection import TWO, XL, published

PLAYGROUND = {"edm_mean": [-1.6574, 1.886, -1.383, 2.5155], "edm_std": [8.4927, 5.9022, 6.5498, 5.2299]}


@pytest.fixture(scope="module")
def xl() -> dict[str, Any]:
    """The tensors of SDXL at full size, without data."""
    return published(XL, TWO)


def opened(path: Path, **options: Any) -> Parts:
    return open_file(path, CheckpointOptions(tokenizer=str(DEMO), **options))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("marks", "changes", "prediction"),
    [
        ({}, {"prediction_type": "epsilon"}, "epsilon (as its base; nothing in the file says otherwise)"),
        ({"v_pred": []}, {"prediction_type": "v_prediction"}, "v_prediction (by the marker v_pred)"),
        (
            {"v_pred": [], "ztsnr": []},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "v_prediction (by the marker v_pred)",
        ),
    ],
)
def test_a_mark_changes_what_it_means_and_nothing_else(
    sd1_checkpoint: Path, tmp_path: Path, marks: Any, changes: dict[str, Any], prediction: str
) -> None:
    plain = open_checkpoint(str(sd1_checkpoint))
    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", marks=marks)
    found = open_checkpoint(str(file), options=CheckpointOptions(config=str(sd1_checkpoint)))
    assert found.scheduler == {**plain.scheduler, **changes}
    assert found.schedule.prediction_type == changes["prediction_type"]
    assert found.schedule.rescale_betas_zero_snr == changes.get("rescale_betas_zero_snr", False)
    assert inspect_checkpoint(str(file)).prediction == prediction


@pytest.mark.parametrize(
    ("marks", "bounds"),
    [
        ({"edm_vpred.sigma_max": [120.0], "edm_vpred.sigma_min": [0.002]}, (0.002, 120.0)),
        ({"edm_vpred.sigma_max": 80.0}, (0.002, 80.0)),
    ],
)
def test_cosxl_has_the_scheduler_that_diffusers_documents_for_it(
    sd1_checkpoint: Path, tmp_path: Path, marks: Any, bounds: tuple[float, float]
) -> None:
    from diffusers import EDMEulerScheduler

    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", marks=marks)
    config = open_file(file, CheckpointOptions(config=str(sd1_checkpoint))).scheduler
    assert config == {
        "_class_name": "EDMEulerScheduler",
        "prediction_type": "v_prediction",
        "sigma_data": 1.0,
        "sigma_min": bounds[0],
        "sigma_max": bounds[1],
        "sigma_schedule": "exponential",
    }
    theirs = EDMEulerScheduler.from_config(config)
    theirs.set_timesteps(10)
    assert (float(theirs.sigmas[0]), float(theirs.sigmas[-2])) == pytest.approx(bounds[::-1], rel=1e-5)


def test_at_full_size_a_marked_file_needs_no_configs(xl: dict[str, Any], tmp_path: Path) -> None:
    marks = {"edm_vpred.sigma_max": [112.0], "edm_vpred.sigma_min": [0.0625]}
    file = save_header(tmp_path / "cosxl.safetensors", xl, marks=marks)
    scheduler = opened(file).scheduler
    assert (scheduler["_class_name"], scheduler["sigma_max"], scheduler["sigma_min"]) == (
        "EDMEulerScheduler",
        112.0,
        0.0625,
    )
    assert inspect_checkpoint(str(file)).model == "Stable Diffusion XL, with EDM's noise (CosXL)"


def test_playground_has_the_latents_and_the_scheduler_that_diffusers_gives_it(
    xl: dict[str, Any], tmp_path: Path
) -> None:
    """The VAE's config as diffusers makes it of the file; its scheduler as diffusers has it for one."""
    import inspect

    import torch
    from diffusers import EDMDPMSolverMultistepScheduler
    from diffusers.loaders import single_file_utils as diffusers

    file = save_header(tmp_path / "playground.safetensors", xl, marks=PLAYGROUND)
    parts = opened(file)
    ddconfig = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    original = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": ddconfig}}}}}
    theirs = diffusers.create_vae_diffusers_config_from_ldm(
        original, {key: torch.tensor(numbers) for key, numbers in PLAYGROUND.items()}, image_size=1024
    )
    for component in ("vae_decoder", "vae_encoder"):
        ours = parts.configs[component]
        assert ours["scaling_factor"] == theirs["scaling_factor"] == 0.5
        for key in ("latents_mean", "latents_std"):  # the file's are float16
            assert ours[key] == pytest.approx(theirs[key].tolist(), rel=1e-3)
        assert parts.networks[component].config.count("latents_mean") == 1  # type: ignore[union-attr]
    defaults = inspect.signature(EDMDPMSolverMultistepScheduler.__init__).parameters
    assert parts.scheduler["_class_name"] == "EDMDPMSolverMultistepScheduler"
    assert {key: value for key, value in parts.scheduler.items() if key[0] != "_"} == {
        key: defaults[key].default for key in parts.scheduler if key[0] != "_"
    }
    assert inspect_checkpoint(str(file)).model == "Stable Diffusion XL, with EDM's noise (Playground 2.5)"


def test_metadata_of_several_writers_is_read(sd1_checkpoint: Path, tmp_path: Path) -> None:
    config = CheckpointOptions(config=str(sd1_checkpoint))
    for number, (key, value, expected) in enumerate(
        [
            ("modelspec.prediction_type", "v", "v_prediction"),
            ("modelspec.prediction_type", "Epsilon", "epsilon"),
            ("modelspec.predict_key", "v", "v_prediction"),  # ComfyUI's
            ("modelspec.architecture", "stable-diffusion-v2-768-v", "v_prediction"),
        ]
    ):
        file = save_single_file(sd1_checkpoint, tmp_path / f"{number}.safetensors", metadata={key: value})
        assert open_file(file, config).scheduler["prediction_type"] == expected


@pytest.mark.parametrize(
    ("marks", "metadata", "told"),
    [
        (
            {"v_pred": []},
            {"modelspec.prediction_type": "epsilon"},
            r"--prediction-type epsilon or v_prediction.*\bv_pred\b",
        ),
        (
            {},
            {"modelspec.prediction_type": "flow"},
            r"--prediction-type epsilon or v_prediction.*\bmodelspec\.prediction_type: 'flow'",
        ),
        ({"edm_vpred.sigma_max": [0.0]}, {}, r"\bedm_vpred\.sigma_max .*\[0\.0\]"),
        (
            {**PLAYGROUND, "edm_vpred.sigma_max": [80.0]},
            {},
            r"\bedm_vpred\.sigma_max .*\bedm_mean\b",
        ),
        ({"edm_mean": [0.0]}, {}, r" 1 .*\(edm_mean\)"),
        (
            {"time_gate.weight": [1.0], "scale_factor": 0.18215},
            {},
            r"--config DIRECTORY .* 2 .*\(scale_factor, time_gate\.weight\)",
        ),
    ],
)
def test_what_cannot_be_followed_is_named_before_anything_is_written(
    xl: dict[str, Any], tmp_path: Path, marks: Any, metadata: dict[str, str], told: str
) -> None:
    file = save_header(tmp_path / "a.safetensors", xl, metadata=metadata, marks=marks)
    assert re.search(told, refusal(file))
    assert re.search(told, str(inspect_checkpoint(str(file)).problem))
    result = CliRunner().invoke(export, [str(file), str(tmp_path / "bundle"), "--tokenizer", str(DEMO), "--no-build"])
    assert isinstance(result.exception, CheckpointError) and not (tmp_path / "bundle").exists()


def test_a_marks_numbers_are_not_read_from_a_pickle(sd1_checkpoint: Path, tmp_path: Path) -> None:
    import torch

    from tests.single_files import checkpoint_tensors

    path = tmp_path / "a.ckpt"
    torch.save({**checkpoint_tensors(sd1_checkpoint), "edm_vpred.sigma_max": torch.tensor(120.0)}, path)
    with pytest.raises(CheckpointError, match=r"\bedm_vpred\.sigma_max\b.* safetensors$"):
        open_file(path, CheckpointOptions(config=str(sd1_checkpoint), allow_pickle=True))


def test_what_training_leaves_is_no_obstacle(xl: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    ldm = ("alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "sqrt_alphas_cumprod")
    ldm += ("sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    ldm += ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
    others = ("lvlb_weights", "logvar", "denoiser.sigmas", "loss.logvar", "model_ema.decay", "model_ema.num_updates")
    others += ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "embedding_manager.x")
    left = dict.fromkeys((*ldm, *others), (1000,))
    assert opened(save_header(tmp_path / "a.safetensors", xl | left)).scheduler["prediction_type"] == "epsilon"


def test_configs_of_its_own_say_all_that_unknown_tensors_could(sd1_checkpoint: Path, tmp_path: Path) -> None:
    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", marks={"time_gate.weight": [1.0]})
    assert open_file(file, CheckpointOptions(config=str(sd1_checkpoint))).configs
    assert any("time_gate.weight" in note for note in inspect_checkpoint(str(file)).notes)


# --- marks of a UNet that is given beside a checkpoint ---


def test_a_unet_from_a_file_brings_the_schedule_that_it_was_trained_for(sd1_checkpoint: Path, tmp_path: Path) -> None:
    plain = open_checkpoint(str(sd1_checkpoint))
    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", marks={"v_pred": [], "ztsnr": []})
    found = open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(unet=str(file)))
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert found.scheduler == {**plain.scheduler, **told}
    unmarked = save_single_file(sd1_checkpoint, tmp_path / "b.safetensors")
    assert open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(unet=str(unmarked))).schedule == (
        plain.schedule
    )


def test_a_unets_file_that_cannot_be_followed_is_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "epsilon"}
    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", marks={"v_pred": []}, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"^--unet .*--prediction-type\b"):
        open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(unet=str(file)))
    options = CheckpointOptions(unet=str(file), prediction_type="epsilon")
    assert open_checkpoint(str(sd1_checkpoint), options=options).schedule.prediction_type == "epsilon"
    strange = save_single_file(sd1_checkpoint, tmp_path / "b.safetensors", marks={"time_gate.weight": [1.0]})
    with pytest.raises(CheckpointError, match=r"^--unet .*\(time_gate\.weight\)"):
        open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(unet=str(strange)))
