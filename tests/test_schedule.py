"""Every key of every scheduler class of diffusers: mapped to a plan that walks with it, or refused by name."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
import pkgutil
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.bundle.files import Bundle, write_manifest
from latentrt.engines.bundle.training import EdmRange
from latentrt.engines.errors import CheckpointError, RequestError
from latentrt.engines.spec import Array
from latentrt.export.checkpoint import DEMO, open_checkpoint
from latentrt.export.configs.schedule import SCHEDULERS, training_schedule
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.refused import about
from tests.sampler_oracle import SHAPE, difference, follow, replay
from tests.test_parity import NEGATIVE, PROMPT, psnr
from tests.test_samplers import TOLERANCES, TRAJECTORY
from tests.test_samplers_special import BrownianSteps

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about options that it means to drop

# What each key may be in a config. A key that is not here is one that diffusers has got since: say what it means.
VALUES: Mapping[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 500),
    "beta_start": (0.00085, 0.0001),
    "beta_end": (0.012, 0.02),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "trained_betas": (None, [0.01 * (1 + i / 500) / 2 for i in range(500)]),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0, 1),
    "set_alpha_to_one": (True, False, None),
    "rescale_betas_zero_snr": (False, True),
    "clip_sample": (False,),
    "clip_sample_range": (1.0, 2.0),
    "thresholding": (False, True),
    "dynamic_thresholding_ratio": (0.995, 0.9),
    "sample_max_value": (1.0, 2.0),
    "variance_type": (
        None,
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
    "skip_prk_steps": (True, False, None),
    "use_karras_sigmas": (False, True),
    "use_exponential_sigmas": (False, True),
    "use_beta_sigmas": (False, True),
    "use_lu_lambdas": (False, True),
    "use_flow_sigmas": (False, True),
    "flow_shift": (1.0, 3.0),
    "use_dynamic_shifting": (False, True),
    "time_shift_type": ("exponential", "linear"),
    "shift": (1.0, 3.0),
    "base_shift": (0.5, 0.3),
    "max_shift": (1.15, 0.9),
    "base_image_seq_len": (256, 128),
    "max_image_seq_len": (4096, 2048),
    "invert_sigmas": (False, True),
    "stochastic_sampling": (False, True),
    "scale_factors": (None, [0.5, 1.0]),
    "upscale_mode": ("bicubic", "nearest"),
    "shift_terminal": (None, 0.02),
    "interpolation_type": ("linear", "log_linear"),
    "sigma_min": (None, 0.05),
    "sigma_max": (None, 10.0),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": (
        "dpmsolver++",
        "sde-dpmsolver++",
        "dpmsolver",
        "sde-dpmsolver",
        "deis",
        "data_prediction",
        "noise_prediction",
    ),
    "lower_order_final": (True, False, None),
    "euler_at_final": (False, True),
    "lambda_min_clipped": (-math.inf, -5.1, -1.0),
    "predict_x0": (True, False),
    "disable_corrector": ([], [0, 3]),
    "solver_p": (None,),
    "predictor_order": (2, 3),
    "corrector_order": (2, 1),
    "tau_func": (None,),
    "noise_sampler_seed": (None, 5),
    "original_inference_steps": (50, 40),
    "timestep_scaling": (10.0, 5.0),
    "sigma_data": (0.5, 1.0),
    "sigma_schedule": ("karras", "exponential"),
    "rho": (7.0, 5.0),
}
EDM_VALUES: Mapping[str, tuple[Any, ...]] = {"sigma_min": (0.002, 0.01), "sigma_max": (80.0, 120.0)}
LOOSE = 5e-2  # a schedule that ends in noise alone divides float32's roundings by an alpha of 2e-4


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # the Brownian tree's, which the tests replace
    yield
    logging.disable(logging.NOTSET)
    if not hasattr(sys.modules["torchsde"], "BrownianInterval"):
        del sys.modules["torchsde"]


def scheduler_classes() -> dict[str, Any]:
    """Return every scheduler class that diffusers has, by name."""
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    found: dict[str, Any] = {}
    for entry in pkgutil.iter_modules(diffusers.schedulers.__path__):
        module = importlib.import_module(f"diffusers.schedulers.{entry.name}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and name.endswith("Scheduler") and kind.__module__ == module.__name__:
                found[name] = kind
    return found


CLASSES = scheduler_classes()


def parameters(name: str) -> dict[str, Any]:
    signature = inspect.signature(CLASSES[name].__init__)
    return {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_key_of_a_constructor_stands_in_the_table_with_its_default(name: str) -> None:
    assert dict(SCHEDULERS[name].defaults) == parameters(name)
    assert set(parameters(name)) <= set(VALUES)


def test_a_class_that_is_not_in_the_table_is_refused_by_name() -> None:
    others = set(CLASSES) - set(SCHEDULERS)
    assert {"FlowMapEulerDiscreteScheduler", "IPNDMScheduler", "CMStochasticIterativeScheduler"} <= others
    for name in others:
        with pytest.raises(CheckpointError, match=name):
            training_schedule({"_class_name": name}, where="scheduler_config.json")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nulls_and_absent_keys_are_diffusers_defaults(name: str) -> None:
    absent = training_schedule({"_class_name": name, "skip_prk_steps": True}, where="x")
    nulls = {key: None for key, value in parameters(name).items() if not isinstance(value, bool)}
    assert training_schedule({"_class_name": name, "skip_prk_steps": True, **nulls}, where="x") == absent
    if "timestep_spacing" not in nulls:
        assert absent.timestep_spacing is None
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"):
        assert getattr(absent, key) == parameters(name).get(key, getattr(absent, key))


def configs(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return configs of a class: some keys absent, the others with any value that they may have."""
    known = {key: st.sampled_from((EDM_VALUES | VALUES)[key]) for key in parameters(name)}
    if "beta_schedule" in known:  # a cosine's sigmas reach 2e4, whose roundings some divide by the last ones
        known["beta_schedule"] = st.sampled_from(("scaled_linear", "linear"))
    if "sigma_data" in known:
        known |= {key: st.sampled_from(values) for key, values in EDM_VALUES.items()}
    return st.fixed_dictionaries({"_class_name": st.just(name)}, optional=known)


TOKENS = 1024  # a picture of 512 by 512 pixels


def moved_by_size(config: Mapping[str, Any]) -> dict[str, float]:
    """Return how far diffusers' pipelines for flows tell a scheduler to shift: the mu of a picture's size."""
    if not config.get("use_dynamic_shifting") or "base_shift" not in config:
        return {}
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return {"mu": calculate_shift(TOKENS, *(config[name] for name in names))}


def diffusers_walk(config: Mapping[str, Any], steps: int, **told: float) -> list[Array]:
    """Return the latents before the first step and after each, by the scheduler of a config."""
    # without clipping: what an absent key means there is said, not drawn, see the test of notes
    solver = CLASSES[config["_class_name"]].from_config({**config, "clip_sample": False})
    solver.set_timesteps(steps, **moved_by_size(solver.config), **told)
    if hasattr(solver, "set_begin_index"):
        solver.set_begin_index(0)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * getattr(solver, "init_noise_sigma", 1.0)
    if hasattr(solver, "sigmas"):
        solver.sigmas = solver.sigmas.double()  # its coefficients in full, as ours are
    if hasattr(solver, "noise_sampler"):
        solver.noise_sampler = BrownianSteps(generator)
    return [latents.numpy(), *follow(solver, latents.float(), {"generator": generator})]


def ties(config: Mapping[str, Any], plan: SamplingPlan, steps: int) -> bool:
    """Tell whether a timestep that diffusers cuts off lies so near a whole one that the last bit of a sigma decides."""
    if not (config.get("use_exponential_sigmas") or config.get("use_beta_sigmas")):
        return False
    solver = CLASSES[config["_class_name"]].from_config(dict(config))
    solver.set_timesteps(steps, **moved_by_size(solver.config))
    theirs = solver.timesteps.numpy()
    return len(theirs) == plan.stages and 0 < np.abs(theirs - plan.timesteps).max() <= 1


def agrees(config: Mapping[str, Any], steps: int) -> bool:
    """Tell whether a config was accepted; hold its plan against diffusers where it was."""
    try:
        schedule = training_schedule(config, where="x")
    except CheckpointError as error:
        assert "$." in str(error)
        assert "\n" not in str(error)
        return False
    try:
        theirs = diffusers_walk(config, steps)
    except (ValueError, NotImplementedError) as error:
        assert "prediction" in str(error).lower(), f"diffusers refuses {config}: {error}"
        return True
    if not all(np.isfinite(latents).all() for latents in theirs):
        return True
    try:
        plan = make_plan(None, schedule, steps=steps, tokens=TOKENS)
    except RequestError as error:
        raise AssertionError(f"diffusers walks {config}") from error
    if ties(config, plan, steps):
        return True
    hard = schedule.rescale_betas_zero_snr
    limit = max(TOLERANCES.get(str(schedule.sampler and schedule.sampler.name), TRAJECTORY), LOOSE if hard else 0)
    # latents of unit variance or of unit picture: a model that brings its own noise is the same in both
    sizes = plan.levels[:, 0] if schedule.edm else np.ones(plan.stages + 1)
    ours = [latents / size for latents, size in zip(replay(plan), sizes, strict=True)]
    assert difference(ours, theirs) < limit, f"{difference(ours, theirs):.1e} {config}"
    return True


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_config_walks_with_diffusers_or_is_refused(name: str) -> None:
    taken = []

    @settings(max_examples=6 if "KDPM2" in name else 25, derandomize=True, deadline=None)
    @given(configs(name), st.sampled_from((5, 11, 20)))
    def check(config: dict[str, Any], steps: int) -> None:
        taken.append(agrees(config, steps))

    check()
    assert sum(taken) >= 5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_value_alone_walks_with_diffusers_or_is_refused(name: str) -> None:
    start: dict[str, Any] = {"_class_name": name, "beta_start": 0.00085, "beta_end": 0.012}
    start |= {"beta_schedule": "scaled_linear", "clip_sample": False, "skip_prk_steps": True}
    for key in parameters(name):
        for value in (EDM_VALUES if "sigma_data" in parameters(name) else {}).get(key, VALUES[key]):
            agrees({**start, key: value}, 8 if "KDPM2" not in name else 4)


MOVED = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.parametrize("name", MOVED)
def test_a_pipeline_for_flows_tells_solvers_of_the_pictures_size(name: str) -> None:
    config = {"_class_name": name, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    config |= {"use_dynamic_shifting": True, "max_shift": 1.3}
    schedule = training_schedule(config, where="x", family="sd3")
    assert schedule.partial_step == "taken"
    theirs = diffusers_walk(config, 12, mu=calculate_shift(TOKENS, max_shift=1.3))
    assert difference(replay(make_plan(None, schedule, steps=12, tokens=TOKENS)), theirs) < TRAJECTORY


REFUSED: Mapping[str, dict[str, Any]] = {
    "thresholding": {"_class_name": "DPMSolverMultistepScheduler", "thresholding": True},
    "variance_type": {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
    "solver_order": {"_class_name": "UniPCMultistepScheduler", "solver_order": 4},
    "algorithm_type": {"_class_name": "SASolverScheduler", "algorithm_type": "noise_prediction"},
    "use_exponential_sigmas": {
        "_class_name": "EulerDiscreteScheduler",
        "use_karras_sigmas": True,
        "use_exponential_sigmas": True,
    },
    "use_flow_sigmas": {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
    "final_sigmas_type": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
    "use_dynamic_shifting": {"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True},
    "trained_betas": {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1, 0.2]},
    "beta_schedule": {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
    "sigma_min": {"_class_name": "EulerDiscreteScheduler", "sigma_min": "low"},
    "shift_terminal": {"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1},
    "max_image_seq_len": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "max_image_seq_len": 256,
    },
    "invert_sigmas": {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
    "scale_factors": {"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5, 1.0]},
    "prediction_type": {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon"},
    "use_beta_sigmas": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_karras_sigmas": True,
        "use_beta_sigmas": True,
    },
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_no_plan_can_do_is_refused_with_its_key(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"scheduler_config\.json: \$\.(sampler\.)?{key}"):
        training_schedule(REFUSED[key], where="scheduler_config.json")


# --- what diffusers' pipelines make of a config ---

PIPELINES: Mapping[str, Any] = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd1 inpainting": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}


@pytest.mark.parametrize("key", ["steps_offset", "clip_sample", "skip_prk_steps"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_corrects_what_it_corrects_in_diffusers(pipeline: str, scheduler: str, key: str) -> None:
    family: Any = pipeline.split()[0]
    for given_value in ({}, {key: parameters(scheduler).get(key)}):
        config = {"_class_name": scheduler, **{k: v for k, v in given_value.items() if v is not None}}
        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
        absent |= dict.fromkeys(
            ("safety_checker", "feature_extractor") if family == "sd1" else ("text_encoder_2", "tokenizer_2")
        )
        kept = {} if family == "sdxl" else {"requires_safety_checker": False}
        pipe = PIPELINES[pipeline](scheduler=CLASSES[scheduler].from_config(config), **absent, **kept)
        theirs = dict(pipe.scheduler.config)
        ours = training_schedule(config, where="x", family=family, repaints="inpainting" in pipeline)
        assert ours.sampler is not None
        found = {
            "steps_offset": ours.steps_offset,
            "clip_sample": ours.clip_sample,
            "skip_prk_steps": ours.sampler.name != "pndm",
        }
        if key in theirs:
            assert found[key] == bool(theirs[key])


@pytest.mark.parametrize(("family", "noted"), [("sd1", False), ("sdxl", True)])
def test_clipping_that_a_familys_pipeline_honours_is_said(family: Any, noted: bool) -> None:
    for config in ({"_class_name": "DDIMScheduler"}, {"_class_name": "LCMScheduler", "clip_sample": True}):
        assert (training_schedule(config, where="x", family=family).clip_note is not None) == noted
    assert training_schedule({"_class_name": "EulerDiscreteScheduler"}, where="x", family=family).clip_note is None


# --- pictures ---

DRAWN: Mapping[str, dict[str, Any]] = {
    "DPM++ 2M Karras": {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    "third order, Heun, no lower order at the end": {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_order": 3,
        "lower_order_final": False,
        "euler_at_final": True,
    },
    "SDE, Heun": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "heun",
    },
    "Lu's lambdas": {"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True},
    "noise prediction": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver",
        "final_sigmas_type": "sigma_min",
    },
    "PNDM with Runge-Kutta": {"_class_name": "PNDMScheduler", "skip_prk_steps": False},
    "DDPM, large variance": {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"},
    "UniPC, B1, third order": {
        "_class_name": "UniPCMultistepScheduler",
        "solver_type": "bh1",
        "solver_order": 3,
        "disable_corrector": [0, 1],
        "final_sigmas_type": "sigma_min",
    },
    "Euler, beta sigmas": {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True},
    "LMS, exponential": {"_class_name": "LMSDiscreteScheduler", "use_exponential_sigmas": True},
    "DDIM without an offset": {"_class_name": "DDIMScheduler", "steps_offset": 0, "set_alpha_to_one": True},
    "LCM on forty steps": {"_class_name": "LCMScheduler", "original_inference_steps": 40, "timestep_scaling": 5.0},
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def loaded() -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", DRAWN)
def test_no_sampler_means_the_checkpoints_own_with_all_its_options(
    name: str, demo_bundle: Path, loaded: Any, tmp_path: Path
) -> None:
    config = {**NOISE, **DRAWN[name]}
    checkpoint = shutil.copytree(DEMO, tmp_path / "checkpoint")
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    parts = {key: value for key, value in loaded.components.items() if key != "scheduler"}
    pipe = diffusers.StableDiffusionPipeline(
        scheduler=CLASSES[str(config["_class_name"])].from_config(config), requires_safety_checker=False, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        num_inference_steps=10,
        guidance_scale=3.0,
    ).images
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, msgspec.structs.replace(manifest, schedule=open_checkpoint(str(checkpoint)).schedule))
    with Pipeline.load(bundle, "cpu") as ours:
        found = ours(PROMPT, negative_prompt=NEGATIVE, seed=7, steps=10, guidance=3.0)
        again = ours(
            PROMPT, negative_prompt=NEGATIVE, seed=7, steps=10, guidance=3.0, sampler=found.settings[0].sampler
        )
    assert psnr(found.pixels[0], (expected[0] * 255).round().astype(np.uint8)) >= 50
    np.testing.assert_array_equal(again.pixels, found.pixels)


# --- models with EDM's preconditioning take any sampler that counts in sigma ---

COSXL = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_max": 120.0, "prediction_type": "v_prediction"}


VIDEO = {  # as Stable Video Diffusion's scheduler_config.json has it
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "trained_betas": None,
    "use_karras_sigmas": True,
}


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 25, 30])
def test_stable_video_diffusions_scheduler_walks_with_diffusers(steps: int) -> None:
    schedule = training_schedule(VIDEO, where="x")
    assert schedule.edm == EdmRange(sigma_min=0.002, sigma_max=700.0, sigma_data=1.0)
    plan, theirs = make_plan(None, schedule, steps=steps), diffusers_walk(VIDEO, steps)
    assert plan.timesteps[0] == pytest.approx(math.log(700) / 4)
    assert plan.initial_scale == pytest.approx(math.hypot(700, 1))
    # one or two steps from 700 to 0.002 leave of float32 latents of size 700 their roundings
    assert difference(replay(plan), theirs) < (TRAJECTORY if steps > 2 else 1e-3)


def test_a_video_model_takes_samplers_that_count_in_sigma_and_no_others() -> None:
    schedule = training_schedule(VIDEO, where="x")
    assert difference_to(np.float32(0.5) * np.ones(SHAPE, np.float32), make_plan("dpmpp_2m", schedule, steps=25)) < 0.02
    with pytest.raises(RequestError, check=about("sampler")):
        make_plan("ddim", schedule, steps=25)


ANIMATED = {  # as AnimateDiff's pipelines are told to have it, for motion adapters of SD 1.5
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "linspace",
}


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 20, 25, 50])
def test_animatediffs_linear_betas_walk_with_diffusers(steps: int, spacing: str) -> None:
    config = {**ANIMATED, "timestep_spacing": spacing}
    schedule = training_schedule(config, where="x", family="sd1")
    assert schedule.beta_schedule == "linear"
    assert difference(replay(make_plan(None, schedule, steps=steps)), diffusers_walk(config, steps)) < TRAJECTORY


# noise that is extrapolated over steps as wide as these, with fresh noise on top, runs away
WIDE = ("dpm_2m_sde",)
COUNTS_IN_SIGMA = [name for name, line in SAMPLERS.items() if line.measured and "epsilon" in line.predictions]


@pytest.mark.parametrize("name", [name for name in COUNTS_IN_SIGMA if name not in WIDE])
def test_a_model_that_brings_its_own_noise_takes_every_sampler_that_counts_in_sigma(name: str) -> None:
    schedule = training_schedule(COSXL, where="x")
    plan = make_plan(name, schedule, steps=12)
    np.testing.assert_allclose(plan.levels[-1], [1, 0], atol=0.01)
    assert plan.timesteps[0] == pytest.approx(math.log(120) / 4, rel=1e-4)
    # the model that knows the picture leads every sampler to it
    picture = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    assert difference_to(picture, plan) < 0.02


def difference_to(picture: Array, plan: SamplingPlan) -> float:
    """Return how far a plan ends from a picture when the model always predicts that one, as v of sigma_data 1."""
    rng = np.random.default_rng(0)
    state = np.zeros((plan.rows, *SHAPE), dtype=np.float32)
    state[0] = plan.initial_scale * rng.standard_normal(SHAPE)
    for k in range(plan.stages):
        seen = np.tensordot(plan.input_rows[k], state, axes=1)
        sigma = math.exp(4 * float(plan.timesteps[k]))
        size = math.hypot(sigma, 1.0)
        output = (seen / size - picture) * size / sigma
        noise = rng.standard_normal(SHAPE)
        state = np.tensordot(plan.transitions[k], np.stack([*state, output, noise]), axes=1).astype(np.float32)
    return float(np.abs(state[0] - picture).max())


@pytest.mark.parametrize(
    "options", [{"sampler": "ddim"}, {"spacing": "ays"}, {"spacing": "leading"}, {"timesteps": [9.0]}]
)
def test_what_counts_training_timesteps_is_refused_where_there_are_none(options: dict[str, Any]) -> None:
    schedule = training_schedule(COSXL, where="x")
    with pytest.raises(RequestError):
        make_plan(options.pop("sampler", None), schedule, steps=None if "timesteps" in options else 5, **options)
