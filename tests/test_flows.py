"""Samplers of flows: which follow one, where their steps lie, and what each is held against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from latentrt.engines.bundle.training import DynamicShift, FlowShift, OwnSampler
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.noise import TorchCpuNoise
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.loop import denoise
from tests.refused import about
from tests.sampler_oracle import SHAPE, STABLE_DIFFUSION, difference, follow, network, replay, scheduler_of
from tests.test_samplers import ORACLES, TOLERANCES, TRAJECTORY
from tests.test_samplers_special import takes_flow_sigmas

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PLAIN = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type="flow_prediction")
SD3 = msgspec.structs.replace(PLAIN, flow=FlowShift(shift=3.0), partial_step="taken")  # as its scheduler says
DYNAMIC = msgspec.structs.replace(
    PLAIN,
    flow=FlowShift(dynamic=DynamicShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)),
)

MATCHED = {"euler", "heun", "flow_lcm"}  # walked with diffusers' classes for flows in test_samplers_special.py
SOLVERS = {name for name in ORACLES if takes_flow_sigmas(name)}  # and with its solvers, told of a flow, there too
SLOPES = {"lms", "kdpm2"}  # with diffusers' classes for diffusions, which weigh slopes as a flow's are
TWO_STAGE = {"kdpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}  # with their equations written out below
BY_ORDER = {"dpm_2m", "dpm_3m"}  # with the differential equation alone
FOLLOW = {name for name, sampler in SAMPLERS.items() if "flow_prediction" in sampler.predictions}
ENDS_NOISY = {"dpm_2m", "dpm_3m", "deis", "deis_3", "sa_solver"}  # as they do for diffusions


def test_every_sampler_that_follows_a_flow_is_held_against_something() -> None:
    assert MATCHED | SOLVERS | SLOPES | TWO_STAGE | BY_ORDER | {"euler_ancestral"} == FOLLOW
    assert len(FOLLOW) == 23


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - FOLLOW))
def test_the_others_are_refused_with_those_that_follow_one(name: str) -> None:
    with pytest.raises(RequestError, check=about("sampler")) as caught:
        make_plan(name, SD3, steps=8)
    assert all(other in str(caught.value) for other in FOLLOW)


# --- what holds for all of them ---


@pytest.mark.parametrize("spacing", [None, "karras", "exponential", "beta", "simple", "sgm_uniform"])
@pytest.mark.parametrize("name", sorted(FOLLOW))
def test_a_model_that_knows_the_picture_keeps_its_weight_and_the_deviation_of_every_level(
    name: str, spacing: str | None
) -> None:
    """With or without fresh noise, latents are alpha * picture + sigma * unit noise at each level, and end clean."""
    plan = make_plan(name, SD3, steps=12, spacing=spacing)
    known = np.eye(plan.stages + 2)  # the picture, the first noise, and what is drawn at each stage
    state = np.zeros((plan.rows, len(known)))
    state[0] = plan.levels[0] @ known[:2]
    for k in range(plan.stages - (name in ENDS_NOISY)):
        seen = plan.input_rows[k].astype(np.float64) @ state
        output = (seen - known[0]) / float(plan.levels[k, 1])
        state = plan.transitions[k].astype(np.float64) @ np.stack([*state, output, known[k + 2]])
        np.testing.assert_allclose(state[0, 0], plan.levels[k + 1, 0], atol=2e-4)
        np.testing.assert_allclose(np.linalg.norm(state[0, 1:]), plan.levels[k + 1, 1], atol=2e-4)
    np.testing.assert_allclose(plan.levels.sum(axis=1), 1, atol=1e-6)
    assert plan.levels[-1].tolist() == [1, 0]
    assert np.all(np.diff(plan.timesteps) <= 0) and 0 < plan.timesteps[-1] <= plan.timesteps[0] <= 1000


MIXING = np.random.default_rng(0).standard_normal((8, 8)) / 3


def velocity(x: Array) -> Array:
    return np.tanh(x @ MIXING) * 1.3 + 0.5 * x


def integrated(x: Array, start: float, stop: float, steps: int = 2000) -> Array:
    """Return where the flow of `velocity` leads, by the classical Runge-Kutta method."""
    h = (stop - start) / steps
    for _ in range(steps):
        a = velocity(x)
        b = velocity(x + h / 2 * a)
        c = velocity(x + h / 2 * b)
        x = x + h / 6 * (a + 2 * b + 2 * c + velocity(x + h * c))
    return x


def led(plan: SamplingPlan, x: Array) -> Array:
    state = np.zeros((plan.rows, *x.shape))
    state[0] = x
    for k in range(plan.stages):
        output = velocity(np.tensordot(plan.input_rows[k].astype(np.float64), state, axes=1))
        state = np.tensordot(plan.transitions[k].astype(np.float64), np.stack([*state, output, 0 * x]), axes=1)
    return np.asarray(state[0])


ORDERS = {"euler": 0.95} | dict.fromkeys(
    ("heun", "lms", "kdpm2", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpm_2m", "dpm_3m", "unipc", "unipc_3"), 1.75
)
ORDERS |= {"deis": 1.75, "deis_3": 1.9, "dpmpp_3s": 2.8}


@pytest.mark.parametrize("name", ORDERS)
def test_a_sampler_without_noise_converges_to_the_flow_at_its_order(name: str) -> None:
    noise = np.random.default_rng(1).standard_normal((4, 8))
    exact, errors = integrated(noise, 0.9, 0.1), []
    for steps in (24, 96):
        plan = make_plan(name, PLAIN, sigmas=np.linspace(0.9, 0.1, steps + 1).tolist())
        errors.append(np.abs(led(plan, noise) - exact).max() / np.abs(exact).max())
    assert math.log(errors[0] / errors[1], 4) > ORDERS[name]
    assert errors[1] < 2e-3


def test_all_samplers_without_noise_have_an_order() -> None:
    quiet = {name for name in FOLLOW if not make_plan(name, SD3, steps=5).uses_noise.any()}
    assert quiet == set(ORDERS)


# --- schedulers of diffusers that need arranging ---


def matched(steps: int, **config: Any) -> Any:
    solver = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **config)
    solver.set_timesteps(steps)
    return solver


def as_they_are(latents: torch.Tensor, _: Any) -> torch.Tensor:
    return latents


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("name", sorted(SLOPES))
def test_slopes_are_weighed_as_diffusers_does(name: str, steps: int) -> None:
    """A diffusion that predicts noise has the slope that a flow predicts, if its latents are not scaled."""
    solver = scheduler_of(ORACLES[name].scheduler, STABLE_DIFFUSION)
    solver.set_timesteps(steps)
    sigmas = matched(steps).sigmas.double()
    timesteps = 1000 * sigmas[:-1]
    if name == "kdpm2":
        middle = (sigmas[:-1] * sigmas[1:]).sqrt()
        solver.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
        solver.sigmas_interpol = torch.cat([sigmas[:1], middle.repeat_interleave(2), sigmas[-1:]])
        timesteps = torch.stack([timesteps, 1000 * middle], dim=1).flatten()[:-1]
    else:
        solver.sigmas = sigmas
    solver.timesteps, solver.scale_model_input, solver.is_scale_input_called = timesteps, as_they_are, True
    solver.set_begin_index(0)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = [latents.numpy(), *follow(solver, latents, {})]
    assert difference(replay(make_plan(name, SD3, steps=steps)), theirs) < TOLERANCES.get(name, TRAJECTORY)


@pytest.mark.parametrize("spacing", [None, "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_euler_ancestral_is_diffusers_for_flows(steps: int, spacing: str | None) -> None:
    sigmas = matched(steps, **({f"use_{spacing}_sigmas": True} if spacing else {})).sigmas
    solver = diffusers.LTXEulerAncestralRFScheduler()
    solver.set_timesteps(sigmas=sigmas.tolist())
    solver.timesteps = 1000 * sigmas[:-1]
    solver.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator)
    theirs = [latents.numpy(), *follow(solver, latents, {"generator": generator})]
    assert difference(replay(make_plan("euler_ancestral", SD3, steps=steps, spacing=spacing)), theirs) < TRAJECTORY


# --- two evaluations a step and fresh noise: k-diffusion's steps with the split of a flow ---


def split(here: float, there: float) -> tuple[float, float, float]:
    """Return the level to go down to, what is kept of the latents there, and the noise that leads back up."""
    down = there * (1 + (there / here - 1))
    kept = (1 - there) / (1 - down)
    return down, kept, math.sqrt(there**2 - (kept * down) ** 2)


def picture(x: Array, sigma: float) -> Array:
    return x - sigma * network(x.astype(np.float32), np.array([1000 * sigma], dtype=np.float32)).astype(np.float64)


def towards(x: Array, found: Array, here: float, there: float) -> Array:
    return there / here * x + (1 - there / here) * found


def kdpm2_ancestral(x: Array, here: float, there: float, draw: Callable[[], Array]) -> Iterator[Array]:
    down, kept, fresh = split(here, there)
    middle = math.sqrt(here * down)
    half = towards(x, picture(x, here), here, middle)
    yield half
    slope = (half - picture(half, middle)) / middle
    yield kept * (x + (down - here) * slope) + fresh * draw()


def dpmpp_2s_ancestral(x: Array, here: float, there: float, draw: Callable[[], Array]) -> Iterator[Array]:
    down, kept, fresh = split(here, there)
    middle = math.sqrt(here * down)
    half = towards(x, picture(x, here), here, middle)
    yield half
    yield kept * towards(x, picture(half, middle), here, down) + fresh * draw()


def dpmpp_sde(x: Array, here: float, there: float, draw: Callable[[], Array]) -> Iterator[Array]:
    middle = math.sqrt(here * there)
    down, kept, fresh = split(here, middle)
    first = draw()
    half = kept * towards(x, picture(x, here), here, down) + fresh * first
    yield half
    down, kept, fresh = split(here, there)
    widths = np.array([here - middle, middle - there]) / (here - there)
    path = math.sqrt(widths[0]) * first + math.sqrt(widths[1]) * draw()
    yield kept * towards(x, picture(half, middle), here, down) + fresh * path


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("step", [kdpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde])
def test_two_stages_and_fresh_noise_are_the_equations(step: Any, steps: int) -> None:
    noise = TorchCpuNoise(0)
    path = [noise.normal(SHAPE).astype(np.float64)]
    sigmas = matched(steps).sigmas.double().tolist()
    for here, there in itertools.pairwise(sigmas):
        x = path[-1]
        path += [picture(x, here)] if there == 0 else step(x, here, there, lambda: noise.normal(SHAPE))
    assert difference(replay(make_plan(step.__name__, SD3, steps=steps)), path) < TRAJECTORY


# --- where the steps lie ---


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "deis", "sa_solver"])
def test_a_spacing_lies_between_a_solvers_own_shifted_ends(name: str, spacing: str) -> None:
    """diffusers spaces a diffusion's sigmas there: its solver is told those of its own class for flows."""
    solver = scheduler_of(ORACLES[name].scheduler, PLAIN, use_flow_sigmas=True, flow_shift=3.0)
    solver.set_timesteps(15)
    spaced = getattr(matched(15), f"_convert_to_{spacing}")(solver.sigmas[:-1], 15)
    ends = spaced[-1:] if name in ENDS_NOISY else [0.0]
    solver.sigmas = torch.tensor([*spaced, *ends], dtype=torch.float64)
    solver.timesteps = torch.tensor(np.trunc(1000 * np.asarray(spaced)), dtype=torch.int64)
    solver.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator)
    theirs = [latents.numpy(), *follow(solver, latents, {"generator": generator})]
    assert difference(replay(make_plan(name, SD3, steps=15, spacing=spacing)), theirs) < TRAJECTORY


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_a_spacing_of_flow_euler_is_diffusers(spacing: str) -> None:
    theirs = matched(11, **{f"use_{spacing}_sigmas": True})
    plan = make_plan(f"euler_{spacing}", SD3, steps=11)
    np.testing.assert_allclose(plan.levels[:, 1], theirs.sigmas, atol=1e-6)
    np.testing.assert_allclose(plan.timesteps, theirs.timesteps, atol=1e-3)


def test_simple_takes_every_so_manyth_of_the_shifted_training_sigmas() -> None:
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.numpy()
    np.testing.assert_allclose(make_plan("euler_simple", SD3, steps=8).levels[:-1, 1], table[::125], atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1344, 768)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_size_of_the_picture_shifts_the_steps_as_diffusers_mu(kind: Any, size: tuple[int, int]) -> None:
    tokens = size[0] // 16 * (size[1] // 16)
    flow = msgspec.structs.replace(DYNAMIC.flow, dynamic=msgspec.structs.replace(DYNAMIC.flow.dynamic, kind=kind))  # type: ignore[union-attr, type-var]
    solver = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    solver.set_timesteps(9, mu=calculate_shift(tokens))
    plan = make_plan(None, own(flow=flow), steps=9, tokens=tokens)
    np.testing.assert_allclose(plan.levels[:, 1], solver.sigmas, atol=1e-6)


def own(**fields: Any) -> Any:
    return msgspec.structs.replace(SD3, sampler=OwnSampler(name="euler"), **fields)


def test_a_shift_of_the_size_needs_the_size_or_a_shift() -> None:
    with pytest.raises(RequestError, check=about("shift")):
        make_plan("dpmpp_2m", DYNAMIC, steps=5)
    mu = calculate_shift(1024)
    asked = make_plan("euler", DYNAMIC, steps=5, shift=math.exp(mu))
    np.testing.assert_allclose(asked.levels, make_plan("euler", DYNAMIC, steps=5, tokens=1024).levels, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FOLLOW))
def test_the_checkpoints_shift_holds_for_every_sampler_and_a_requests_takes_its_place(name: str) -> None:
    for schedule, options in ((PLAIN, {"shift": 3.0}), (SD3, {})):
        plan = make_plan(name, schedule, steps=6, **options)
        plain = make_plan(name, PLAIN, steps=6)
        assert (plan.levels[1:-2, 1] > plain.levels[1:-2, 1]).all()
        np.testing.assert_array_equal(plan.levels, make_plan(name, SD3, steps=6).levels)
    np.testing.assert_array_equal(
        make_plan(name, SD3, steps=6, shift=1.0).levels, make_plan(name, PLAIN, steps=6).levels
    )


def test_given_sigmas_are_shifted_only_if_the_request_says_how_far() -> None:
    given = [1.0, 0.7, 0.4, 0.1]
    solver = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver.set_timesteps(sigmas=given)
    plan = make_plan("euler", SD3, sigmas=[*given, 0.0], shift=3.0)
    np.testing.assert_allclose(plan.levels[:, 1], solver.sigmas, atol=1e-6)
    np.testing.assert_allclose(make_plan("euler", SD3, sigmas=[*given, 0.0]).levels[:-1, 1], given, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FOLLOW - ENDS_NOISY))
def test_given_timesteps_are_a_thousand_times_the_sigmas(name: str) -> None:
    plan = make_plan(name, SD3, timesteps=[1000, 750, 500, 250])
    others = make_plan(name, SD3, sigmas=[1.0, 0.75, 0.5, 0.25, 0.0])
    np.testing.assert_array_equal(plan.transitions, others.transitions)
    np.testing.assert_array_equal(plan.timesteps, others.timesteps)


@pytest.mark.parametrize("terminal", [0.1, 0.02])
def test_a_terminal_stretches_all_steps(terminal: float) -> None:
    schedule = msgspec.structs.replace(PLAIN, flow=FlowShift(shift=3.0, terminal=terminal))
    plan = make_plan("euler", schedule, steps=6)
    np.testing.assert_allclose(plan.levels[:, 1], matched(6, shift_terminal=terminal).sigmas, atol=1e-6)
    assert plan.levels[-2, 1] == pytest.approx(terminal)


# --- from an image ---

STRENGTHS = (0.3, 0.58, 0.6, 0.75, 0.99, 1.0)
FLOW_CLASSES: dict[str, Any] = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", FLOW_CLASSES)
@pytest.mark.parametrize("steps", [20, 28, 50])
def test_strength_starts_where_stable_diffusion_3s_pipeline_does(name: str, steps: int, strength: float) -> None:
    solver = FLOW_CLASSES[name](shift=3.0)
    solver.set_timesteps(steps)
    pipeline: Any = SimpleNamespace(scheduler=solver)
    timesteps, _ = diffusers.StableDiffusion3Img2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    image = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    latents = solver.scale_noise(torch.from_numpy(image), timesteps[:1], noise)
    theirs = [latents.numpy(), *follow(solver, latents, {}, timesteps)]
    plan, ours = make_plan(name, SD3, steps=steps, strength=strength), TorchCpuNoise(0).normal(SHAPE)
    path = denoise(plan, ours, network, lambda: ours, image=image)
    assert difference([plan.levels[0, 0] * image + plan.levels[0, 1] * ours, *path], theirs) < TRAJECTORY


def test_other_families_leave_the_step_out_that_a_strength_ends_in() -> None:
    counts = [make_plan("euler", schedule, steps=20, strength=0.99).stages for schedule in (PLAIN, SD3)]
    assert counts == [19, 20]
