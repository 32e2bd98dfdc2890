"""A checkpoint's training schedule and its own sampler, from its scheduler's config; `schedulers` has the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.engines.bundle.manifest import Family
from latentrt.engines.bundle.parsing import ParseError, parse
from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.families import FAMILIES
from latentrt.export.configs.schedulers import (
    KEYS,
    PLAIN,
    SCHEDULERS,
    SHIFTED,
    SIGMAS,
    SIZED,
    THIRD_ORDER,
    TRAINED,
    Scheduler,
    Values,
    idle,
)


def training_schedule(
    config: Mapping[str, Any], *, where: str, family: Family | None = None, repaints: bool = False
) -> TrainingSchedule:
    """Read scheduler_config.json.

    where: its path, for the error; family, repaints: whose pipeline corrects it, and whether that is the inpainting one
    Raises CheckpointError if it asks for what no plan can do.
    """
    scheduler = str(config.get("_class_name"))
    known = SCHEDULERS.get(scheduler)
    if known is None:
        raise CheckpointError(
            f"{where}: the scheduler class '{scheduler}' is not supported; expected one of {', '.join(SCHEDULERS)}"
        )
    row = FAMILIES[family] if family else None
    corrected = (row.inpainting_corrections if repaints else row.corrections) if row else {}
    config = {**config, **{key: value for key, value in corrected.items() if key in (*config, *known.defaults)}}
    flows = row is not None and row.flows
    try:
        values = _complete(config, known.defaults)
        _check_together(values)
        values |= _taken_for_granted(config, known)
        document = _facts(config, values, flows=flows) | {"scheduler": scheduler}
        document |= {"sampler": _own(config, values, known, flows=flows)}
        document |= {"partial_step": "taken" if flows else "skipped"}
        return parse(TrainingSchedule, document)
    except ParseError as error:
        raise CheckpointError(f"{where}: {error}; this kind of schedule is not supported") from None


def _complete(config: Mapping[str, Any], defaults: Values) -> dict[str, Any]:
    """Return a value for every key of a class; null is false where true or false is meant, as it is in diffusers."""
    values = {key: config.get(key, default) for key, default in defaults.items()}
    absent = {key: False if isinstance(defaults[key], bool) else defaults[key] for key in values if values[key] is None}
    return values | absent


def _facts(config: Mapping[str, Any], values: Mapping[str, Any], *, flows: bool) -> dict[str, Any]:
    """Return what every sampler is told of the training, also where the checkpoint's own scheduler does not know it."""
    trained = {key: values.get(key, default) for key, default in TRAINED.items()}
    # schedulers without the key hand nothing on, so DDIM's own default holds; diffusers hands no default on to another
    # scheduler's class, and nor do we
    own = {"timestep_spacing": None, "steps_offset": 0, "set_alpha_to_one": True, "rescale_betas_zero_snr": False}
    own |= {key: values[key] for key in own if key in values and key != "timestep_spacing"}
    given = {key: config[key] for key in own if config.get(key) is not None}
    kind = {"edm": _edm(values), "flow": _flow(config, values, flows=flows)}
    return {**trained, **own, **given, **kind, "clip_sample": bool(values.get("clip_sample"))}


def _edm(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the range of a model with EDM's preconditioning, as a document of EdmRange; None for others.

    One that is told log(sigma) / 4, has Karras' spacing between ends of its own, and predicts v is of this kind, with a
    sigma_data of 1: Stable Video Diffusion's.
    """
    if "sigma_data" in values:
        return {key: values[key] for key in ("sigma_min", "sigma_max", "sigma_data")}
    kind = {"timestep_type": "continuous", "prediction_type": "v_prediction", "timestep_spacing": "leading"}
    ends = {key: values.get(key) for key in ("sigma_min", "sigma_max")}
    own = all(values.get(key) == value for key, value in kind.items()) and values.get("use_karras_sigmas")
    return {**ends, "sigma_data": 1.0} if own and None not in ends.values() else None


def _flow(config: Mapping[str, Any], values: Mapping[str, Any], *, flows: bool) -> dict[str, Any] | None:
    """Return how a flow's steps are shifted, as a document of FlowShift; None where the model is not of a flow.

    The size of the picture shifts them where the class waits to be told how far, or the family's pipelines tell it.
    """
    if values["prediction_type"] != "flow_prediction":
        return None
    flow: dict[str, Any] = {
        "shift": values.get("shift", values.get("flow_shift", 1.0)),
        "terminal": values.get("shift_terminal") or None,
    }
    if values.get("use_dynamic_shifting") and (flows or "base_shift" in values):
        told = {**SIZED, **{key: config[key] for key in SIZED if config.get(key) is not None}}
        if told["base_image_seq_len"] == told["max_image_seq_len"]:
            raise ParseError("$.max_image_seq_len: found the same as base_image_seq_len, expected another number")
        names = {"base_tokens": "base_image_seq_len", "max_tokens": "max_image_seq_len"}
        flow["dynamic"] = {"kind": values["time_shift_type"]} | {
            ours: told[names.get(ours, ours)] for ours in ("base_shift", "max_shift", *names)
        }
    return flow


def _taken_for_granted(config: Mapping[str, Any], known: Scheduler) -> Values:
    """Return the facts that a class has no key for. Raises ParseError if the config says otherwise nevertheless."""
    for key, value in known.facts.items():
        if config.get(key) not in (None, value):
            raise ParseError(f"$.{key}: found {config[key]!r}, expected {value} with this class")
    return known.facts


def _own(config: Mapping[str, Any], values: Mapping[str, Any], known: Scheduler, *, flows: bool) -> dict[str, Any]:
    """Return what the checkpoint's own scheduler is here, as a document of OwnSampler."""
    found: dict[str, Any] = {"name": known.sampler}
    keys = {**KEYS, **known.keys, **(SHIFTED if flows else {})}
    for key, value in values.items():
        try:
            found |= keys.get(key, idle)(value)
        except ParseError as error:
            raise ParseError(f"$.{key}: {error}") from None
    plain = {**PLAIN, **known.plain}
    if found.get("order") == 3 and found["name"] in THIRD_ORDER:
        found |= {"name": THIRD_ORDER[found["name"]], "order": 2}
    if values["prediction_type"] != "v_prediction":
        found.pop("timestep_type", None)  # diffusers has it for v-prediction alone
    if "rescale_betas_zero_snr" not in values and config.get("rescale_betas_zero_snr"):
        found["rescale_betas_zero_snr"] = False
    return {key: value for key, value in found.items() if value is not None and plain.get(key) != value}


def _check_together(values: Mapping[str, Any]) -> None:
    """Raise ParseError on options that exclude one another, or that diffusers has not implemented together."""
    spacings = [key for key in (*SIGMAS, "use_lu_lambdas", "use_flow_sigmas") if values.get(key)]
    if len(spacings) > 1:
        raise ParseError(f"$.{spacings[1]}: found true beside {spacings[0]}, expected one of them")
    flow = values.get("prediction_type") == "flow_prediction"
    if flow != bool(values.get("use_flow_sigmas")):
        raise ParseError("$.use_flow_sigmas: expected true with the prediction_type flow_prediction, and with no other")
    if values.get("shift_terminal") is not None and values.get("use_flow_sigmas") is False:
        raise ParseError("$.shift_terminal: found a number, expected null where use_flow_sigmas is false")
    algorithm, clean = values.get("algorithm_type", ""), values.get("final_sigmas_type", "zero") == "zero"
    noise = algorithm in ("dpmsolver", "sde-dpmsolver", "deis") or not values.get("predict_x0", True)
    if "final_sigmas_type" in values and noise and clean:
        raise ParseError("$.final_sigmas_type: found 'zero', expected sigma_min with this algorithm, as diffusers does")
    if flow and "final_sigmas_type" in values and (noise or not clean):
        raise ParseError("$.use_flow_sigmas: found true, expected false with this algorithm or this end")
    if algorithm == "sde-dpmsolver" and values.get("solver_order") == 3:
        raise ParseError("$.solver_order: found 3, expected 1 or 2 with algorithm_type sde-dpmsolver")
    betas = values.get("trained_betas")
    if betas is not None and not isinstance(betas, list):
        raise ParseError(f"$.trained_betas: found {betas!r}, expected null or a list of numbers")
    if betas is not None and len(betas) != values["num_train_timesteps"]:
        raise ParseError(f"$.trained_betas: found {len(betas)}, expected one for each of the training timesteps")
