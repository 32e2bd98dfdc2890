"""Training of the denoiser and the text encoder of the demo checkpoint, on one or more processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.engines.bundle.files import atomic_write
from latentrt.export.demo.training.dataset import ATTRIBUTES, UNSAID, Examples
from latentrt.export.demo.training.tokens import CONTEXT

WIDTH = 64
TRAIN_STEPS = 1000
BETAS = (0.00085, 0.012)
EMPTY_SHARE = 0.1
HEAD_WEIGHT = 0.05
WARM_UP = 100
TEXT_STEPS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast to train; steps count from the very first run."""

    steps: int
    cool_down: int
    batch: int = 64
    peak: float = 1.5e-3
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: warm-up, a plateau, a cosine down to a fiftieth."""
        left = min(1.0, (self.steps - step) / max(self.cool_down, 1))
        fall = 0.02 + 0.98 * (0.5 - 0.5 * float(np.cos(np.pi * left)))
        return self.peak * min(1.0, (step + 1) / WARM_UP) * fall


class Model(nn.Module):
    """The two networks that train together, and a head that is not exported."""

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        self.text = make_text_encoder(vocabulary, end)
        self.unet = make_unet()
        self.head = nn.Linear(WIDTH, sum(ATTRIBUTES.values()))
        self.end = end

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode prompts: hidden states (batch, 77, 64) and the head's logits (batch, classes)."""
        hidden = self.text(tokens).last_hidden_state
        ends = (tokens == self.end).int().argmax(1)
        return hidden, self.head(hidden[torch.arange(len(tokens)), ends])


def make_text_encoder(vocabulary: int, end: int) -> CLIPTextModel:
    """A CLIP text encoder 64 wide with two layers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        hidden_act="quick_gelu",
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """The U-Net of SD 1.x in small: cross attention at the two upper levels and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


class FullPrecisionAttention:
    """Attention in float32 under autocast: on these CPUs its bfloat16 gradient is four times slower."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from (batch, pixels, width) to the prompt, or to itself without one."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = (len(hidden_states), -1, attn.heads, attn.to_q.out_features // attn.heads)
        query, key, value = (
            layer(states).float().view(split).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        with torch.autocast("cpu", enabled=False):
            mixed = scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        return cast(Tensor, attn.to_out[0](mixed))


@dataclass(slots=True, kw_only=True)
class State:
    """Everything that a later run needs to go on: saved and loaded as one file."""

    model: Model
    average: Model
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, path: Path) -> None:
        """Write the state so that an interrupted write leaves the old file."""
        contents = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with atomic_write(path) as beside:
            torch.save(contents, beside)

    def load(self, path: Path) -> None:
        """Go on where a file stopped."""
        contents = torch.load(path, weights_only=True)
        self.model.load_state_dict(contents["model"])
        self.average.load_state_dict(contents["average"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.step = contents["step"]


def make_state(vocabulary: int, end: int, seed: int) -> State:
    """Fresh networks, their running average and their optimizer."""
    torch.manual_seed(seed)
    model, average = Model(vocabulary, end), Model(vocabulary, end)
    average.load_state_dict(model.state_dict())
    model.unet.set_attn_processor(FullPrecisionAttention())
    model.unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return State(model=model, average=average, optimizer=optimizer)


def train(state: State, examples: Examples, schedule: Schedule) -> Iterator[dict[str, float]]:
    """Train until the schedule ends; yields the losses after every step."""
    signal = signal_levels()
    while state.step < schedule.steps:
        begun = time.monotonic()
        generator = torch.Generator().manual_seed(schedule.seed + 1000 * state.step + process_number())
        batch = draw_batch(examples, schedule.batch, generator, state.model.end)
        text_only = state.step < TEXT_STEPS
        loss, losses = compute_loss(state.model, batch, signal, generator, text_only=text_only)
        torch.autograd.backward(loss)
        share_gradients(state.model)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.rate(max(0, state.step - TEXT_STEPS)) if not text_only else 2e-3
        state.optimizer.step()
        state.optimizer.zero_grad()
        follow(state)
        state.step += 1
        yield losses | {"norm": float(norm), "step_s": time.monotonic() - begun}


def signal_levels() -> Tensor:
    """Share of the clean picture's variance left at every timestep: (1000,), float32."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples of one step: latents (batch, 4, 16, 16), tokens (batch, 77), attributes (batch, 7)."""

    latents: Tensor
    tokens: Tensor
    attributes: Tensor


def draw_batch(examples: Examples, size: int, generator: torch.Generator, end: int) -> Batch:
    """Choose examples at random; one prompt in ten is emptied, for guidance."""
    rows = torch.randint(len(examples.latents), (size,), generator=generator).numpy()
    tokens = torch.from_numpy(examples.tokens[rows]).long()
    attributes = torch.from_numpy(examples.attributes[rows]).long()
    empty = torch.rand(size, generator=generator) < EMPTY_SHARE
    tokens[empty, 1:] = end
    attributes[empty] = UNSAID
    return Batch(latents=torch.from_numpy(examples.latents[rows]).float(), tokens=tokens, attributes=attributes)


def compute_loss(
    model: Model, batch: Batch, signal: Tensor, generator: torch.Generator, *, text_only: bool
) -> tuple[Tensor, dict[str, float]]:
    """The weighted noise error plus the head's error; with `text_only` the head's error alone."""
    hidden, logits = model.read(batch.tokens)
    head = attribute_loss(logits, batch.attributes)
    if text_only:
        return head, {"head": head.item()}
    size = len(batch.latents)
    shift = torch.rand(size, generator=generator)
    steps = ((torch.arange(size) + shift) / size * TRAIN_STEPS).long()  # stratified
    noise = torch.randn(batch.latents.shape, generator=generator)
    level = signal[steps].view(-1, 1, 1, 1)
    noisy = level.sqrt() * batch.latents + (1 - level).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        output = model.unet(noisy.contiguous(memory_format=torch.channels_last), steps, hidden).sample
    errors = (output.float() - noise).square().mean((1, 2, 3))
    snr = signal[steps] / (1 - signal[steps])
    weighted = (errors * snr.rsqrt().clamp(max=4.0)).mean()
    losses = {"head": head.item(), "plain": errors.mean().item(), "loss": weighted.item()}
    return weighted + HEAD_WEIGHT * head, losses


def attribute_loss(logits: Tensor, attributes: Tensor) -> Tensor:
    """Mean cross entropy of the attributes that the prompts name."""
    parts = logits.split_with_sizes(list(ATTRIBUTES.values()), dim=1)
    errors = [
        cross_entropy(part, attributes[:, column], ignore_index=UNSAID, reduction="sum")
        for column, part in enumerate(parts)
    ]
    return torch.stack(errors).sum() / (attributes != UNSAID).sum().clamp(min=1)


def follow(state: State) -> None:
    """Move the running average towards the model."""
    decay = min(0.998, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.model.parameters()), 1 - decay)


def process_number() -> int:
    """Number of this process among those that train together, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def share_gradients(model: nn.Module) -> None:
    """Average the gradients of all processes."""
    if not dist.is_initialized():
        return
    present = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in present])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(present, flat.split_with_sizes([part.numel() for part in present]), strict=True):
        gradient.copy_(mean.view_as(gradient))
