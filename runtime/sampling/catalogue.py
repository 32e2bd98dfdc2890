"""The samplers: for each its equations, how it places its steps, and its names."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import msgspec

from latentrt.engines.bundle.training import OwnSampler, TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.runtime.sampling.flows import ALMOST, FLOW, even, full, matched
from latentrt.runtime.sampling.plan import Stage
from latentrt.runtime.sampling.schedule import ve_level
from latentrt.runtime.sampling.sigmas import discretize_sigmas
from latentrt.runtime.sampling.solvers.dpm import multistep, singlestep
from latentrt.runtime.sampling.solvers.multistep import deis, sa_solver, unipc
from latentrt.runtime.sampling.solvers.sigma import (
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    flow_lcm,
    heun,
    kdpm2,
    kdpm2_ancestral,
    lms,
)
from latentrt.runtime.sampling.solvers.timestep import ddim, ddpm, lcm, plms, pndm, tcd
from latentrt.runtime.sampling.spacings import SPACINGS
from latentrt.runtime.sampling.timesteps import (
    Convention,
    Discretization,
    RequestedSteps,
    discretize_distilled,
    discretize_posterior,
    discretize_strided,
)

DIFFUSION = ("epsilon", "v_prediction", "sample")
ANY = (*DIFFUSION, FLOW)
# tests/test_parity.py::test_samplers_that_diffusers_clips_are_its_own_without_clipping has the figures
UNCLIPPED = (
    "clips nothing; diffusers' class cuts the predicted latents to -1..1 unless the scheduler's config says "
    '"clip_sample": false, which PNDM\'s may leave out: pass clip_sample=False to its from_config to compare'
)

Equations = Callable[..., Iterator[Stage]]
PLAIN = Convention()


class Sampler(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table.

    spaced: whether it takes a spacing of sigmas such as karras
    measured: whether it takes sigmas from the caller
    timed: whether it takes timesteps from the caller
    eta: the default share of fresh noise, None if that is not an option
    note: what to know when comparing its pictures
    aliases: other names, of the community's interfaces and diffusers' classes; case and punctuation do not matter
    """

    title: str
    equations: Equations
    discretize: Callable[[TrainingSchedule, RequestedSteps, Convention], Discretization] = discretize_sigmas
    convention: Convention = PLAIN
    aliases: tuple[str, ...] = ()
    spaced: bool = True
    measured: bool = True
    timed: bool = True
    eta: float | None = None
    note: str = ""
    predictions: tuple[str, ...] = DIFFUSION

    def tuned(self, options: Mapping[str, object]) -> Sampler:
        """Return the sampler with what a checkpoint's own scheduler sets, by the names of `OwnSampler`.

        Raises RequestError if it does not know one of them.
        """
        convention = {name: value for name, value in options.items() if name in CONVENTIONS}
        rest = {name: value for name, value in options.items() if name not in CONVENTIONS}
        if unknown := [name for name in rest if name not in inspect.signature(self.equations).parameters]:
            raise RequestError(
                f"sampler: the checkpoint's own sets {unknown[0]}, which {self.title} does not have; choose a sampler"
            )
        tuned = msgspec.structs.replace(self.convention, **convention)
        return msgspec.structs.replace(self, convention=tuned, equations=partial(self.equations, **rest))


CONVENTIONS = frozenset(Convention.__struct_fields__)
SIGMA = Convention(level=ve_level, extra=False, whole=False, flow=matched)
_KDPM = Convention(level=ve_level, extra=False, whole=False, rounds_karras=True, flow=matched)
_DPM = Convention(truncates_cosine=True, flow=even, most=1 - ALMOST)
_DPM_NOISE = Convention(
    truncates_cosine=True, end="lowest", flow=even, most=1 - ALMOST
)  # noise prediction is undefined at zero noise
_SINGLE = Convention(fixed_spacing="linspace", flow=even, most=1 - ALMOST)
_SINGLE_NOISE = Convention(fixed_spacing="linspace", end="lowest")
_UNIPC = Convention(flow=full, most=1 - ALMOST)
_EXPONENTIAL = Convention(end="repeat", flow=even, most=1 - ALMOST)

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(
        title="DDIM",
        discretize=discretize_strided,
        equations=ddim,
        aliases=("DDIMScheduler", "DDIMParallelScheduler"),
        spaced=False,
        measured=False,
        eta=0.0,
        note=UNCLIPPED,
    ),
    "ddpm": Sampler(
        title="DDPM",
        discretize=discretize_posterior,
        equations=ddpm,
        aliases=("DDPMScheduler", "DDPMParallelScheduler"),
        spaced=False,
        measured=False,
        note=UNCLIPPED,
    ),
    "plms": Sampler(
        title="PLMS",
        discretize=discretize_strided,
        equations=plms,
        aliases=("PNDMScheduler",),
        spaced=False,
        measured=False,
        timed=False,
    ),
    "pndm": Sampler(
        title="PNDM", discretize=discretize_strided, equations=pndm, spaced=False, measured=False, timed=False
    ),
    "lms": Sampler(
        title="LMS", convention=SIGMA, predictions=ANY, equations=lms, aliases=("k_lms", "LMSDiscreteScheduler")
    ),
    "euler": Sampler(
        title="Euler",
        convention=SIGMA,
        predictions=ANY,
        equations=euler,
        aliases=(
            "k_euler",
            "EulerDiscreteScheduler",
            "edm_euler",
            "EDMEulerScheduler",
            "flow_euler",
            "FlowMatchEulerDiscreteScheduler",
        ),
    ),
    "euler_ancestral": Sampler(
        title="Euler a",
        convention=SIGMA,
        predictions=ANY,
        equations=euler_ancestral,
        aliases=(
            "euler_a",
            "k_euler_a",
            "k_euler_ancestral",
            "EulerAncestralDiscreteScheduler",
            "LTXEulerAncestralRFScheduler",
        ),
    ),
    "heun": Sampler(
        title="Heun",
        convention=SIGMA,
        predictions=ANY,
        equations=heun,
        aliases=("k_heun", "HeunDiscreteScheduler", "flow_heun", "FlowMatchHeunDiscreteScheduler"),
    ),
    "kdpm2": Sampler(
        title="DPM2",
        convention=_KDPM,
        predictions=ANY,
        equations=kdpm2,
        aliases=("dpm2", "dpm_2", "k_dpm_2", "KDPM2DiscreteScheduler"),
    ),
    "kdpm2_ancestral": Sampler(
        title="DPM2 a",
        convention=_KDPM,
        predictions=ANY,
        equations=kdpm2_ancestral,
        aliases=("dpm2_a", "dpm_2_ancestral", "k_dpm_2_a", "KDPM2AncestralDiscreteScheduler"),
    ),
    "dpmpp_2m": Sampler(
        title="DPM++ 2M",
        convention=_DPM,
        predictions=ANY,
        equations=partial(multistep, kind="dpmpp", order=2),
        aliases=("k_dpmpp_2m", "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    ),
    "dpmpp_2m_sde": Sampler(
        title="DPM++ 2M SDE",
        convention=_DPM,
        predictions=ANY,
        equations=partial(multistep, kind="sde-dpmpp", order=2),
    ),
    "dpmpp_3m": Sampler(
        title="DPM++ 3M", convention=_DPM, predictions=ANY, equations=partial(multistep, kind="dpmpp", order=3)
    ),
    "dpmpp_3m_sde": Sampler(
        title="DPM++ 3M SDE",
        convention=_DPM,
        predictions=ANY,
        equations=partial(multistep, kind="sde-dpmpp", order=3),
    ),
    "dpmpp_2s": Sampler(
        title="DPM++ 2S",
        convention=_SINGLE,
        predictions=ANY,
        equations=partial(singlestep, kind="dpmpp", order=2),
        aliases=("DPMSolverSinglestepScheduler",),
    ),
    "dpmpp_2s_sde": Sampler(
        title="DPM++ 2S SDE",
        convention=_SINGLE,
        predictions=ANY,
        equations=partial(singlestep, kind="sde-dpmpp", order=2),
    ),
    "dpmpp_2s_ancestral": Sampler(
        title="DPM++ 2S a",
        convention=SIGMA,
        predictions=ANY,
        equations=dpmpp_2s_ancestral,
        aliases=("dpmpp_2s_a", "k_dpmpp_2s_a"),
    ),
    "dpmpp_3s": Sampler(
        title="DPM++ 3S",
        convention=_SINGLE,
        predictions=ANY,
        equations=partial(singlestep, kind="dpmpp", order=3),
    ),
    "dpmpp_sde": Sampler(
        title="DPM++ SDE",
        note="diffusers takes its noise from another generator (torchsde's): as good a picture, and another one",
        convention=SIGMA,
        predictions=ANY,
        equations=dpmpp_sde,
        aliases=("k_dpmpp_sde", "DPMSolverSDEScheduler"),
    ),
    "dpm_2s": Sampler(
        title="DPM-Solver 2S",
        convention=_SINGLE_NOISE,
        equations=partial(singlestep, kind="dpm", order=2),
    ),
    "dpm_2m": Sampler(
        title="DPM-Solver 2M",
        convention=_DPM_NOISE,
        predictions=ANY,
        equations=partial(multistep, kind="dpm", order=2),
    ),
    # of a flow, what extrapolates the noise from noise alone, where a step has no picture yet, runs away
    "dpm_2m_sde": Sampler(
        title="DPM-Solver 2M SDE", convention=_DPM_NOISE, equations=partial(multistep, kind="sde-dpm", order=2)
    ),
    "dpm_3m": Sampler(
        title="DPM-Solver 3M",
        convention=_DPM_NOISE,
        predictions=ANY,
        equations=partial(multistep, kind="dpm", order=3),
    ),
    "unipc": Sampler(
        title="UniPC",
        convention=_UNIPC,
        predictions=ANY,
        equations=partial(unipc, order=2),
        aliases=("uni_pc_bh2", "UniPCMultistepScheduler"),
    ),
    "unipc_3": Sampler(title="UniPC, order 3", convention=_UNIPC, predictions=ANY, equations=partial(unipc, order=3)),
    "deis": Sampler(
        title="DEIS",
        convention=_EXPONENTIAL,
        predictions=ANY,
        equations=partial(deis, order=2),
        aliases=("deis_2", "DEISMultistepScheduler"),
    ),
    "deis_3": Sampler(
        title="DEIS, order 3", convention=_EXPONENTIAL, predictions=ANY, equations=partial(deis, order=3)
    ),
    "sa_solver": Sampler(
        title="SA-Solver",
        convention=_EXPONENTIAL,
        predictions=ANY,
        equations=sa_solver,
        aliases=("SASolverScheduler",),
    ),
    "lcm": Sampler(
        title="LCM",
        discretize=partial(discretize_distilled, last=None),
        equations=lcm,
        aliases=("LCMScheduler",),
        spaced=False,
        measured=False,
    ),
    "tcd": Sampler(
        title="TCD",
        discretize=partial(discretize_distilled, last=0),
        equations=tcd,
        aliases=("TCDScheduler",),
        spaced=False,
        measured=False,
        eta=0.3,
    ),
    "flow_lcm": Sampler(
        title="Flow LCM",
        convention=SIGMA,
        predictions=(FLOW,),
        equations=flow_lcm,
        aliases=("FlowMatchLCMScheduler",),
    ),
}


OWN = "own"  # the checkpoint's own scheduler, with what its config sets


class Name(NamedTuple):
    """A sampler's line in the table, and the spacing of sigmas that its name asks for.

    own: whether a checkpoint's config sets more than a name can say, as in `own:dpmpp_2m_karras`
    """

    sampler: str
    spacing: str | None
    own: bool = False

    def __str__(self) -> str:
        plain = self.sampler if self.spacing is None else f"{self.sampler}_{self.spacing}"
        return f"{OWN}:{plain}" if self.own else plain


def sampler_names(prediction: str | None = None) -> tuple[str, ...]:
    """Return the canonical names, sorted: every sampler, and its Karras form where it has one.

    The other spacings make names in the same way: `dpmpp_2m_exponential`, `euler_ays`.

    prediction: only those that draw with a model that predicts this
    """
    known = {name: one for name, one in SAMPLERS.items() if prediction is None or prediction in one.predictions}
    return tuple(sorted([*known, *(f"{name}_karras" for name, sampler in known.items() if sampler.spaced)]))


def find(name: str) -> Name:
    """Return what a name means: `dpmpp_2m_karras`, `DPM++ 2M Karras`, `k_dpmpp_2m`, `EulerDiscreteScheduler`.

    Raises RequestError with the nearest name when there is none such.
    """
    squashed = _squash(name)
    known = _known()
    if squashed in known:
        return known[squashed]
    import difflib  # for a wrong name

    nearest = difflib.get_close_matches(squashed, known, n=1, cutoff=0.5)
    hint = f"did you mean '{known[nearest[0]]}'?" if nearest else "expected one of " + ", ".join(sampler_names())
    raise RequestError(f"sampler: unknown sampler '{name}'; {hint}")


def choose_sampler(name: str | None, schedule: TrainingSchedule) -> OwnSampler:
    """Return what a name means for a checkpoint: its own scheduler for None, `own` and `own:…`, else a plain sampler.

    Raises RequestError if there is no such sampler, or where the checkpoint's own is another one.
    """
    if name is None or name == OWN:
        return own_sampler(schedule)
    if not name.startswith(f"{OWN}:"):
        plain = find(name)
        return OwnSampler(name=plain.sampler, spacing=plain.spacing)
    wanted, own = find(name.removeprefix(f"{OWN}:")), own_sampler(schedule)
    if wanted != Name(own.name, own.spacing):
        raise RequestError(f"sampler: found '{name}', and this checkpoint's own is '{Name(own.name, own.spacing)}'")
    return own


def own_sampler(schedule: TrainingSchedule) -> OwnSampler:
    """Return the checkpoint's own scheduler. Raises RequestError when it is not known."""
    if schedule.sampler is not None:
        return schedule.sampler
    name = find(schedule.scheduler)  # a bundle of an older version, which kept the class alone
    return OwnSampler(name=name.sampler, spacing=name.spacing)


@functools.cache
def _known() -> dict[str, Name]:
    plain = {_squash(n): key for key, s in SAMPLERS.items() for n in (key, s.title, *s.aliases)}
    names = {n: Name(key, None) for n, key in plain.items()}
    for spacing in SPACINGS:
        names |= {n + _squash(spacing): Name(key, spacing) for n, key in plain.items() if SAMPLERS[key].spaced}
    return names


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))
