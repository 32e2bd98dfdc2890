"""Checkpoints of SD 3.5 with random weights: the published sizes, and T5 beside networks too small to matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from random_weights import make_clip, save_network

from latentrt.export.checkpoint import DEMO
from latentrt.export.configs.published import CONFIGS
from latentrt.export.sources.unigram import PROMPTS

PUBLISHED = CONFIGS["sd3"]
POSITIONS = "pos_embed.pos_embed"  # sines: an export would not shrink a table of random ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the networks.

    transformer: its config over TRANSFORMER; clips: width, layers and heads of each; vae: widths of its levels
    t5: how many of T5-XXL's 24 layers the third text encoder has; 0 for a checkpoint without it
    """

    transformer: Mapping[str, Any]
    clips: tuple[tuple[int, int, int], tuple[int, int, int]] = ((768, 12, 12), (1280, 32, 20))
    vae: tuple[int, ...] = (128, 256, 512, 512)
    t5: int = 0


TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
# From transformer/config.json of stabilityai/stable-diffusion-3.5-medium and -large.
MEDIUM: Mapping[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
LARGE: Mapping[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
SMALL: dict[str, Any] = {
    "transformer": {
        "sample_size": 16,
        "num_layers": 1,
        "num_attention_heads": 1,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 32,
    },
    "clips": ((64, 2, 1), (64, 2, 1)),
    "vae": (16, 16, 16, 16),
}
SHAPES = {
    "sd35-medium": Shape(transformer=MEDIUM, t5=24),
    "sd35-medium-no-t5": Shape(transformer=MEDIUM),
    "sd35-large": Shape(transformer=LARGE, t5=24),
    "sd35-large-no-t5": Shape(transformer=LARGE),
    "t5-xxl": Shape(**SMALL, t5=24),
    "t5-xxl-2": Shape(**SMALL, t5=2),  # two of its layers
    "sd3-small": Shape(**SMALL),
}


def save_sd3(shape: str, directory: Path, *, half: bool, hollow: bool = False) -> Path:
    """Write a diffusers directory with random weights, seed 0; `half` saves them in float16. Returns the directory.

    hollow: with headers of weights alone, which is enough to learn what an export would take
    """
    import torch

    sizes, generator = SHAPES[shape], None if hollow else np.random.default_rng(0)
    with torch.device("meta"):
        for folder, network in make_networks(sizes):
            exact = {POSITIONS: positions(network)} if generator and POSITIONS in network.state_dict() else None
            save_network(network, directory / folder, generator, half=half, exact=exact)
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(DEMO / "tokenizer", directory / folder, dirs_exist_ok=True)
    scheduler = directory / "scheduler"
    scheduler.mkdir(exist_ok=True)
    (scheduler / "scheduler_config.json").write_text(json.dumps(PUBLISHED["scheduler"], indent=1))
    if sizes.t5:
        save_letters(directory / "tokenizer_3")
    (directory / "model_index.json").write_text(json.dumps(_index(t5=bool(sizes.t5)), indent=1))
    return directory


def _index(*, t5: bool) -> dict[str, Any]:
    clips = {
        **{f"text_encoder{end}": ["transformers", "CLIPTextModelWithProjection"] for end in ("", "_2")},
        **{f"tokenizer{end}": ["transformers", "CLIPTokenizer"] for end in ("", "_2")},
    }
    third = {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}
    return {
        **PUBLISHED["index"],
        **clips,
        **{name: ["transformers", kind] if t5 else [None, None] for name, kind in third.items()},
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }


def make_networks(sizes: Shape) -> Iterator[tuple[str, Any]]:
    """Make each network with its folder, on the device that is set."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    for folder, size, activation in zip(
        ("text_encoder", "text_encoder_2"), sizes.clips, ("quick_gelu", "gelu"), strict=True
    ):
        yield folder, make_clip(*size, activation, projected=True)
    yield "transformer", SD3Transformer2DModel(**{**TRANSFORMER, **sizes.transformer})
    levels = len(sizes.vae)
    own = {"block_out_channels": sizes.vae, "norm_num_groups": min(32, sizes.vae[0])}
    kinds = {f"{way}_block_types": (f"{kind}Block2D",) * levels for way, kind in WAYS.items()}
    vae = {key: value for key, value in PUBLISHED["vae"].items() if key != "_class_name"}
    yield "vae", AutoencoderKL(**{**vae, **kinds, **own})
    if sizes.t5:
        known = {key: value for key, value in PUBLISHED["text_encoder_3"].items() if key != "model_type"}
        yield "text_encoder_3", T5EncoderModel(T5Config(**{**known, "num_layers": sizes.t5}))


WAYS = {"down": "DownEncoder", "up": "UpDecoder"}


def positions(network: Any) -> Any:
    """Return a transformer's own table of positions."""
    import torch
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    width, size = network.config.caption_projection_dim, network.config.pos_embed_max_size
    with torch.device("cpu"):
        table = get_2d_sincos_pos_embed(
            width, size, base_size=network.config.sample_size // network.config.patch_size, output_type="pt"
        )
        return table.float().unsqueeze(0).numpy()


def save_letters(folder: Path) -> None:
    """Save a tokenizer of T5's kind whose words are letters: what is measured needs ids, not their meaning."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted({letter for prompt in PROMPTS for letter in prompt} - {" "})
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
