"""What holds for every plan, and plans as data."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latentrt.engines.bundle.training import Prediction, Spacing, TrainingSchedule
from latentrt.engines.spec import Array
from latentrt.runtime.draw.denoise import blend
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.plan_text import (
    format_plan,
    format_samplers,
    plan_to_json,
    samplers_table,
)
from latentrt.runtime.sampling.spacings import SPACINGS
from tests.loop import advance, denoise
from tests.sampler_oracle import SHAPE, STABLE_DIFFUSION

CONSISTENT = 2e-3  # float32 coefficients of up to a few hundred, whose sum is one
CLEAN = msgspec.structs.replace(STABLE_DIFFUSION, set_alpha_to_one=True)

# the samplers whose table holds for the schedule above; the flow's and EDM's models are told something else
DIFFUSION = [name for name, sampler in SAMPLERS.items() if "sample" in sampler.predictions]
# these end at the least noise of training, or beside the picture on purpose
ENDS_NOISY = {"dpm_2s", "dpm_2m", "dpm_2m_sde", "dpm_3m", "deis", "deis_3", "sa_solver", "plms", "pndm", "tcd", "lcm"}
# these leave the line between picture and noise: with fresh noise, or to come back and do a step again
OFF_THE_LINE = {"plms", "pndm", "ddpm", "lcm", "tcd", "sa_solver"} | {
    name for name in DIFFUSION if name.endswith(("sde", "ancestral"))
}

steps_of = st.integers(4, 100)
spacings = st.sampled_from(["leading", "trailing", "linspace"])


def plan_of(name: str, schedule: TrainingSchedule, steps: int, **options: Any) -> SamplingPlan:
    most = 50 if name in ("lcm", "tcd") else 100
    return make_plan(name, schedule, steps=min(steps, most), **options)


def final(plan: SamplingPlan, model: Any, noise: Array) -> Array:
    *_, last = denoise(plan, noise, model, lambda: np.zeros_like(noise))
    return last


@pytest.mark.parametrize("name", sorted({*DIFFUSION} - ENDS_NOISY))
@settings(max_examples=10, derandomize=True, deadline=None)
@given(steps=steps_of, spacing=spacings)
def test_last_stage_lands_on_the_picture_that_a_sure_model_predicts(name: str, steps: int, spacing: Spacing) -> None:
    # DDIM's stride is rounded down, so some counts of trailing steps end at timestep 0, as diffusers' do
    assume((name, spacing) != ("ddim", "trailing") or round(1000 / steps) - 1 < 1000 // steps)
    schedule = msgspec.structs.replace(CLEAN, prediction_type="sample", timestep_spacing=spacing)
    rng = np.random.default_rng(0)
    picture, noise = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    last = final(plan_of(name, schedule, steps), lambda x, t: picture, noise)
    np.testing.assert_allclose(last, picture, atol=CONSISTENT)


@pytest.mark.parametrize("name", [name for name in DIFFUSION if name not in OFF_THE_LINE])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_model_keeps_the_latents_at_every_level_of_the_plan(name: str, prediction: Prediction) -> None:
    """With x = alpha * picture + sigma * noise and a model that knows both, a noiseless plan stays on that line."""
    schedule = msgspec.structs.replace(CLEAN, prediction_type=prediction, timestep_spacing="leading", steps_offset=0)
    plan = plan_of(name, schedule, 20)
    picture, noise = np.random.default_rng(1).standard_normal((2, *SHAPE))
    state = np.zeros((1, plan.rows, *SHAPE[1:]), dtype=np.float32)
    state[:, 0] = blend(plan.levels[0], picture, noise)
    for k in range(plan.stages - (name in ENDS_NOISY)):
        alpha, sigma = plan.levels[k] / np.hypot(*plan.levels[k])
        outputs = {"epsilon": noise, "sample": picture, "v_prediction": alpha * noise - sigma * picture}
        state = advance(plan.transitions[k], state, outputs[prediction].astype(np.float32), np.zeros(SHAPE, np.float32))
        expected = blend(plan.levels[k + 1], picture, noise)
        np.testing.assert_allclose(state[:, 0], expected, atol=CONSISTENT * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_model_sees_latents_of_unit_variance(name: str) -> None:
    plan = plan_of(name, CLEAN, 20)
    size = np.hypot(plan.levels[:-1, 0], plan.levels[:-1, 1])
    np.testing.assert_allclose(plan.input_rows[:, 0] * size, 1, rtol=1e-5)
    assert not plan.input_rows[:, 1:].any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_has_weight_only_where_it_is_drawn(name: str) -> None:
    plan = plan_of(name, flow_or(name, CLEAN), 20)
    assert not (plan.uses_noise & ~plan.draws_noise).any()


def flow_or(name: str, schedule: TrainingSchedule) -> TrainingSchedule:
    prediction: Any = SAMPLERS[name].predictions[0]
    return msgspec.structs.replace(schedule, prediction_type=prediction)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@settings(max_examples=8, derandomize=True, deadline=None)
@given(steps=st.integers(2, 100))
def test_every_spacing_falls_from_the_most_noise_to_the_clean_picture(name: str, spacing: str, steps: int) -> None:
    plan = make_plan(name, STABLE_DIFFUSION, steps=steps, spacing=spacing)
    assert (np.diff(plan.sigmas) < 0).all() and plan.sigmas[-1] == 0
    assert (np.diff(plan.timesteps) <= 0).all() and plan.timesteps.min() >= 0 and plan.timesteps.max() <= 999


@settings(max_examples=30, derandomize=True, deadline=None)
@given(name=st.sampled_from(sorted(SAMPLERS)), steps=steps_of)
def test_json_reads_back_to_the_same_bits(name: str, steps: int) -> None:
    plan = plan_of(name, flow_or(name, STABLE_DIFFUSION), steps)
    back = json.loads(plan_to_json(plan))
    assert (back["sampler"], back["steps"], back["initial_scale"]) == (plan.sampler, plan.steps, plan.initial_scale)
    for field in ("timesteps", "levels", "input_rows", "transitions", "draws_noise"):
        ours: Any = getattr(plan, field)
        assert np.array_equal(np.array(back[field], dtype=ours.dtype), ours), field


def test_a_plan_can_be_executed_from_its_json_alone() -> None:
    """All that another runtime needs, in plain Python: SamplingPlan's docstring, on latents of one number."""
    plan = make_plan("dpmpp_2m_sde_karras", STABLE_DIFFUSION, steps=9)
    document, draws = json.loads(plan_to_json(plan)), np.random.default_rng(0).standard_normal(10).tolist()
    rows = len(document["input_rows"][0])
    state = [document["initial_scale"] * draws[0]] + [0.0] * (rows - 1)
    for k, timestep in enumerate(document["timesteps"]):
        seen = sum(w * s for w, s in zip(document["input_rows"][k], state, strict=True))
        fresh = draws[k + 1] if document["draws_noise"][k] else 0.0
        terms = [*state, math.sin(seen + timestep), fresh]
        state = [sum(w * s for w, s in zip(row, terms, strict=True)) for row in document["transitions"][k]]

    given = iter(np.array(draws, dtype=np.float32).reshape(-1, 1, 1, 1, 1))
    path = denoise(plan, next(given), lambda x, t: np.sin(x + t.reshape(-1, 1, 1, 1)), lambda: next(given))
    *_, last = path
    np.testing.assert_allclose(last.item(), state[0], rtol=CONSISTENT)


def test_a_printed_plan_has_a_line_for_each_stage() -> None:
    text = format_plan(make_plan("heun_karras", STABLE_DIFFUSION, steps=5))
    assert text.startswith("heun_karras: 5 steps, 9 model evaluations, 3 rows of state, 0 draws of noise")
    assert len(text.split("\n\n")[2].splitlines()) == 1 + 9
    assert "▁" in text and "█" in text


def test_the_table_of_samplers_names_every_one() -> None:
    assert {row["name"] for row in samplers_table()} == set(SAMPLERS)
    assert all(name in format_samplers() for name in SAMPLERS)
