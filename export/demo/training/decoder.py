"""Training of the demo checkpoint's decoder: pictures from the constructed latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import max_pool2d

from latentrt.engines.bundle.files import atomic_write
from latentrt.export.demo.drawing import Pixels, draw_scene, random_scene
from latentrt.export.demo.training.autoencoder import FACTOR, SCALING, make_autoencoder, patch_statistics

PEAK = 3e-3
WARM_UP = 50
NOISE = 0.05  # what the denoiser leaves in the latents, in their standard deviation
EDGE_WEIGHT = 6.0
POOL = 4000  # pictures drawn beforehand


@dataclass(slots=True, kw_only=True)
class DecoderState:
    """Everything that a later run needs to go on."""

    vae: AutoencoderKL
    average: AutoencoderKL
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, path: Path) -> None:
        """Write the state so that an interrupted write leaves the old file."""
        parts = {"vae": self.vae, "average": self.average, "optimizer": self.optimizer}
        contents = {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        with atomic_write(path) as beside:
            torch.save(contents, beside)

    def load(self, path: Path) -> None:
        """Go on where a file stopped."""
        contents = torch.load(path, weights_only=True)
        self.vae.load_state_dict(contents["vae"])
        self.average.load_state_dict(contents["average"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.step = contents["step"]


def make_decoder_state(seed: int) -> DecoderState:
    """The constructed autoencoder, its running average and an optimizer for the decoder alone."""
    torch.manual_seed(seed)
    vae, average = make_autoencoder(), make_autoencoder()
    average.load_state_dict(vae.state_dict())
    vae.requires_grad_(False)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    vae.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return DecoderState(vae=vae, average=average, optimizer=optimizer)


def train_decoder(
    state: DecoderState, *, steps: int, batch: int, side: int, pool: int = POOL
) -> Iterator[dict[str, float]]:
    """Train on crops of `side` pixels until `steps`, the rate falling along a cosine; yields the errors.

    The crops come from `pool` pictures drawn beforehand.
    """
    pictures = draw_pool(pool)
    while state.step < steps:
        generator = np.random.default_rng((7, state.step))
        pixels = crop(pictures, generator, batch, side)
        loss, errors = compute_decoder_loss(state.vae, pixels, generator)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(state.vae.parameters(), 1.0)
        fall = 0.01 + 0.99 * (0.5 + 0.5 * float(np.cos(np.pi * state.step / steps)))
        for group in state.optimizer.param_groups:
            group["lr"] = PEAK * fall * min(1.0, (state.step + 1) / WARM_UP)
        state.optimizer.step()
        state.optimizer.zero_grad()
        _follow(state)
        state.step += 1
        yield errors


def draw_pool(count: int) -> Pixels:
    """Draw pictures to learn from: (count, 128, 128, 3), uint8."""
    generator = np.random.default_rng(2)
    return np.stack([draw_scene(random_scene(generator, pairs=0.3)) for _ in range(count)])


def crop(pictures: Pixels, generator: np.random.Generator, batch: int, side: int) -> Pixels:
    """Cut squares out of pictures along the grid of the patches."""
    places = (pictures.shape[1] - side) // FACTOR + 1
    corners = generator.integers(0, places, (batch, 2)) * FACTOR
    rows = generator.integers(0, len(pictures), batch)
    return np.stack([pictures[row, y : y + side, x : x + side] for row, (y, x) in zip(rows, corners, strict=True)])


def compute_decoder_loss(
    vae: AutoencoderKL, pixels: Pixels, generator: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error, heavier at edges, of pictures decoded from slightly noisy latents."""
    latents = patch_statistics(pixels)
    noisy = latents + NOISE * generator.standard_normal(latents.shape, dtype=np.float32)
    target = (torch.from_numpy(pixels).float() / 127.5 - 1).permute(0, 3, 1, 2)
    source = torch.from_numpy(noisy / SCALING).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae.decode(source).sample
    error = output.float() - target
    weight = 1 + EDGE_WEIGHT * edges(target)
    loss = ((error.abs() + 2 * error.square()) * weight).mean()
    return loss, {
        "loss": loss.item(),
        "psnr": -10 * float(np.log10(error.detach().square().mean().item() / 4)),
    }


def edges(target: Tensor) -> Tensor:
    """One where a colour changes within two pixels, else zero: (batch, 1, height, width)."""
    spread = max_pool2d(target, 5, 1, 2) + max_pool2d(-target, 5, 1, 2)
    return (spread.amax(1, keepdim=True) > 0.15).float()


def _follow(state: DecoderState) -> None:
    decay = min(0.995, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.vae.parameters()), 1 - decay)
