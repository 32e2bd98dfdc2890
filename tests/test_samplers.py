"""Every sampler's plan walks where diffusers' scheduler of the same checkpoint walks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import Prediction, Spacing
from latentrt.runtime.samplers import make_plan, sampler_names
from sampler_oracle import STABLE_DIFFUSION, difference, reference, replay

TRAJECTORY = 1e-4  # diffusers computes its coefficients in float32, we in float64: measured 5e-6 at worst

# our name, our options, diffusers' class, its config, its step options
ORACLES: list[tuple[str, dict[str, Any], Any, dict[str, Any], dict[str, Any]]] = [
    ("ddim", {}, DDIMScheduler, {}, {}),
    ("ddim", {"eta": 0.7}, DDIMScheduler, {}, {"eta": 0.7}),
    ("euler", {}, EulerDiscreteScheduler, {}, {}),
    ("euler_karras", {}, EulerDiscreteScheduler, {"use_karras_sigmas": True}, {}),
    ("euler_ancestral", {}, EulerAncestralDiscreteScheduler, {}, {}),
    ("dpmpp_2m", {}, DPMSolverMultistepScheduler, {}, {}),
    ("dpmpp_2m_karras", {}, DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {}),
]

predictions = st.sampled_from(["epsilon", "v_prediction", "sample"])
spacings = st.sampled_from(["leading", "trailing", "linspace"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: f"{oracle[0]}{oracle[1] or ''}")
@settings(max_examples=25, derandomize=True, deadline=None)
@given(steps=st.integers(1, 100), prediction=predictions, spacing=spacings)
def test_a_plan_walks_with_diffusers(
    oracle: tuple[Any, ...], steps: int, prediction: Prediction, spacing: Spacing
) -> None:
    name, options, scheduler, config, step = oracle
    if scheduler is EulerAncestralDiscreteScheduler and prediction == "sample":
        return  # diffusers has not implemented it
    schedule = replace(STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing=spacing)
    plan = make_plan(name, schedule, steps=steps, **options)
    theirs = reference(scheduler, schedule, steps, step=step, **config)
    assert difference(replay(plan), theirs) < TRAJECTORY


@pytest.mark.parametrize("name", sampler_names())
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(name: str, steps: int) -> None:
    with pytest.raises(RequestError, match=f"found {steps}, expected 1 to 1000"):
        make_plan(name, STABLE_DIFFUSION, steps=steps)


def test_an_unknown_sampler_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="unknown sampler 'dpmp_2m'; did you mean 'dpmpp_2m'"):
        make_plan("dpmp_2m", STABLE_DIFFUSION, steps=20)
