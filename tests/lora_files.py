"""LoRA files for tiny checkpoints: one set of random changes, written as each trainer writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.single_files import unet_key

Array = np.ndarray[Any, np.dtype[Any]]

# Every kind of layer that trainers change, in the tiny SD 1.x checkpoint: module of diffusers or transformers, rank.
BLOCK = "down_blocks.0.attentions.0"
UNET = {
    f"{BLOCK}.transformer_blocks.0.attn1.to_q": 4,
    f"{BLOCK}.transformer_blocks.0.attn2.to_k": 2,
    f"{BLOCK}.transformer_blocks.0.attn1.to_out.0": 4,
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj": 4,
    f"{BLOCK}.proj_in": 3,  # a 1x1 convolution
    "down_blocks.0.resnets.0.conv1": 4,
    "down_blocks.0.resnets.0.time_emb_proj": 2,
    "down_blocks.0.downsamplers.0.conv": 2,
    "down_blocks.1.resnets.0.conv_shortcut": 2,
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v": 4,
    "mid_block.resnets.1.conv2": 2,
    "up_blocks.0.upsamplers.0.conv": 2,
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0": 4,
    "conv_in": 2,
    "conv_out": 2,
    "time_embedding.linear_1": 2,
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": 4,
    "text_model.encoder.layers.1.self_attn.out_proj": 2,
    "text_model.encoder.layers.1.mlp.fc1": 3,
}
ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
Tensors = dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One module's change, as it is trained: down (rank, inputs, …), up (outputs, rank, …), alpha."""

    part: str
    module: str
    down: Array
    up: Array
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


def weight_shapes(root: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a checkpoint's UNet and text encoders, by part and name."""
    from safetensors.numpy import load_file

    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if not (root / part).is_dir():
            continue
        (file,) = (root / part).glob("*.safetensors")
        found |= {f"{part}:{key}": array.shape for key, array in load_file(file).items()}
    return found


def make_factors(
    root: Path, *, seed: int, size: float = 0.3, text: bool = True, unet: Mapping[str, int] | None = None
) -> list[Factors]:
    """Make random changes for a checkpoint. size: roughly the largest weight they add."""
    generator, shapes = np.random.default_rng(seed), weight_shapes(root)
    rows = [("unet", module, rank) for module, rank in (UNET if unet is None else unet).items()]
    rows += [("text_encoder", module, rank) for module, rank in TEXT.items() if text]
    found = []
    for part, module, rank in rows:
        outputs, *inputs = shapes[f"{part}:{module}.weight"]
        up_shape = (outputs, rank, *(1 for _ in inputs[1:]))
        down, up = (generator.uniform(-1, 1, shape) for shape in ((rank, *inputs), up_shape))
        scale = np.sqrt(size / rank)
        alpha = float(generator.choice([1.0, rank / 2, rank, 2 * rank]))
        arrays = {"down": (down * scale).astype(np.float32), "up": (up * scale).astype(np.float32)}
        found.append(Factors(part=part, module=module, alpha=alpha, **arrays))
    return found


def every_layer(root: Path, *, seed: int, part: str | None = None) -> list[Factors]:
    """Make random changes for every linear layer and convolution of every network; part: of one of them alone."""
    generator = np.random.default_rng(seed)
    found = []
    for key, (outputs, *inputs) in weight_shapes(root).items():
        network, _, name = key.partition(":")
        if not inputs or "embedding.weight" in name or "embeddings." in name or part not in (None, network):
            continue
        rank = int(generator.integers(1, 4))
        down, up = generator.uniform(-0.2, 0.2, (rank, *inputs)), generator.uniform(-0.3, 0.3, (outputs, rank))
        module = name.removesuffix(".weight")
        arrays = {
            "down": down.astype(np.float32),
            "up": up.reshape(-1, rank, *(1 for _ in inputs[1:])).astype(np.float32),
        }
        found.append(Factors(part=network, module=module, alpha=float(rank) / 2, **arrays))
    return found


def _pair(name: str, factors: Factors, down: str, up: str) -> Tensors:
    return {f"{name}{down}": factors.down, f"{name}{up}": factors.up}


def kohya(factors: list[Factors], *, original: bool = False) -> Tensors:
    """As kohya's sd-scripts and LyCORIS (LoCon) write them; original: with the UNet's first names, as for SDXL."""
    tensors = {}
    for row in factors:
        module = row.module
        if original and row.part == "unet":
            key = unet_key(f"{module}.weight", layers=1, attended=(1,))
            module = key.removesuffix(".weight")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[row.part]
        name = f"{prefix}_{module.replace('.', '_')}"
        tensors |= _pair(name, row, ".lora_down.weight", ".lora_up.weight")
        tensors[f"{name}.alpha"] = np.array(row.alpha, np.float32)
    return tensors


def kohya_original(factors: list[Factors]) -> Tensors:
    return kohya(factors, original=True)


def peft(factors: list[Factors]) -> Tensors:
    """As diffusers writes them now; alpha, which has no place there, is in the matrices."""
    tensors = {}
    for row in factors:
        name = f"{row.part}.{row.module}"
        tensors[f"{name}.lora_A.weight"] = row.down
        tensors[f"{name}.lora_B.weight"] = (row.up * np.float32(row.alpha / row.rank)).astype(np.float32)
    return tensors


def diffusers_alphas(factors: list[Factors]) -> Tensors:
    """As diffusers wrote them for a while, with alphas beside the matrices."""
    tensors = {}
    for row in factors:
        name = f"{row.part}.{row.module}"
        end = ".lora_linear_layer" if row.part == "text_encoder" else ".lora"
        tensors |= _pair(name, row, f"{end}.down.weight", f"{end}.up.weight")
        tensors[f"{name}.alpha"] = np.array(row.alpha, np.float32)
    return tensors


def processors(factors: list[Factors]) -> Tensors:
    """As diffusers wrote them first, where only attention had any: in processors, no alphas."""
    tensors = {}
    for row in factors:
        path, _, last = row.module.removesuffix(".0").rpartition(".")
        last = ATTENTION.get(last, last)
        middle = ".processor" if row.part == "unet" else ""
        up = (row.up * np.float32(row.alpha / row.rank)).astype(np.float32)
        tensors[f"{row.part}.{path}{middle}.{last}_lora.down.weight"] = row.down
        tensors[f"{row.part}.{path}{middle}.{last}_lora.up.weight"] = up
    return tensors


WRITERS: Mapping[str, Callable[[list[Factors]], Tensors]] = {
    "kohya": kohya,
    "kohya with original names": kohya_original,
    "peft": peft,
    "diffusers with alphas": diffusers_alphas,
}


def adapter_metadata(factors: list[Factors], *, prefix: bool = True) -> dict[str, Any]:
    """Return what PEFT says beside its matrices: a common alpha, and those modules that have another."""
    document: dict[str, Any] = {}
    for part in sorted({row.part for row in factors}):
        mine = [row for row in factors if row.part == part]
        start = f"{part}." if prefix else ""
        document |= {
            f"{start}r": mine[0].rank,
            f"{start}lora_alpha": mine[0].alpha,
            f"{start}rank_pattern": {row.module: row.rank for row in mine[1:]},
            f"{start}alpha_pattern": {row.module: row.alpha for row in mine[1:]},
            f"{start}target_modules": [row.module for row in mine],
        }
    return document


def save(path: Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None, dtype: Any = None) -> Path:
    """Write a LoRA file. dtype: torch's, for those that NumPy does not have."""
    import torch
    from safetensors.torch import save_file

    found = {key: torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape) for key, array in tensors.items()}
    save_file({key: tensor.to(dtype) for key, tensor in found.items()} if dtype else found, path, metadata=metadata)
    return path


def save_with_adapter_metadata(path: Path, factors: list[Factors]) -> Path:
    """Write PEFT's names with alphas in the file's metadata, as diffusers does since it keeps PEFT's config."""
    tensors = {}
    for row in factors:
        tensors |= _pair(f"{row.part}.{row.module}", row, ".lora_A.weight", ".lora_B.weight")
    return save(path, tensors, metadata={"lora_adapter_metadata": json.dumps(adapter_metadata(factors))})
