"""What a UNet takes besides latents, timestep and text: sizes in pixels, and the scale of guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import UNET

if TYPE_CHECKING:
    from latentrt.runtime.draw.job import Job


def conditions(manifest: Manifest, job: Job, *, rows: int, denoiser: str = UNET) -> dict[str, Array]:
    """Return a UNet's further inputs by name, a row for each model row: (rows, …), float32.

    rows: the prompts' own and, where there is guidance, then the negative prompts'
    Raises RequestError where the UNet takes something that nobody here knows.
    """
    made = {}
    for spec in manifest.components[denoiser].inputs:
        if spec.name in CONDITIONS:
            width = spec.shape[1]
            assert isinstance(width, int)
            made[spec.name] = CONDITIONS[spec.name](job, rows, width)
    return made


def _sizes(job: Job, rows: int, numbers: int) -> Array:
    """Return SDXL's six numbers, arXiv:2307.01952 section 2.2, or the five of its refiner: (rows, numbers)."""
    request, (width, height) = job.request, job.size
    original, target = request.original_size or job.size, request.target_size or (width, height)
    top, left = request.crop
    shared = [original[1], original[0], top, left]
    if numbers == len(shared) + 2:
        row = [*shared, target[1], target[0]]
        return np.tile(np.array(row, dtype=np.float32), (rows, 1))
    if numbers == len(shared) + 1:
        pictures = len(job.prompts)
        both = np.array([request.aesthetic_score, request.negative_aesthetic_score], dtype=np.float32)
        scores = np.repeat(both, pictures)[:rows]
        return np.concatenate([np.tile(np.array(shared, dtype=np.float32), (rows, 1)), scores[:, None]], axis=1)
    raise RequestError(f"this UNet takes {numbers} numbers of sizes, expected 6 (SDXL) or 5 (its refiner)")


def _guidance(job: Job, rows: int, width: int) -> Array:
    return np.tile(embed_guidance(job.request.guidance, width), (rows, 1))


CONDITIONS: Mapping[str, Callable[[Job, int, int], Array]] = {"time_ids": _sizes, "timestep_cond": _guidance}


def embed_guidance(scale: float, width: int) -> Array:
    """Return the scale of guidance as a latent consistency model takes it: (width,), float32.

    Sines and cosines of 1000 (scale - 1) at frequencies from 1 to 1/10000: arXiv:2310.04378, appendix
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half, dtype=np.float32)).astype(np.float32)
    angles = np.float32(1000 * (scale - 1)) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)]).astype(np.float32)
