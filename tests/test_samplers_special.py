"""Samplers whose oracle needs arranging, parts of a way, ways that the caller gives, names, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.catalogue import SAMPLERS, find, own_sampler, sampler_names
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.noise import TorchCpuNoise
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.spacings import ALIGNED
from tests.loop import denoise
from tests.refused import about
from tests.sampler_oracle import SHAPE, STABLE_DIFFUSION, difference, follow, network, reference, replay, scheduler_of
from tests.test_samplers import ORACLES, TOLERANCES, TRAJECTORY

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLOW: Any = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type="flow_prediction")  # type: ignore[arg-type]


# --- DPM++ 2S a, which diffusers does not have: the steps of k-diffusion, in the lambda of the paper ---


def two_stage_ancestral(steps: int, spacing: str | None) -> list[Array]:
    """Return the latents after each evaluation, in float64, on the sigmas of diffusers' Euler scheduler."""
    config = {f"use_{spacing}_sigmas": True} if spacing else {}
    scheduler = scheduler_of(diffusers.EulerDiscreteScheduler, STABLE_DIFFUSION, **config)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().numpy()
    table = np.log(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().numpy())
    generator = TorchCpuNoise(0)
    x = generator.normal(SHAPE).astype(np.float64) * float(scheduler.init_noise_sigma)
    path = [x]

    def picture(x: Array, sigma: float, told: float | None = None) -> Array:
        t = float(np.interp(math.log(sigma), table, np.arange(len(table)))) if told is None else told
        seen = (x / math.sqrt(sigma**2 + 1)).astype(np.float32)
        return np.asarray(x - sigma * network(seen, np.array([t], dtype=np.float32)))

    for sigma, following, told in zip(sigmas[:-1], sigmas[1:], scheduler.timesteps.numpy(), strict=True):
        denoised = picture(x, sigma, float(told))
        if following == 0:
            path.append(denoised)
            continue
        up = min(following, math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
        down = math.sqrt(following**2 - up**2)
        start, end = -math.log(sigma), -math.log(down)
        middle = math.exp(-(start + (end - start) / 2))
        half = middle / sigma * x - math.expm1(-(end - start) / 2) * denoised
        path.append(half)
        x = down / sigma * x - math.expm1(-(end - start)) * picture(half, middle)
        x = x + up * generator.normal(SHAPE)
        path.append(x)
    return path


@pytest.mark.parametrize("spacing", [None, "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_dpmpp_2s_ancestral_takes_the_steps_of_its_paper(steps: int, spacing: str | None) -> None:
    plan = make_plan("DPM++ 2S a", STABLE_DIFFUSION, steps=steps, spacing=spacing)
    assert difference(replay(plan), two_stage_ancestral(steps, spacing)) < TRAJECTORY


# --- DPM++ SDE, whose noise is one Brownian path a step ---


class BrownianSteps:
    """Stand in for diffusers' Brownian tree: the increments of one path, drawn in the order of their use."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.first: tuple[float, torch.Tensor] | None = None

    def __call__(self, sigma: float, sigma_next: float) -> torch.Tensor:
        fresh = torch.randn(SHAPE, generator=self.generator)
        width = float(sigma - sigma_next)
        if self.first is None:
            self.first = (width, fresh)
            return fresh
        (part, earlier), self.first = self.first, None
        return (math.sqrt(part) * earlier + math.sqrt(width - part) * fresh) / math.sqrt(width)


@pytest.fixture
def sde_scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


@pytest.mark.parametrize("spacing", [None, "karras"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 9, 30])
def test_dpmpp_sde_walks_with_diffusers(sde_scheduler: Any, steps: int, prediction: Any, spacing: str | None) -> None:
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction)
    solver = scheduler_of(sde_scheduler, schedule, **({f"use_{spacing}_sigmas": True} if spacing else {}))
    solver.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * solver.init_noise_sigma
    solver.noise_sampler = BrownianSteps(generator)
    theirs = [latents.numpy(), *follow(solver, latents.float(), {})]
    assert difference(replay(make_plan("dpmpp_sde", schedule, steps=steps, spacing=spacing)), theirs) < TRAJECTORY


# --- flow matching ---


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("flow_euler", diffusers.FlowMatchEulerDiscreteScheduler),
        ("flow_heun", diffusers.FlowMatchHeunDiscreteScheduler),
        ("flow_lcm", diffusers.FlowMatchLCMScheduler),
    ],
)
@settings(max_examples=15, derandomize=True, deadline=None)
@given(steps=st.integers(2, 100), shift=st.sampled_from([1.0, 3.0, 0.5]))
def test_flow_matching_walks_with_diffusers(name: str, scheduler: Any, steps: int, shift: float) -> None:
    solver = scheduler(num_train_timesteps=1000, shift=shift)
    solver.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator)
    theirs = [latents.numpy(), *follow(solver, latents, {"generator": generator})]
    assert difference(replay(make_plan(name, FLOW, steps=steps, shift=shift)), theirs) < TRAJECTORY


def takes_flow_sigmas(name: str) -> bool:
    kind, noise = ORACLES[name].scheduler, ORACLES[name].config.get("final_sigmas_type")
    return "use_flow_sigmas" in inspect.signature(kind.__init__).parameters and not noise


@pytest.mark.parametrize("name", [name for name in ORACLES if takes_flow_sigmas(name)])
@settings(max_examples=8, derandomize=True, deadline=None)
@given(steps=st.integers(1, 100), shift=st.sampled_from([1.0, 3.0]))
def test_a_diffusion_solver_walks_a_flow_with_diffusers(name: str, steps: int, shift: float) -> None:
    oracle = ORACLES[name]
    config = {**oracle.config, "use_flow_sigmas": True, "flow_shift": shift}
    theirs = reference(oracle.scheduler, FLOW, steps, double=oracle.double, **config)
    ours = replay(make_plan(name, FLOW, steps=steps, shift=shift))
    assert difference(ours, theirs) < TRAJECTORY


@pytest.mark.parametrize("spacing", ["lu", "ays", "ays_sdxl", "leading", "trailing", "linspace"])
def test_a_flow_refuses_what_counts_in_a_diffusions_noise(spacing: str) -> None:
    with pytest.raises(RequestError, check=about("spacing")):
        make_plan("dpmpp_2m", FLOW, steps=5, spacing=spacing)


@pytest.mark.parametrize("name", ["flow_euler", "dpmpp_2m"])
def test_a_flows_own_sigmas_are_shares_of_noise(name: str) -> None:
    plan = make_plan(name, FLOW, sigmas=[0.9, 0.5, 0.0])
    np.testing.assert_allclose(plan.levels, [[0.1, 0.9], [0.5, 0.5], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(plan.timesteps, [900, 500], atol=1e-3)
    with pytest.raises(RequestError, check=about("sigmas")):
        make_plan(name, FLOW, sigmas=[1.5, 0.5, 0.0])


@pytest.mark.parametrize("name", sorted({*ORACLES} - {"kdpm2", "kdpm2_ancestral"}))
def test_the_generator_is_left_where_diffusers_leaves_it(name: str) -> None:
    ours, theirs = TorchCpuNoise(3), torch.Generator("cpu").manual_seed(3)
    oracle = ORACLES[name]
    reference(oracle.scheduler, STABLE_DIFFUSION, 5, generator=theirs, **oracle.config)
    replay(make_plan(name, STABLE_DIFFUSION, steps=5), generator=ours)
    np.testing.assert_allclose(ours.normal((32,)), torch.randn(32, generator=theirs).numpy(), atol=1e-6)


def test_a_sampler_refuses_a_model_that_predicts_something_else() -> None:
    with pytest.raises(RequestError, check=about("sampler")):
        make_plan("flow_lcm", msgspec.structs.replace(STABLE_DIFFUSION, prediction_type="sample"), steps=4)


# --- parts of a way ---

# diffusers weights one slope with the coefficients of four here, and repeats other timesteps: we start afresh
OWN_START = {"lms", "plms", "pndm"}
OWN_START_NOISE = {"lcm", "tcd"}  # their pipelines choose other timesteps for a strength


def start(plan: SamplingPlan, image: Array, generator: TorchCpuNoise) -> list[Array]:
    noise = generator.normal(SHAPE)
    path = denoise(plan, noise, network, lambda: generator.normal(SHAPE), image=image)
    return [plan.levels[0, 0] * image + plan.levels[0, 1] * noise, *path]


def diffusers_start(name: str, schedule: TrainingSchedule, steps: int, strength: float, image: Array) -> list[Array]:
    oracle = ORACLES[name]
    solver = scheduler_of(oracle.scheduler, schedule, **oracle.config)
    solver.set_timesteps(steps)
    begin = (steps - min(int(steps * strength), steps)) * solver.order
    if hasattr(solver, "set_begin_index"):
        solver.set_begin_index(begin)
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator)
    latents = solver.add_noise(torch.from_numpy(image), noise, solver.timesteps[begin : begin + 1])
    return [latents.numpy(), *follow(solver, latents, {"generator": generator}, solver.timesteps[begin:])]


@pytest.mark.parametrize("name", sorted({*ORACLES} - OWN_START - OWN_START_NOISE))
@pytest.mark.parametrize("strength", [0.3, 0.58, 0.8, 1.0])
def test_strength_starts_from_an_image_where_diffusers_does(name: str, strength: float) -> None:
    image = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    ours = start(make_plan(name, STABLE_DIFFUSION, steps=25, strength=strength), image, TorchCpuNoise(0))
    theirs = diffusers_start(name, STABLE_DIFFUSION, 25, strength, image)
    assert difference(ours, theirs) < TOLERANCES.get(name, TRAJECTORY)


@pytest.mark.parametrize("name", ["euler", "ddim", "euler_ancestral"])
def test_two_plans_that_meet_in_the_middle_are_one(name: str) -> None:
    whole = make_plan(name, STABLE_DIFFUSION, steps=10)
    first = make_plan(name, STABLE_DIFFUSION, steps=10, stop=0.6)
    second = make_plan(name, STABLE_DIFFUSION, steps=10, strength=0.4)
    np.testing.assert_array_equal(np.concatenate([first.transitions, second.transitions]), whole.transitions)
    np.testing.assert_array_equal(np.concatenate([first.timesteps, second.timesteps]), whole.timesteps)
    np.testing.assert_array_equal(first.levels[-1], second.levels[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_and_stops_anywhere(name: str) -> None:
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=SAMPLERS[name].predictions[0])  # type: ignore[arg-type]
    plan = make_plan(name, schedule, steps=20, strength=0.75, stop=0.9)
    assert len(replay(plan)) == plan.stages + 1
    assert plan.timesteps.max() < make_plan(name, schedule, steps=20).timesteps.max()


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ddim"])
def test_noise_that_starts_part_of_the_way_has_that_levels_size(name: str) -> None:
    plan = make_plan(name, STABLE_DIFFUSION, steps=10, strength=0.5)
    assert plan.initial_scale == pytest.approx(np.hypot(*plan.levels[0]), rel=1e-6)


# --- ways that the caller gives ---


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2s", "ddpm"])
def test_timesteps_of_the_callers_choice_are_diffusers(name: str) -> None:
    timesteps = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    solver = scheduler_of(ORACLES[name].scheduler, STABLE_DIFFUSION)
    solver.set_timesteps(timesteps=timesteps)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * solver.init_noise_sigma
    theirs = [latents.numpy(), *follow(solver, latents, {"generator": generator})]
    assert difference(replay(make_plan(name, STABLE_DIFFUSION, timesteps=timesteps)), theirs) < TRAJECTORY


def test_sigmas_of_the_callers_choice_are_diffusers() -> None:
    sigmas = [*ALIGNED["ays"][:-1], 0.0]
    solver = scheduler_of(diffusers.EulerDiscreteScheduler, STABLE_DIFFUSION)
    solver.set_timesteps(sigmas=sigmas)
    latents = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(0)) * solver.init_noise_sigma
    theirs = [latents.numpy(), *follow(solver, latents, {})]
    assert difference(replay(make_plan("euler", STABLE_DIFFUSION, sigmas=sigmas)), theirs) < TRAJECTORY
    named = make_plan("euler", STABLE_DIFFUSION, steps=10, spacing="ays")
    np.testing.assert_allclose(named.sigmas, np.float32(sigmas), rtol=1e-6)


def test_every_second_of_twenty_aligned_steps_is_a_published_one() -> None:
    plan = make_plan("dpmpp_2m_ays", STABLE_DIFFUSION, steps=20)
    np.testing.assert_allclose(plan.sigmas[:-1:2], ALIGNED["ays"][:-1], rtol=1e-5)


def test_aligned_steps_are_refused_for_other_noise() -> None:
    with pytest.raises(RequestError, check=about("spacing")):
        make_plan("euler_ays", msgspec.structs.replace(STABLE_DIFFUSION, beta_end=0.02), steps=10)


def test_simple_spacing_takes_training_ratios_from_the_top() -> None:
    plan = make_plan("euler_simple", STABLE_DIFFUSION, steps=4)
    np.testing.assert_allclose(plan.timesteps, [999, 749, 499, 249], atol=1e-2)


def test_sgm_uniform_spacing_leaves_the_last_of_one_more_timestep_out() -> None:
    plan = make_plan("euler_sgm_uniform", STABLE_DIFFUSION, steps=3)
    np.testing.assert_allclose(plan.timesteps, [999, 666, 333], atol=1e-2)


def test_a_timestep_spacing_takes_the_place_of_the_checkpoints() -> None:
    plan = make_plan("ddim", STABLE_DIFFUSION, steps=4, spacing="trailing")
    assert plan.timesteps.tolist() == [999, 749, 499, 249]


# --- names ---


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpmpp_2m", "dpmpp_2m"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde_exponential"),
        ("DPM++ 3M SDE Karras", "dpmpp_3m_sde_karras"),
        ("DPM++ SDE Karras", "dpmpp_sde_karras"),
        ("Euler a", "euler_ancestral"),
        ("euler", "euler"),
        ("DPM2 a Karras", "kdpm2_ancestral_karras"),
        ("dpm_2_ancestral", "kdpm2_ancestral"),
        ("uni_pc", "unipc"),
        ("LMS Karras", "lms_karras"),
        ("k_heun", "heun"),
        ("PLMS", "plms"),
        ("LCM", "lcm"),
        ("Euler SGM Uniform", "euler_sgm_uniform"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("PNDMScheduler", "plms"),
        ("UniPCMultistepScheduler", "unipc"),
    ],
)
def test_the_communitys_and_diffusers_names_are_known(alias: str, canonical: str) -> None:
    assert str(find(alias)) == canonical
    assert make_plan(alias, STABLE_DIFFUSION, steps=5).sampler == canonical


def test_every_diffusers_class_of_an_oracle_is_a_name() -> None:
    for name, oracle in ORACLES.items():
        found = find(oracle.scheduler.__name__).sampler
        assert ORACLES[found].scheduler is oracle.scheduler, name


def test_every_canonical_name_makes_a_plan_of_that_name() -> None:
    for name in sampler_names():
        prediction = SAMPLERS[find(name).sampler].predictions[0]
        schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction)  # type: ignore[arg-type]
        assert make_plan(name, schedule, steps=6).sampler == name


def test_a_bundle_that_kept_the_class_alone_draws_with_that() -> None:
    assert own_sampler(msgspec.structs.replace(STABLE_DIFFUSION, scheduler="PNDMScheduler")).name == "plms"
    with pytest.raises(RequestError):
        own_sampler(msgspec.structs.replace(STABLE_DIFFUSION, scheduler="VQDiffusionScheduler"))


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("dpmp_2m", {"steps": 20}, "sampler"),
        ("zzz", {"steps": 20}, "sampler"),
        ("euler", {}, "steps"),
        ("euler", {"steps": 2.5}, "steps"),
        ("euler", {"steps": True}, "steps"),
        ("euler", {"steps": 5, "shift": 3.0}, "shift"),
        ("euler", {"steps": 5, "shift": -1.0}, "shift"),
        ("euler", {"steps": 3, "timesteps": [9, 5]}, "steps"),
        ("euler", {"steps": 5, "eta": 0.5}, "eta"),
        ("ddim", {"steps": 5, "eta": 1.5}, "eta"),
        ("ddim", {"steps": 5, "strength": -0.1}, "strength"),
        ("ddim", {"steps": 5, "strength": 2.0}, "strength"),
        ("ddim", {"steps": 5, "strength": float("nan")}, "strength"),
        ("ddim", {"steps": 5, "strength": 0.1}, "strength"),
        ("ddim", {"steps": 5, "stop": 0.0}, "strength"),
        ("ddim", {"steps": 5, "spacing": "karras"}, "spacing"),
        ("euler", {"steps": 5, "spacing": "uneven"}, "spacing"),
        ("euler_karras", {"steps": 5, "spacing": "beta"}, "spacing"),
        ("euler_karras", {"timesteps": [9, 5]}, "timesteps"),
        ("euler", {"timesteps": [9, 5], "sigmas": [3.0, 0.0]}, "timesteps"),
        ("plms", {"timesteps": [9, 5]}, "timesteps"),
        ("ddim", {"sigmas": [3.0, 0.0]}, "sigmas"),
        ("euler", {"timesteps": [5, 9]}, "timesteps"),
        ("euler", {"timesteps": [1000, 9]}, "timesteps"),
        ("euler", {"timesteps": []}, "steps"),
        ("euler", {"sigmas": [float("nan"), 0.0]}, "sigmas"),
        ("euler", {"sigmas": [3.0, -1.0]}, "sigmas"),
        ("lcm", {"steps": 51}, "steps"),
        ("pndm", {"steps": 3}, "steps"),
        ("flow_lcm", {"steps": 3}, "sampler"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(name: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        make_plan(name, STABLE_DIFFUSION, **options)


@pytest.mark.parametrize("name", sampler_names())
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(name: str, steps: int) -> None:
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=SAMPLERS[find(name).sampler].predictions[0])  # type: ignore[arg-type]
    with pytest.raises(RequestError, check=about("steps")):
        make_plan(name, schedule, steps=steps)


def test_a_plan_whose_numbers_are_not_finite_is_refused() -> None:
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(RequestError, check=about("sampler")):
        make_plan("ddim", schedule, steps=5)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(sampler_names()),
    steps=st.integers(1, 1000),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    strength=st.floats(0, 1),
    zero_snr=st.booleans(),
)
def test_a_request_gives_a_finite_plan_or_a_refusal(
    name: str, steps: int, spacing: str, strength: float, zero_snr: bool
) -> None:
    prediction: Any = SAMPLERS[find(name).sampler].predictions[0]
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    try:
        plan = make_plan(name, schedule, steps=steps, spacing=spacing, strength=strength)
    except RequestError:
        return
    assert all(np.isfinite(array).all() for array in (plan.transitions, plan.input_rows, plan.timesteps, plan.levels))
    assert plan.timesteps.max() < 1000
