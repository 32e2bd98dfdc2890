"""diffusers' own schedulers, stepped as its pipelines step them: the oracle of the sampler tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import SchedulerMixin

from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.spec import Array
from latentrt.runtime.sampling import schedule as schedules
from latentrt.runtime.sampling.noise import TorchCpuNoise
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.loop import denoise

SHAPE = (1, 4, 4, 4)

STABLE_DIFFUSION = msgspec.structs.replace(schedules.STABLE_DIFFUSION, timestep_spacing="leading")


def network(latents: Array, timesteps: Array) -> Array:
    """Stand in for a UNet: nonlinear, of the latents and the timestep, float32."""
    phase = timesteps.reshape(-1, 1, 1, 1) * np.float32(0.01)
    return np.float32(0.8) * np.sin(latents + phase) + np.float32(0.2) * np.tanh(np.roll(latents, 1, axis=-1))


def scheduler_of(kind: type[SchedulerMixin], schedule: TrainingSchedule, **config: Any) -> Any:
    """Return diffusers' scheduler with the configuration that a checkpoint with this schedule has."""
    source = msgspec.to_builtins(schedule) | {"clip_sample": False, "skip_prk_steps": True} | config
    for ours in ("scheduler", "sampler", "edm", "flow"):
        source.pop(ours)
    if schedule.timestep_spacing is None:
        source.pop("timestep_spacing")  # as the config has it: each class then takes its own default
    return kind.from_config(source)


def reference(
    kind: type[SchedulerMixin],
    schedule: TrainingSchedule,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    step: dict[str, Any] | None = None,
    double: bool = False,
    **config: Any,
) -> list[Array]:
    """Return the latents before the first step and after each of them.

    double: keep the scheduler's sigmas, and so its coefficients, in double precision
    """
    solver = scheduler_of(kind, schedule, **config)
    solver.set_timesteps(steps)
    if hasattr(solver, "set_begin_index"):
        solver.set_begin_index(0)  # else it starts at the second of two equal timesteps and runs off its table
    generator = generator or torch.Generator("cpu").manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * solver.init_noise_sigma
    if double:
        solver.sigmas = solver.sigmas.double()
    options = {"generator": generator, **(step or {})}
    return [latents.numpy(), *follow(solver, latents, options)]


def follow(
    solver: Any, latents: torch.Tensor, options: dict[str, Any], timesteps: torch.Tensor | None = None
) -> list[Array]:
    """Return the latents after each step of a scheduler whose timesteps are set, or after the last few of them."""
    path = []
    for t in solver.timesteps if timesteps is None else timesteps:
        seen = solver.scale_model_input(latents, t) if hasattr(solver, "scale_model_input") else latents
        output = torch.from_numpy(network(seen.float().numpy(), np.array([float(t)], dtype=np.float32)))
        accepted = _accepted(solver.step, options)
        latents = solver.step(output, t, latents, **accepted).prev_sample
        path.append(latents.float().numpy())
    return path


def _accepted(call: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    names = call.__code__.co_varnames[: call.__code__.co_argcount]  # type: ignore[attr-defined]
    return {name: value for name, value in options.items() if name in names}


def replay(plan: SamplingPlan, *, generator: TorchCpuNoise | None = None) -> list[Array]:
    """Return the same from a plan."""
    generator = generator or TorchCpuNoise(0)
    noise = generator.normal(SHAPE)
    path = denoise(plan, noise, network, lambda: generator.normal(SHAPE))
    return [plan.initial_scale * noise, *path]


def difference(ours: list[Array], theirs: list[Array]) -> float:
    """Return the largest difference over the trajectory, relative to the largest latent of its step."""
    assert len(ours) == len(theirs), f"{len(ours) - 1} stages against {len(theirs) - 1} steps"
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in pairs)
