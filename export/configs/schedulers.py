"""The scheduler classes of diffusers, and what each key of their configs is here.

Every key that a supported class knows stands in the table: as a fact of the training, as an option of the sampler, as
known to be without effect, or as refused. tests/test_schedule.py walks the classes' constructors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latentrt.engines.bundle.parsing import ParseError

Values = Mapping[str, Any]
Reading = Callable[[Any], Values]
"""The value of a key -> the fields of OwnSampler that it sets. Raises ParseError if no plan can do that."""

NONLINEAR = (
    "it clips what the model predicts, which no plan of linear steps can do; set it to false to export without it"
)
NOT_IN_CONFIGS = "it cannot be told in a config"
INVERTED = "it counts the noise backwards, which a denoiser must be trained for; no model that can be exported is"
PYRAMID = "it enlarges the latents between steps, which no plan can do"
DYNAMIC = "it moves the steps by the size of the picture, which diffusers' Stable Diffusion pipelines do not do either"
LEARNED = "the denoiser would have to predict the noise's variance too, which Stable Diffusion's do not"


def idle(_: Any) -> Values:
    return {}


def _option(name: str) -> Reading:
    return lambda value: {name: value}


def _truth(name: str) -> Reading:
    return lambda value: {name: bool(value)}


def _flag(name: str, value: Any = True) -> Reading:
    return lambda on: {name: value} if on else {}


def _choice(table: Mapping[Any, Values | None], reason: str = "") -> Reading:
    """Return what reads one of several values; None in the table stands for what is refused for the reason."""

    def read(value: Any) -> Values:
        found = table.get(value) if isinstance(value, str | int | type(None)) else None
        if found is None:
            expected = " or ".join(str(known).lower() for known, meaning in table.items() if meaning is not None)
            raise ParseError(f"found {value!r}, expected {expected}" + (f": {reason}" if reason else ""))
        return found

    return read


_OFF: Mapping[Any, Values | None] = {False: {}, True: None}
_ORDERS: Reading = _choice({order: {"order": order} for order in (1, 2, 3)})
TRAINED: Values = {  # facts of the training, of which every sampler is told
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_NARROW: Values = {"beta_start": 0.00085, "beta_end": 0.012}
_SPACED: Values = {"timestep_spacing": "linspace", "steps_offset": 0}
_THRESHOLD: Values = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP: Values = {"clip_sample": True, "clip_sample_range": 1.0}
SIGMAS: Values = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW: Values = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFTING: Values = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_MATCHING: Values = {"num_train_timesteps": 1000, "shift": 1.0}
SIZED: Values = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_MATCHED: Values = {
    **_MATCHING,
    **_SHIFTING,
    **SIGMAS,
    **SIZED,
    "invert_sigmas": False,
    "shift_terminal": None,
}
_ORDERED: Values = {"solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
_SOLVER: Values = {**TRAINED, **_THRESHOLD, **SIGMAS, **_FLOW, **_ORDERED}
_NOISIEST: Values = {"lambda_min_clipped": -math.inf, "variance_type": None}
_DPM: Values = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
_DENOISING: Values = {**TRAINED, **_CLIP, **_THRESHOLD, **_SPACED, "timestep_spacing": "leading"}
_DDIM: Values = {**_DENOISING, "set_alpha_to_one": True, "rescale_betas_zero_snr": False}
_DDPM: Values = {**_DENOISING, "variance_type": "fixed_small", "rescale_betas_zero_snr": False}
_CONSISTENCY: Values = {
    **_DDIM,
    **_NARROW,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_SECOND: Values = {**TRAINED, **_NARROW, **SIGMAS, **_SPACED}
_EDM: Values = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}

KEYS: Mapping[str, Reading] = {  # unless a class means another thing by it
    **dict.fromkeys((*TRAINED, *_SPACED, "set_alpha_to_one", "rescale_betas_zero_snr", "clip_sample"), idle),
    **dict.fromkeys(("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"), idle),
    **dict.fromkeys(("time_shift_type", "sigma_data", "upscale_mode"), idle),
    **dict.fromkeys(
        ("shift", "shift_terminal", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"), idle
    ),
    "thresholding": _choice(_OFF, NONLINEAR),
    "use_karras_sigmas": _flag("spacing", "karras"),
    "use_exponential_sigmas": _flag("spacing", "exponential"),
    "use_beta_sigmas": _flag("spacing", "beta"),
    "use_lu_lambdas": _flag("spacing", "lu"),
    "use_flow_sigmas": idle,
    "flow_shift": idle,
    "invert_sigmas": _choice(_OFF, INVERTED),
    "stochastic_sampling": _flag("name", "flow_lcm"),
    "scale_factors": _choice({None: {}}, PYRAMID),
    "use_dynamic_shifting": _choice(_OFF, DYNAMIC),
    "solver_order": _ORDERS,
    "solver_type": _choice({"midpoint": {}, "heun": {"solver_type": "heun"}, "logrho": {}, "bh1": {}, "bh2": {}}),
    "lower_order_final": _truth("lower_order_final"),
    "euler_at_final": _flag("euler_at_final"),
    "final_sigmas_type": _choice({"zero": {}, "sigma_min": {"end": "lowest"}}),
    "lambda_min_clipped": lambda value: {} if value == -math.inf else {"lambda_min": value},
    "variance_type": _choice({None: {}, "learned": None, "learned_range": None}, LEARNED),
    "sigma_min": _option("sigma_min"),
    "sigma_max": _option("sigma_max"),
    "interpolation_type": _choice({"linear": {}, "log_linear": {"interpolation": "log_linear"}}),
    "timestep_type": _choice({"discrete": {}, "continuous": {"timestep_type": "continuous"}}),
    "skip_prk_steps": lambda value: {"name": "plms" if value else "pndm"},
    "original_inference_steps": _option("original_inference_steps"),
    "timestep_scaling": _option("timestep_scaling"),
    "predict_x0": lambda value: {} if value else {"predicts_noise": True},
    "disable_corrector": lambda value: {"disable_corrector": list(value)} if value else {},
    "solver_p": _choice({None: {}}, NOT_IN_CONFIGS),
    "predictor_order": _choice({2: {}}),
    "corrector_order": _choice({2: {}}),
    "tau_func": _choice({None: {}}, NOT_IN_CONFIGS),
    "noise_sampler_seed": _choice({None: {}}, "the noise comes from the seed of each picture"),
    "sigma_schedule": _choice({"karras": {}, "exponential": {"spacing": "exponential"}}),
    "rho": _option("rho"),
}


_DEVIATIONS = _choice(
    {
        "fixed_small": {},
        "fixed_small_log": {},
        "fixed_large": {"variance": "fixed_large"},
        None: {},
        "fixed_large_log": None,
        "learned": None,
        "learned_range": None,
    },
    LEARNED,
)
SHIFTED: Mapping[str, Reading] = {"use_dynamic_shifting": idle}  # these move as a pipeline says: see FlowShift
_OF_FLOW: Values = {"prediction_type": "flow_prediction"}
_EDM_KEYS: Mapping[str, Reading] = {"sigma_min": idle, "sigma_max": idle}  # facts of the training, see EdmRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """A scheduler class of diffusers.

    sampler: its name here, if the config says nothing else
    defaults: what the class assumes for an absent key: all that its constructor knows
    keys: those that it reads in its own way
    facts: of the training, which it takes for granted
    plain: what the sampler does anyway, where that is not `PLAIN`
    """

    sampler: str
    defaults: Values
    keys: Mapping[str, Reading] = field(default_factory=dict)
    facts: Values = field(default_factory=dict)
    plain: Values = field(default_factory=dict)


PLAIN: Values = {
    "order": 2,
    "lower_order_final": True,
    "rho": 7.0,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
THIRD_ORDER: Mapping[str, str] = {  # samplers that have a name of their own at order 3
    "dpmpp_2m": "dpmpp_3m",
    "dpmpp_2m_sde": "dpmpp_3m_sde",
    "dpmpp_2s": "dpmpp_3s",
    "dpm_2m": "dpm_3m",
    "unipc": "unipc_3",
    "deis": "deis_3",
}


def _algorithm(known: Mapping[str, str]) -> dict[str, Reading]:
    return {"algorithm_type": _choice({name: {"name": sampler} for name, sampler in known.items()})}


_SDE = {"dpmsolver++": "dpmpp_2m", "deis": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}
SCHEDULERS: Mapping[str, Scheduler] = {
    "DDIMScheduler": Scheduler(sampler="ddim", defaults=_DDIM),
    "DDIMParallelScheduler": Scheduler(sampler="ddim", defaults=_DDIM),
    "DDPMScheduler": Scheduler(sampler="ddpm", defaults=_DDPM, keys={"variance_type": _DEVIATIONS}),
    "DDPMParallelScheduler": Scheduler(sampler="ddpm", defaults=_DDPM, keys={"variance_type": _DEVIATIONS}),
    "PNDMScheduler": Scheduler(
        sampler="pndm",
        defaults={
            **TRAINED,
            **_SPACED,
            "timestep_spacing": "leading",
            "skip_prk_steps": False,
            "set_alpha_to_one": False,
        },
    ),
    "LMSDiscreteScheduler": Scheduler(sampler="lms", defaults={**TRAINED, **SIGMAS, **_SPACED}),
    "EulerDiscreteScheduler": Scheduler(
        sampler="euler",
        defaults={
            **TRAINED,
            **SIGMAS,
            **_SPACED,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(
        sampler="euler_ancestral", defaults={**TRAINED, **_SPACED, "rescale_betas_zero_snr": False}
    ),
    "HeunDiscreteScheduler": Scheduler(
        sampler="heun", defaults={**_SECOND, "clip_sample": False, "clip_sample_range": 1.0}
    ),
    "KDPM2DiscreteScheduler": Scheduler(sampler="kdpm2", defaults=_SECOND),
    "KDPM2AncestralDiscreteScheduler": Scheduler(sampler="kdpm2_ancestral", defaults=_SECOND),
    "DPMSolverSDEScheduler": Scheduler(sampler="dpmpp_sde", defaults={**_SECOND, "noise_sampler_seed": None}),
    "DPMSolverMultistepScheduler": Scheduler(
        sampler="dpmpp_2m",
        defaults={
            **_SOLVER,
            **_SPACED,
            **_SHIFTING,
            **_NOISIEST,
            **_DPM,
            "euler_at_final": False,
            "use_lu_lambdas": False,
            "rescale_betas_zero_snr": False,
        },
        keys={**_algorithm({**_SDE, "dpmsolver": "dpm_2m", "sde-dpmsolver": "dpm_2m_sde"}), **SHIFTED},
    ),
    "DPMSolverSinglestepScheduler": Scheduler(
        sampler="dpmpp_2s",
        defaults={**_SOLVER, **_SHIFTING, **_NOISIEST, **_DPM, "lower_order_final": False},
        keys={
            **_algorithm(
                {
                    "dpmsolver++": "dpmpp_2s",
                    "deis": "dpmpp_2s",
                    "dpmsolver": "dpm_2s",
                    "sde-dpmsolver++": "dpmpp_2s_sde",
                }
            ),
            **SHIFTED,
        },
        plain={"lower_order_final": False},
    ),
    "DEISMultistepScheduler": Scheduler(
        sampler="deis",
        defaults={**_SOLVER, **_SPACED, **_SHIFTING, "algorithm_type": "deis", "solver_type": "logrho"},
        keys={
            **_algorithm(dict.fromkeys(("deis", "dpmsolver", "dpmsolver++"), "deis")),
            "solver_type": _choice({key: {} for key in ("logrho", "midpoint", "heun", "bh1", "bh2")}),
            **SHIFTED,
        },
    ),
    "UniPCMultistepScheduler": Scheduler(
        sampler="unipc",
        defaults={
            **_SOLVER,
            **_SPACED,
            **_SHIFTING,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "rescale_betas_zero_snr": False,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
        keys={
            "solver_type": _choice(
                {"bh2": {}, "bh1": {"solver_type": "bh1"}, "midpoint": {}, "heun": {}, "logrho": {}}
            ),
            "final_sigmas_type": _choice({"zero": {}, "sigma_min": {"end": "repeat"}}),
        },
    ),
    "SASolverScheduler": Scheduler(
        sampler="sa_solver",
        defaults={
            **TRAINED,
            **_THRESHOLD,
            **SIGMAS,
            **_FLOW,
            **_NOISIEST,
            **_SPACED,
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
        },
        keys=_algorithm({"data_prediction": "sa_solver"}),
    ),
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        sampler="euler", defaults={**_MATCHED, "stochastic_sampling": False}, keys=SHIFTED, facts=_OF_FLOW
    ),
    "FlowMatchHeunDiscreteScheduler": Scheduler(sampler="heun", defaults=_MATCHING, facts=_OF_FLOW),
    "FlowMatchLCMScheduler": Scheduler(
        sampler="flow_lcm",
        defaults={**_MATCHED, "scale_factors": None, "upscale_mode": "bicubic"},
        keys=SHIFTED,
        facts=_OF_FLOW,
    ),
    "LCMScheduler": Scheduler(sampler="lcm", defaults=_CONSISTENCY),
    "TCDScheduler": Scheduler(sampler="tcd", defaults=_CONSISTENCY, keys={"timestep_scaling": idle}),
    "EDMEulerScheduler": Scheduler(sampler="euler", defaults=_EDM, keys=_EDM_KEYS),
    "EDMDPMSolverMultistepScheduler": Scheduler(
        sampler="dpmpp_2m",
        defaults={**_EDM, **_ORDERED, **_THRESHOLD, **_DPM, "euler_at_final": False},
        keys={**_EDM_KEYS, **_algorithm(_SDE)},
    ),
}
