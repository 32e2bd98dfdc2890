"""What a denoiser takes besides latents, timestep and text: sizes, the scale of guidance, whose layers are skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.bundle.manifest import DenoiserSpec, Manifest, SizeName
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import SKIP_LAYERS
from latentrt.runtime.sampling.guidance import GROUPS

if TYPE_CHECKING:
    from latentrt.runtime.draw.job import Job


def conditions(manifest: Manifest, job: Job, *, rows: int, denoiser: str) -> dict[str, Array]:
    """Return a denoiser's further inputs by name, a row for each model row: (rows, …), float32.

    rows: the prompts' own, and those of the further groups where there is guidance
    """
    taken, made = manifest.denoisers[denoiser], {}
    for spec in manifest.components[denoiser].inputs:
        if spec.name in CONDITIONS:
            width = spec.shape[-1] if isinstance(spec.shape[-1], int) else 1
            made[spec.name] = CONDITIONS[spec.name](job, rows, width, taken)
    return made


def _sizes(job: Job, rows: int, _: int, taken: DenoiserSpec) -> Array:
    """Return the numbers of arXiv:2307.01952, section 2.2, that a denoiser takes: (rows, numbers)."""
    pictures = len(job.prompts)
    positive, negative = (_size_numbers(job, negative=on) for on in (False, True))
    both = np.array([[one[name] for name in taken.sizes] for one in (positive, negative)], dtype=np.float32)
    return np.concatenate([np.repeat(both, pictures, axis=0)] * 2)[:rows]


def _size_numbers(job: Job, *, negative: bool) -> dict[SizeName, float]:
    """Return what each number is for a prompt, or for a negative prompt."""
    request = job.request
    original, target = request.original_size or job.size, request.target_size or job.size
    return {
        "original_height": original[1],
        "original_width": original[0],
        "crop_top": request.crop[0],
        "crop_left": request.crop[1],
        "target_height": target[1],
        "target_width": target[0],
        "aesthetic_score": request.negative_aesthetic_score if negative else request.aesthetic_score,
        **job.numbers,
    }


def _guidance(job: Job, rows: int, width: int, _: DenoiserSpec) -> Array:
    return np.tile(embed_guidance(job.scale, width), (rows, 1))


def _skips(job: Job, rows: int, _: int, __: DenoiserSpec) -> Array:
    """Return which rows skip layers: those of the third group, (rows,)."""
    return np.asarray(np.arange(rows) // len(job.prompts) == GROUPS - 1, dtype=np.float32)


CONDITIONS: Mapping[str, Callable[[Job, int, int, DenoiserSpec], Array]] = {
    "time_ids": _sizes,
    "timestep_cond": _guidance,
    SKIP_LAYERS: _skips,
}


def embed_guidance(scale: float, width: int) -> Array:
    """Return the scale of guidance as a latent consistency model takes it: (width,), float32.

    Sines and cosines of 1000 (scale - 1) at frequencies from 1 to 1/10000: arXiv:2310.04378, appendix
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half, dtype=np.float32)).astype(np.float32)
    angles = np.float32(1000 * (scale - 1)) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)]).astype(np.float32)
