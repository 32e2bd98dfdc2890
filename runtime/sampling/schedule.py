"""The noise a checkpoint was trained with, and the ways to space timesteps and noise levels along it.

Two dtypes appear on purpose. The training tables are float32, because the checkpoints' own tables are, and a
rounded timestep must not depend on the difference. Everything after them is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.spec import Array

# The training schedule of the published SD 1.x checkpoints, as their scheduler's config gives it.
STABLE_DIFFUSION = TrainingSchedule(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    timestep_spacing=None,
    steps_offset=1,
    set_alpha_to_one=False,
)
FLOOR = np.float32(2**-24)  # alphas_cumprod at the end of a zero-terminal-SNR schedule, where it is divided by


class Level(NamedTuple):
    """One noise level: latents are `alpha * picture + sigma * noise`."""

    alpha: float
    sigma: float

    @property
    def size(self) -> float:
        """Return the latents' standard deviation when picture and noise have one each."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def half_log_snr(self) -> float:
        """Return lambda = log(alpha / sigma): infinite where there is no noise."""
        return math.inf if self.sigma == 0 else math.log(self.alpha) - math.log(self.sigma)


CLEAN = Level(1.0, 0.0)


class Interval(NamedTuple):
    """One interval of a discretization: the model runs at `timestep` and level `here`; the step ends at `there`."""

    timestep: float
    here: Level
    there: Level


def alphas_cumprod(schedule: TrainingSchedule) -> Array:
    """Return the picture's share of the variance at each training timestep: (T,), float32."""
    kept = np.float32(1) - _betas(schedule)
    # torch's cumprod on the CPU accumulates in double and rounds each entry
    return np.cumprod(kept.astype(np.float64)).astype(np.float32)


def training_sigmas(schedule: TrainingSchedule) -> Array:
    """Return noise over picture at each training timestep, increasing: (num_train_timesteps,), float32.

    A zero-terminal-SNR schedule would end at infinity and ends at 4096 instead.
    """
    alphas = alphas_cumprod(schedule)
    if schedule.rescale_betas_zero_snr:
        alphas[-1] = FLOOR
    return np.sqrt((np.float32(1) - alphas) / alphas)


def _betas(schedule: TrainingSchedule) -> Array:
    if schedule.trained_betas is not None:
        betas = np.asarray(schedule.trained_betas, dtype=np.float32)
    else:
        betas = BETAS[schedule.beta_schedule](schedule)
    return _zero_terminal_snr(betas) if schedule.rescale_betas_zero_snr else betas


def _linear(schedule: TrainingSchedule) -> Array:
    return _linspace32(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)


def _scaled_linear(schedule: TrainingSchedule) -> Array:
    roots = _linspace32(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_train_timesteps)
    return np.asarray(roots * roots)


def _cosine(schedule: TrainingSchedule) -> Array:
    # Improved DDPM, arXiv:2102.09672, eq. 17
    times = np.arange(schedule.num_train_timesteps + 1, dtype=np.float64) / schedule.num_train_timesteps
    alphas = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - alphas[1:] / alphas[:-1], 0.999), dtype=np.float32)


BETAS: dict[str, Callable[[TrainingSchedule], Array]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


def _linspace32(start: float, stop: float, count: int) -> Array:
    """Return torch.linspace in float32, bit for bit: (count,), float32.

    It counts from both ends, and its product and sum are rounded together, as a fused multiply-add does.
    """
    low, high = np.float32(start), np.float32(stop)
    step = float((high - low) / np.float32(max(count - 1, 1)))
    index = np.arange(count, dtype=np.float64)
    exact = np.where(index < count // 2, float(low) + step * index, float(high) - step * (count - 1 - index))
    return exact.astype(np.float32)


def _zero_terminal_snr(betas: Array) -> Array:
    # Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891, Algorithm 1
    roots = np.sqrt(np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    alphas = roots * roots
    return np.float32(1) - np.concatenate([alphas[:1], alphas[1:] / alphas[:-1]])


def vp_level(sigma: float) -> Level:
    """Return the variance-preserving level (alpha² + sigma² = 1) at this ratio of noise to picture."""
    alpha = 1 / math.hypot(sigma, 1.0)
    return Level(alpha, sigma * alpha)


def ve_level(sigma: float) -> Level:
    """Return the variance-exploding level (alpha = 1) at this ratio of noise to picture."""
    return Level(1.0, sigma)


def level_at(alpha_cumprod: float) -> Level:
    """Return the variance-preserving level at this cumulative product of alphas."""
    return Level(math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod))


def spaced(spacing: str, total: int, steps: int, *, offset: int, visited: int | None = None) -> Array:
    """Return `steps` training timesteps, decreasing; linspace gives fractions: (steps,), float64.

    Spacings as in arXiv:2305.08891, Table 2. visited: how many timesteps from the clean end may be visited, None for
    all; trailing timesteps keep their stride and are fewer then
    """
    visited = total if visited is None else visited
    if spacing == "linspace":
        return np.linspace(0, visited - 1, steps)[::-1]
    if spacing == "leading":
        return (np.arange(steps)[::-1] * (visited // steps) + offset).astype(np.float64)
    # [:steps]: for some counts the float quotient makes arange one longer, ending at timestep -1
    return np.round(np.arange(visited, 0, -total / steps))[:steps] - 1


def sigma_to_timestep(sigmas: Array, table: Array) -> Array:
    """Return where noise ratios lie among the training timesteps, log-linearly: (n,), float64.

    sigmas: (n,); table: the training sigmas, increasing, float32
    """
    logs = np.log(table)
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    share = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - share) * low + share * (low + 1), dtype=np.float64)
