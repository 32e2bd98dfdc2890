"""What a single file says outside its networks: keys and metadata that change how it draws, and what is left over.

No network reads these tensors. Some are marks by which authors say how the UNet was trained, as ComfyUI, Forge and
diffusers read them; the rest was left by training. What is neither is named, never passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentrt.engines.bundle.safetensors_header import TensorFile, weights_format
from latentrt.engines.bundle.training import Prediction
from latentrt.engines.errors import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """Tensors by whose presence a file says how its UNet was trained.

    keys: a file with all of them has the mark; further: those that go with them and may be absent
    label: what joins the model's name
    prediction: what the UNet predicts, None if the mark does not say
    process: the scheduler of another noise process, in place of the family's; None if that stays
    scheduler, vae: what changes in the configs
    scheduler_values, vae_values: keys of the configs, and the tensors whose numbers they are
    """

    keys: tuple[str, ...]
    further: tuple[str, ...] = ()
    label: str = ""
    prediction: Prediction | None = None
    process: Config | None = None
    scheduler: Config = field(default_factory=dict)
    vae: Config = field(default_factory=dict)
    scheduler_values: Mapping[str, str] = field(default_factory=dict)
    vae_values: Mapping[str, str] = field(default_factory=dict)


MARKERS: tuple[Marker, ...] = (
    Marker(keys=("v_pred",), prediction="v_prediction"),
    Marker(keys=("ztsnr",), scheduler={"rescale_betas_zero_snr": True}),
    Marker(
        keys=("edm_vpred.sigma_max",),
        further=("edm_vpred.sigma_min",),
        label="with EDM's noise (CosXL)",
        prediction="v_prediction",
        # What diffusers' EDMEulerScheduler documents for stabilityai/cosxl, and the bounds that ComfyUI assumes.
        process={
            "_class_name": "EDMEulerScheduler",
            "sigma_data": 1.0,
            "sigma_min": 0.002,
            "sigma_max": 120.0,
            "sigma_schedule": "exponential",
        },
        scheduler_values={"sigma_max": "edm_vpred.sigma_max", "sigma_min": "edm_vpred.sigma_min"},
    ),
    Marker(
        keys=("edm_mean", "edm_std"),
        label="with EDM's noise (Playground 2.5)",
        prediction="epsilon",
        # diffusers.loaders.single_file_utils: what it gives a Playground file.
        process={
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "euler_at_final": False,
            "final_sigmas_type": "zero",
            "lower_order_final": True,
            "num_train_timesteps": 1000,
            "rho": 7.0,
            "sigma_data": 0.5,
            "sigma_max": 80.0,
            "sigma_min": 0.002,
            "solver_order": 2,
            "solver_type": "midpoint",
            "thresholding": False,
        },
        vae={"scaling_factor": 0.5},
        vae_values={"latents_mean": "edm_mean", "latents_std": "edm_std"},
    ),
)
# What trainers and ComfyUI write into the metadata: in the first key that is there.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTIONS: Mapping[str, Prediction] = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_pred", "v_prediction", "v-prediction"), "v_prediction"),
}
ARCHITECTURE_KEY = "modelspec.architecture"
ARCHITECTURES: Mapping[str, Prediction] = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
# Left by training, or computed from the schedule: neither diffusers nor ComfyUI reads it.
LEFTOVERS = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|lvlb_weights|logvar"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|denoiser\.(log_)?sigmas|(model_ema|loss|embedding_manager|optimizer|lr_scheduler)\..*"
    r"|(.*\.)?(position_ids|num_batches_tracked|logit_scale)|global_step|epoch"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedChanges:
    """What marks change in the configs. process: a scheduler's config in place of the family's, or None."""

    process: Config | None
    scheduler: Config
    vae: Config

    def schedule(self, config: Config) -> dict[str, Any]:
        """Return a scheduler's config with these changes; one of the same noise process stays what it is."""
        same = self.process is None or str(config.get("_class_name")).startswith("EDM")
        return {**(config if same else self.process or {}), **self.scheduler}


def find_markers(file: TensorFile) -> tuple[Marker, ...]:
    """Return the marks that a file has."""
    return tuple(marker for marker in MARKERS if all(key in file.tensors for key in marker.keys))


def find_strangers(file: TensorFile, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys that belong to no network, are no known mark and no known leftover.

    prefixes: what the keys of the networks begin with
    """
    known = {key for marker in find_markers(file) for key in (*marker.keys, *marker.further)}
    return tuple(
        key
        for key in sorted(file.tensors)
        if not key.startswith(prefixes) and key not in known and not LEFTOVERS.fullmatch(key)
    )


def find_prediction(file: TensorFile) -> tuple[Prediction | None, str]:
    """Return what a file says that its UNet predicts, and where it says so.

    None with an empty sentence where it says nothing; None with a reason where what it says cannot be followed.
    """
    named_by: dict[str, Prediction] = {
        f"the marker {marker.keys[0]}": marker.prediction for marker in find_markers(file) if marker.prediction
    }
    written = next((key for key in PREDICTION_KEYS if file.metadata.get(key)), None)
    named = PREDICTIONS.get(file.metadata[written].lower()) if written else None
    architecture = ARCHITECTURES.get(file.metadata.get(ARCHITECTURE_KEY, ""))
    if written and named:
        named_by[f"{written} in its metadata"] = named
    elif architecture:
        named_by[f"{ARCHITECTURE_KEY} in its metadata"] = architecture
    if len(set(named_by.values())) > 1:
        return None, "it contradicts itself: " + ", ".join(f"{where} says {what}" for where, what in named_by.items())
    if named_by:
        return next(iter(named_by.values())), "by " + " and ".join(named_by)
    if written:
        return None, f"its metadata say {written}: {file.metadata[written]!r}, which is not known here"
    return None, ""


def read_changes(file: TensorFile, markers: tuple[Marker, ...]) -> MarkedChanges:
    """Read what a file's marks change in the configs. Raises CheckpointError if a number cannot be right."""
    processes = [marker.process for marker in markers if marker.process]
    if len(processes) > 1:
        names = " and ".join(marker.keys[0] for marker in markers if marker.process)
        raise CheckpointError(f"'{file.path}' has the marks {names}, which contradict each other; remove one of them")
    scheduler: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    for marker in markers:
        scheduler |= {**marker.scheduler, **_numbers(file, marker.scheduler_values, whole=True)}
        vae |= {**marker.vae, **_numbers(file, marker.vae_values, whole=False)}
    return MarkedChanges(process=processes[0] if processes else None, scheduler=scheduler, vae=vae)


def _numbers(file: TensorFile, keys: Mapping[str, str], *, whole: bool) -> dict[str, Any]:
    """Return the values that tensors hold, for keys of a config. whole: whether each is one number, not a list."""
    found = {}
    for name, key in keys.items():
        if key in file.tensors:
            numbers = _read(file, key)
            found[name] = numbers[0] if whole else numbers
    return found


def _read(file: TensorFile, key: str) -> list[float]:
    if weights_format(file.path) == "pickle":
        raise CheckpointError(
            f"'{file.path}' has the mark {key}, whose numbers are not read from a pickle; convert it to safetensors"
        )
    numbers = [float(f"{number:.7g}") for number in np.ravel(file.read_float32(key))]  # 0.002, whatever its type
    if not numbers or not np.isfinite(numbers).all() or ("mean" not in key and min(numbers) <= 0):
        raise CheckpointError(f"'{file.path}': the mark {key} is {numbers}, which cannot be right; download it again")
    return numbers
