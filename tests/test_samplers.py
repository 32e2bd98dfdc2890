"""Every sampler's plan walks where diffusers' scheduler of the same checkpoint walks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latentrt.engines.bundle.training import Prediction, Spacing
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.make import make_plan
from tests.sampler_oracle import STABLE_DIFFUSION, difference, reference, replay

TRAJECTORY = 1e-4  # our coefficients are computed in double, diffusers' in float32: 3e-5 at worst was measured
TOLERANCES = {  # of whole trajectories, relative to the largest latent of a step
    "lms": 1e-3,  # diffusers integrates numerically, to 1e-4 of each coefficient
    "heun": 1e-3,  # two linspace steps divide float32's rounding of latents of size 14.6 by a sigma of 0.029
    "kdpm2_ancestral": 1e-3,  # the same
    "dpmpp_3m_sde": 1e-3,  # its second difference has a weight of order one: roundings grow over a hundred steps
}


@dataclass(frozen=True)
class Oracle:
    """diffusers' counterpart of a sampler. spaced: it knows the three spacings of sigmas, too."""

    scheduler: Any
    config: Mapping[str, Any] = field(default_factory=dict)
    predictions: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
    most: int = 100  # steps
    least: int = 1
    spaced: bool = False
    double: bool = False  # in float32 diffusers' own coefficients lose most of their digits
    examples: int = 12


NOT_SAMPLE: tuple[Prediction, ...] = ("epsilon", "v_prediction")  # what diffusers has implemented
MULTI, SINGLE = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
SDE, NOISE = {"algorithm_type": "sde-dpmsolver++"}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}

ORACLES = {
    "ddim": Oracle(diffusers.DDIMScheduler),
    "ddpm": Oracle(diffusers.DDPMScheduler),
    "plms": Oracle(diffusers.PNDMScheduler, predictions=NOT_SAMPLE),
    "pndm": Oracle(diffusers.PNDMScheduler, {"skip_prk_steps": False}, predictions=NOT_SAMPLE, least=4),
    "lms": Oracle(diffusers.LMSDiscreteScheduler, spaced=True, examples=6),
    "euler": Oracle(diffusers.EulerDiscreteScheduler, spaced=True),
    "euler_ancestral": Oracle(diffusers.EulerAncestralDiscreteScheduler, predictions=NOT_SAMPLE),
    "heun": Oracle(diffusers.HeunDiscreteScheduler, spaced=True),
    # the constructors of these two take a third of a second
    "kdpm2": Oracle(diffusers.KDPM2DiscreteScheduler, predictions=NOT_SAMPLE, spaced=True, examples=4),
    "kdpm2_ancestral": Oracle(
        diffusers.KDPM2AncestralDiscreteScheduler, predictions=NOT_SAMPLE, spaced=True, examples=4
    ),
    "dpmpp_2m": Oracle(MULTI, spaced=True),
    "dpmpp_2m_sde": Oracle(MULTI, SDE, spaced=True),
    "dpmpp_3m": Oracle(MULTI, {"solver_order": 3}, spaced=True),
    "dpmpp_3m_sde": Oracle(MULTI, {"solver_order": 3} | SDE, spaced=True, double=True),
    "dpmpp_2s": Oracle(SINGLE, spaced=True),
    "dpmpp_2s_sde": Oracle(SINGLE, SDE, spaced=True),
    "dpmpp_3s": Oracle(SINGLE, {"solver_order": 3}, spaced=True),
    "dpm_2s": Oracle(SINGLE, NOISE, spaced=True),
    "dpm_2m": Oracle(MULTI, NOISE, spaced=True),
    "dpm_2m_sde": Oracle(MULTI, NOISE | {"algorithm_type": "sde-dpmsolver"}, spaced=True),
    "dpm_3m": Oracle(MULTI, NOISE | {"solver_order": 3}, spaced=True),
    "unipc": Oracle(diffusers.UniPCMultistepScheduler, spaced=True),
    "unipc_3": Oracle(diffusers.UniPCMultistepScheduler, {"solver_order": 3}, spaced=True),
    "deis": Oracle(diffusers.DEISMultistepScheduler, spaced=True),
    "deis_3": Oracle(diffusers.DEISMultistepScheduler, {"solver_order": 3}, spaced=True, double=True),
    "sa_solver": Oracle(diffusers.SASolverScheduler, spaced=True),
    "lcm": Oracle(diffusers.LCMScheduler, most=50),
    "tcd": Oracle(diffusers.TCDScheduler, most=50),
}
ELSEWHERE = {"dpmpp_sde", "dpmpp_2s_ancestral", "flow_lcm"}  # test_samplers_special.py

# NumPy's advice to diffusers about __array__, and diffusers' about algorithm_type
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

spacings = st.sampled_from(["leading", "trailing", "linspace", None])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_every_sampler_has_an_oracle() -> None:
    assert {*ORACLES, *ELSEWHERE} == set(SAMPLERS)


def walks_with_diffusers(
    name: str, spacing: str | None, steps: int, prediction: Prediction, timestep_spacing: Spacing | None
) -> None:
    # 61 trailing steps: a float quotient makes diffusers take a 62nd step, at timestep -1, and us not
    assume((steps, timestep_spacing) != (61, "trailing"))
    oracle = ORACLES[name]
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing=timestep_spacing)
    plan = make_plan(name, schedule, steps=steps, spacing=spacing)
    config = {**oracle.config, **({f"use_{spacing}_sigmas": True} if spacing else {})}
    # beta crowds sigmas at both ends: in float32 the reference's differences between neighbours are mostly rounding
    double = oracle.double or spacing == "beta"
    theirs = reference(oracle.scheduler, schedule, steps, double=double, **config)
    assert difference(replay(plan), theirs) < TOLERANCES.get(name, TRAJECTORY)


@pytest.mark.parametrize("name", ORACLES)
def test_a_plan_walks_with_diffusers(name: str) -> None:
    oracle = ORACLES[name]

    @settings(max_examples=2 * oracle.examples, derandomize=True, deadline=None)
    @given(st.integers(oracle.least, oracle.most), st.sampled_from(oracle.predictions), spacings)
    def check(steps: int, prediction: Prediction, timestep_spacing: Spacing | None) -> None:
        walks_with_diffusers(name, None, steps, prediction, timestep_spacing)

    check()


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", [name for name, oracle in ORACLES.items() if oracle.spaced])
def test_a_spacing_of_sigmas_is_diffusers(name: str, spacing: str) -> None:
    oracle = ORACLES[name]

    @settings(max_examples=oracle.examples // 2, derandomize=True, deadline=None)
    @given(st.integers(oracle.least, oracle.most), st.sampled_from(oracle.predictions), spacings)
    def check(steps: int, prediction: Prediction, timestep_spacing: Spacing | None) -> None:
        walks_with_diffusers(name, spacing, steps, prediction, timestep_spacing)

    check()


@pytest.mark.parametrize("steps", [14, 15, 16])
@pytest.mark.parametrize("name", [name for name in ORACLES if name.startswith(("dpm", "deis", "unipc"))])
def test_the_last_orders_of_a_solver_change_at_fifteen_steps_with_diffusers(name: str, steps: int) -> None:
    walks_with_diffusers(name, None, steps, "epsilon", "leading")


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta_is_diffusers_share_of_fresh_noise(name: str, eta: float) -> None:
    plan = make_plan(name, STABLE_DIFFUSION, steps=10, eta=eta)
    theirs = reference(ORACLES[name].scheduler, STABLE_DIFFUSION, 10, step={"eta": eta})
    assert difference(replay(plan), theirs) < TRAJECTORY


ZERO_SNR = 2e-3  # the first latents have size 4096, whose rounding in float32 is 2.4e-4


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm", "tcd"])
def test_zero_terminal_snr_is_diffusers(name: str, spacing: Spacing) -> None:
    schedule = msgspec.structs.replace(
        STABLE_DIFFUSION, prediction_type="v_prediction", timestep_spacing=spacing, rescale_betas_zero_snr=True
    )
    theirs = reference(ORACLES[name].scheduler, schedule, 20)
    assert difference(replay(make_plan(name, schedule, steps=20)), theirs) < ZERO_SNR


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["ddim", "euler_karras", "dpmpp_2m_karras", "unipc_karras"])
def test_every_beta_schedule_is_diffusers(name: str, beta_schedule: Any) -> None:
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, beta_schedule=beta_schedule)
    base = name.removesuffix("_karras")
    config = {"use_karras_sigmas": True} if name != base else {}
    theirs = reference(ORACLES[base].scheduler, schedule, 12, **config)
    assert difference(replay(make_plan(name, schedule, steps=12)), theirs) < TRAJECTORY


def test_trained_betas_take_the_place_of_a_schedule() -> None:
    betas = tuple(float(b) for b in np.linspace(0.001, 0.02, 1000, dtype=np.float32))
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, trained_betas=betas)
    theirs = reference(diffusers.EulerDiscreteScheduler, schedule, 9)
    assert difference(replay(make_plan("euler", schedule, steps=9)), theirs) < TRAJECTORY
