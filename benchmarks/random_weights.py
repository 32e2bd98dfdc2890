"""Random weights for networks that have none, a tensor at a time, and the text encoder that most checkpoints share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.export.checkpoint import DEMO

Array = np.ndarray[Any, Any]


def save_network(
    network: Any,
    folder: Path,
    generator: np.random.Generator | None,
    *,
    half: bool,
    exact: Mapping[str, Array] | None = None,
) -> None:
    """Write a network's config and random weights in diffusers' layout, no more in memory than its largest tensor.

    network: of torch, its weights may be on the meta device; exact: tensors that are written as they are
    generator: None for a file whose header alone is there, and takes next to no disk
    """
    _save_config(network, folder)
    stem = "diffusion_pytorch_model" if hasattr(network, "save_config") else "model"
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    _sow(folder / f"{stem}.safetensors", shapes, generator, half=half, exact=exact or {})


def _save_config(network: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(network, "save_config"):
        network.save_config(folder)
    else:
        network.config.architectures = [type(network).__name__]
        network.config.save_pretrained(folder)


def _sow(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    generator: np.random.Generator | None,
    *,
    half: bool,
    exact: Mapping[str, Array],
) -> None:
    """Write random weights as safetensors: such as keep the size of what goes through a layer, as torch draws them."""
    kind, dtype = ("F16", np.float16) if half else ("F32", np.float32)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as data:
        data.write(len(text).to_bytes(8, "little") + text)
        if generator is None:
            data.truncate(8 + len(text) + end)
            return
        for name, shape in shapes.items():
            numbers = exact[name] if name in exact else _draw(name, shape, generator)
            data.write(numbers.astype(dtype).tobytes())


def _draw(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Draw a layer's weight within 1 over the root of its inputs; a norm's is one, a bias zero."""
    if len(shape) < 2:
        return np.full(shape, float(name.endswith("weight")), np.float32)
    reach = np.float32(0.03 if "embedding" in name and "embeddings." in name else math.prod(shape[1:]) ** -0.5)
    return (2 * generator.random(shape, np.float32) - 1) * reach


def make_clip(width: int, layers: int, heads: int, activation: str, *, projected: bool = False) -> Any:
    """Make a CLIP text encoder for the demo's vocabulary. projected: with what turns its last token into pooled text"""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
