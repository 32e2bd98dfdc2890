"""What a picture starts from: noise, latents that the caller gives, an image, or an image and a mask.

Each start draws from the seeds' streams in the order of diffusers' pipelines, so that the same seed agrees.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.denoise import begin
from latentrt.runtime.sampling.plan import SamplingPlan

Encoder = Callable[[Array], Array]
"""pixels (m, 3, h, w), float32, -1 to 1 -> latent parameters (m, 2C, h / factor, w / factor): means, log variances"""

Draw = Callable[[], Array]
"""the next unit normals of every picture's own stream: (n, C, h / factor, w / factor), float32"""

LOG_VARIANCES = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution limits them


class Start(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What n pictures start from; what is None has no part in it.

    noise: (n, C, h, w), unit normal
    image: (n, C, h, w), clean latents that the noise of the plan's first level is added to
    kept: (n, C, h, w), clean latents that are put back outside the mask after each stage
    mask: (1, 1, h, w), 1 where it is repainted
    condition: (n, 1 + C, h, w), what an inpainting UNet sees after the latents
    """

    noise: Array
    image: Array | None = None
    kept: Array | None = None
    mask: Array | None = None
    condition: Array | None = None

    def inputs(self, plan: SamplingPlan, *, state_rows: int) -> dict[str, Array]:
        """Return what to write to a workspace before the first stage: the state, and what lies beside it."""
        written = {"state": begin(plan, self.noise, state_rows=state_rows, image=self.image)}
        if self.kept is not None and self.mask is not None:
            written["keep_mask"] = np.repeat(self.mask, len(self.noise), axis=0)
            written["known"] = np.stack([self.kept, self.noise], axis=1)
        if self.condition is not None:
            written["condition"] = self.condition
        return written


def start_from_image(pixels: Array, encoder: Encoder, draw: Draw, *, space: LatentSpec) -> Start:
    """Return a start from an image: the image's own draw comes before the noise's.

    pixels: (1 or n, height, width, 3), float32, -1 to 1
    """
    parameters = image_parameters(pixels, encoder)
    image = sample_latents(parameters, draw(), space=space)
    return Start(noise=draw(), image=image)


def start_inpainting(
    pixels: Array,
    mask: Array,
    encoder: Encoder,
    draw: Draw,
    *,
    space: LatentSpec,
    strength: float = 1.0,
    inpainting_model: bool = False,
) -> Start:
    """Return a start that repaints what a mask shows.

    pixels: (1 or n, height, width, 3), float32, -1 to 1; mask: (1, height, width), float32, 1 where it is repainted
    strength: at 1 the repainted part starts from noise alone
    inpainting_model: the UNet is an inpainting one, and sees mask and masked image where others have the rest put back
    The draws: the image's where the image is used, the noise's, the masked image's, which only such a UNet
    uses, but a sampler that draws later comes after.
    Raises RequestError if the mask is too small to reach the latents.
    """
    cells = latent_mask(mask, space.factor)
    image = None
    if not inpainting_model or strength < 1:
        image = sample_latents(image_parameters(pixels, encoder), draw(), space=space)
    noise, masked_noise = draw(), draw()
    start = image if strength < 1 else None
    if not inpainting_model:
        return Start(noise=noise, image=start, kept=image, mask=cells)
    masked = image_parameters(masked_pixels(pixels, mask), encoder)
    condition = inpainting_condition(cells, sample_latents(masked, masked_noise, space=space))
    return Start(noise=noise, image=start, mask=cells, condition=condition)


def image_parameters(pixels: Array, encoder: Encoder) -> Array:
    """Return the distribution of an image's latents, from the VAE encoder: (m, 2C, h, w), float32, a copy.

    pixels: (m, height, width, 3), float32, -1 to 1
    """
    return np.array(encoder(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), dtype=np.float32)


def hint_latents(pixels: Array, encoder: Encoder, *, space: LatentSpec) -> Array:
    """Return the most likely latents of pictures to follow: (n, C, h, w), float32, as the denoiser sees latents.

    pixels: (n, 3, height, width), float32, 0 to 1
    """
    means, _ = np.split(np.array(encoder(2 * pixels - 1), dtype=np.float32), 2, axis=1)
    return np.asarray(space.scaled(means), dtype=np.float32)


def sample_latents(parameters: Array, noise: Array, *, space: LatentSpec) -> Array:
    """Return latents drawn from an image's distribution: (n, C, h, w), float32, as the UNet sees them.

    parameters: (1 or n, 2C, h, w); noise: (n, C, h, w), unit normal
    """
    means, log_variances = np.split(parameters.astype(np.float32, copy=False), 2, axis=1)
    deviations = np.exp(np.float32(0.5) * np.clip(log_variances, *LOG_VARIANCES))
    return np.asarray(space.scaled(means + deviations * noise), dtype=np.float32)


def masked_pixels(pixels: Array, mask: Array) -> Array:
    """Return the image with middle grey where it is repainted: the shape of the pixels, float32."""
    return np.asarray(pixels * (mask < 0.5)[..., None], dtype=np.float32)


def latent_mask(mask: Array, factor: int) -> Array:
    """Return the mask of the latents, the first pixel of each cell as diffusers takes it: (1, 1, h, w), float32.

    mask: (1, height, width). Raises RequestError if nothing of it is left.
    """
    cells = mask[:, None, ::factor, ::factor]
    if not cells.any():
        raise RequestError(
            f"mask: its white parts are smaller than a latent ({factor}x{factor} pixels) and miss every one; "
            "paint them larger"
        )
    return np.asarray(cells, dtype=np.float32)


def inpainting_condition(mask: Array, masked_image: Array) -> Array:
    """Return what an inpainting UNet sees after the latents: (n, 1 + C, h, w), float32.

    mask: (1, 1, h, w); masked_image: the latents of `masked_pixels`, (n, C, h, w)
    """
    rows = np.broadcast_to(mask, (len(masked_image), *mask.shape[1:]))
    return np.concatenate([rows, masked_image], axis=1, dtype=np.float32)


def check_latents(latents: Array, *, pictures: int, shape: tuple[int, int, int]) -> Array:
    """Return the caller's latents as float32: (pictures, C, h, w). One picture's serve all of them.

    shape: (C, h, w) of the pictures to draw
    Raises RequestError on another shape, and on what is not a finite float.
    """
    array = np.asarray(latents)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise RequestError(f"latents: found an array of {array.dtype}, expected floats")
    rows = array[None] if array.ndim == 3 else array
    if rows.shape not in ((1, *shape), (pictures, *shape)):
        raise RequestError(f"latents: found shape {array.shape}, expected {(pictures, *shape)} for this size")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise RequestError("latents: found a number that is not finite, or is outside the range of float32")
    return np.broadcast_to(rows, (pictures, *shape))
