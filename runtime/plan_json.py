"""A plan as a JSON document, so that another runtime (C++, a GPU graph) can execute it. The keys are SamplingPlan's."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.parsing import ParseError, parse
from latentrt.engines.spec import Array
from latentrt.runtime.plan import SamplingPlan

VERSION = 1
NUMBERS = ("timesteps", "levels", "input_rows", "transitions")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    version: int
    sampler: str
    steps: int
    initial_scale: float
    timesteps: tuple[float, ...]
    draws_noise: tuple[bool, ...]
    levels: tuple[tuple[float, ...], ...]
    input_rows: tuple[tuple[float, ...], ...]
    transitions: tuple[tuple[tuple[float, ...], ...], ...]


def plan_to_json(plan: SamplingPlan) -> str:
    """Write a plan as JSON that reads back to the same bits."""
    document = {"version": VERSION, "sampler": plan.sampler, "steps": plan.steps, "initial_scale": plan.initial_scale}
    document |= {name: getattr(plan, name).tolist() for name in ("draws_noise", *NUMBERS)}
    return json.dumps(document, allow_nan=False) + "\n"


def plan_from_json(text: str) -> SamplingPlan:
    """Read a plan strictly.

    Raises RequestError on another version, an unknown or missing key, sizes that do not fit one another, and
    numbers that are not finite in float32.
    """
    try:
        document = parse(_Document, json.loads(text, parse_constant=_refuse_constant))
    except ParseError as error:
        raise RequestError(f"plan {error}") from None
    except ValueError as error:
        raise RequestError(f"plan is not JSON: {error}") from None
    if document.version != VERSION:
        raise RequestError(f"plan $.version: found {document.version}, expected {VERSION}")
    arrays = {name: _array(name, getattr(document, name)) for name in NUMBERS}
    _check_shapes(arrays, len(document.draws_noise))
    fields = dataclasses.asdict(document) | arrays | {"draws_noise": np.array(document.draws_noise, dtype=bool)}
    _array("initial_scale", document.initial_scale)
    return SamplingPlan(**{name: value for name, value in fields.items() if name != "version"})


def _refuse_constant(name: str) -> NoReturn:
    raise ParseError(f"holds {name}: every number of a plan must be finite")


def _array(name: str, values: object) -> Array:
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=np.float32)
    except ValueError:
        raise RequestError(f"plan $.{name}: rows of different lengths") from None
    if not np.isfinite(array).all():
        raise RequestError(f"plan $.{name}: every number of a plan must be finite in float32")
    return array


def _check_shapes(arrays: dict[str, Array], stages: int) -> None:
    rows = arrays["input_rows"].shape[-1] if arrays["input_rows"].ndim == 2 else 0
    expected = {
        "timesteps": (stages,),
        "levels": (stages + 1, 2),
        "input_rows": (stages, rows),
        "transitions": (stages, rows, rows + 2),
    }
    if min(stages, rows) < 1:
        raise RequestError("plan $.input_rows: expected one stage and one row or more")
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise RequestError(f"plan $.{name}: found shape {arrays[name].shape}, expected {shape}")
