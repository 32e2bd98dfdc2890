"""A checkpoint's training schedule, from its scheduler's config, with that class's defaults for what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.engines.manifest import TrainingSchedule
from latentrt.engines.parsing import ParseError, parse

# What diffusers' scheduler classes assume for an absent key; tests/test_checkpoint.py compares with diffusers.
_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": None,  # diffusers hands no default on to another scheduler's class, and nor do we
    "steps_offset": 0,
    "set_alpha_to_one": True,  # schedulers without the key hand nothing on, so DDIM's own default holds
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
_NARROW: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": _COMMON,
    "DDPMScheduler": _COMMON,
    "PNDMScheduler": _COMMON | {"set_alpha_to_one": False},
    "LMSDiscreteScheduler": _COMMON,
    "EulerDiscreteScheduler": _COMMON,
    "EulerAncestralDiscreteScheduler": _COMMON,
    "HeunDiscreteScheduler": _COMMON | _NARROW,
    "KDPM2DiscreteScheduler": _COMMON | _NARROW,
    "KDPM2AncestralDiscreteScheduler": _COMMON | _NARROW,
    "DPMSolverMultistepScheduler": _COMMON,
    "DPMSolverSinglestepScheduler": _COMMON,
    "DEISMultistepScheduler": _COMMON,
    "UniPCMultistepScheduler": _COMMON,
    "SASolverScheduler": _COMMON,
    "LCMScheduler": _COMMON | _NARROW | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": _COMMON | _NARROW | {"beta_schedule": "scaled_linear"},
}


def training_schedule(config: Mapping[str, Any], *, where: str) -> TrainingSchedule:
    """Read scheduler_config.json. `where` is its path, for the error. Raises CheckpointError."""
    scheduler = str(config.get("_class_name"))
    if scheduler not in DEFAULTS:
        raise CheckpointError(
            f"{where}: the scheduler class '{scheduler}' is not supported; expected one of {', '.join(DEFAULTS)}"
        )
    defaults = DEFAULTS[scheduler]
    document = {key: config.get(key, default) for key, default in defaults.items()}
    try:
        return parse(TrainingSchedule, {**document, "scheduler": scheduler})
    except ParseError as error:
        raise CheckpointError(f"{where}: {error}; this kind of schedule is not supported") from None
