"""A LoRA file with a change of every kind for a tiny checkpoint, and torch's own word for what the weights become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Draw = Callable[..., Tensor]
Made = tuple[dict[str, Tensor], dict[str, Tensor]]
"""A module's tensors by their roles, and its parameters as they are then."""


def _loha(base: dict[str, Tensor], draw: Draw, strength: float) -> Made:
    """W + strength * alpha / rank * (a1 b1) ∘ (a2 b2)."""
    outputs, inputs = base["weight"].shape[0], base["weight"][0].numel()
    a, b, c, d = draw(outputs, 2), draw(2, inputs), draw(outputs, 2), draw(2, inputs)
    product = torch.einsum("or,ri,os,si->oi", a, b, c, d).reshape(base["weight"].shape)
    named = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
    return named, {"weight": base["weight"] + strength * 0.5 * product}


def _lokr(base: dict[str, Tensor], draw: Draw, strength: float) -> Made:
    """W + strength * alpha / rank * w1 ⊗ (a b), where the second factor has the kernel."""
    outputs, inputs, *kernel = base["weight"].shape
    whole, a, b = draw(2, 2), draw(outputs // 2, 3), draw(3, inputs // 2 * int(np.prod(kernel)))
    blocks = torch.einsum("pq,ar,rb->paqb", whole, a, b).reshape(base["weight"].shape)
    named = {"lokr_w1": whole, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.5)}
    return named, {"weight": base["weight"] + strength * 0.5 * blocks}


def _dora(base: dict[str, Tensor], draw: Draw, strength: float) -> Made:
    """Between W and m * V / |V|, with V = W + alpha / rank * up down and the norm of each output."""
    outputs, inputs = base["weight"].shape
    up, down, magnitudes = draw(outputs, 2), draw(2, inputs), draw(outputs, 1).abs() + 0.3
    merged = torch.nn.functional.normalize(base["weight"] + 2.0 * up @ down, dim=1) * magnitudes
    named = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitudes, "alpha": torch.tensor(4.0)}
    return named, {"weight": torch.lerp(base["weight"], merged, strength)}


def _differences(names: tuple[str, str]) -> Callable[[dict[str, Tensor], Draw, float], Made]:
    def make(base: dict[str, Tensor], draw: Draw, strength: float) -> Made:
        named = {name: draw(*base[key].shape) for name, key in zip(names, ("weight", "bias"), strict=True)}
        return named, {
            key: base[key] + strength * named[name] for name, key in zip(names, ("weight", "bias"), strict=True)
        }

    return make


WHOLE, NORM = _differences(("diff", "diff_b")), _differences(("w_norm", "b_norm"))
CHANGES: dict[tuple[str, str], Callable[[dict[str, Tensor], Draw, float], Made]] = {
    ("unet", f"{BLOCK}.attn1.to_q"): _loha,
    ("unet", "down_blocks.0.resnets.0.conv1"): _loha,
    ("unet", f"{BLOCK}.attn2.to_out.0"): _lokr,
    ("unet", "mid_block.resnets.1.conv2"): _lokr,
    ("unet", f"{BLOCK}.ff.net.0.proj"): _dora,
    ("unet", "conv_in"): WHOLE,
    ("unet", "time_embedding.linear_1"): WHOLE,
    ("unet", f"{BLOCK}.attn1.to_out.0"): WHOLE,
    ("unet", "mid_block.resnets.0.norm1"): NORM,
    ("unet", f"{BLOCK}.norm2"): NORM,
    ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): _dora,
    ("text_encoder", "text_model.encoder.layers.1.mlp.fc1"): _lokr,
    ("text_encoder", "text_model.encoder.layers.1.layer_norm2"): NORM,
}


def every_kind(root: Path, *, seed: int, strength: float) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """Return a file's tensors, and the weights that it changes as they are then, by network and name."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    changed: dict[tuple[str, str], Tensor] = {}
    for (part, module), make in CHANGES.items():
        (file,) = (root / part).glob("*.safetensors")
        start = "" if f"{module}.weight" in load_file(file) else "text_model."
        own = {key: load_file(file).get(f"{module.removeprefix(start)}.{key}") for key in ("weight", "bias")}
        base = {key: tensor.double() for key, tensor in own.items() if tensor is not None}
        named, after = make(base, lambda *shape: (torch.rand(shape, generator=generator) - 0.5).double(), strength)
        prefix = f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}"
        tensors |= {f"{prefix}.{role}": tensor.float().numpy() for role, tensor in named.items()}
        changed |= {(part, f"{module}.{key}"): tensor for key, tensor in after.items()}
    return tensors, changed
