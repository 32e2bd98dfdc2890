"""Tiny checkpoints of SD 3 and 3.5 with random weights, in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import END, START, WORDS, clip_vocabulary, save_tokenizer
from tests.tiny_t5 import save_t5, save_unigram

CLIPS: tuple[dict[str, Any], ...] = (  # the second is the larger one, as in published checkpoints
    {"hidden_size": 16, "num_attention_heads": 2, "projection_dim": 24, "hidden_act": "quick_gelu"},
    {"hidden_size": 24, "num_attention_heads": 3, "projection_dim": 40, "hidden_act": "gelu"},
)
TRANSFORMER: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,  # wider than both text encoders together
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
}
THIRD = {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}
DUAL: dict[str, Any] = {"num_layers": 3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}  # 3.5 medium's kind
INPAINTING = {"in_channels": 33}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def make_sd3(
    directory: Path,
    *,
    t5: bool = False,
    dual: bool = False,
    inpainting: bool = False,
    seed: int = 0,
    shift: float = 3.0,
) -> Path:
    """Save a whole tiny checkpoint as a diffusers directory. Returns the directory.

    t5: with a third text encoder; dual: the kind of transformer that 3.5 medium has
    inpainting: its transformer takes mask and masked image too
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary(WORDS)
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        save_tokenizer(directory / name, vocabulary, merges, pad=pad)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = [_clip(sizes, vocabulary) for sizes in CLIPS]
        transformer = SD3Transformer2DModel(
            **TRANSFORMER | (DUAL if dual else {}) | (INPAINTING if inpainting else {})
        ).eval()
        _spread(transformer)
        vae = AutoencoderKL(**VAE).eval()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=texts[0],
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        text_encoder_2=texts[1],
        tokenizer_2=CLIPTokenizer.from_pretrained(directory / "tokenizer_2"),
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(directory)
    if t5:
        save_t5(directory / "text_encoder_3", seed=seed, d_model=TRANSFORMER["joint_attention_dim"])
        save_unigram(directory / "tokenizer_3", normalised=False)  # which transformers 5 would not read
        index = json.loads((directory / "model_index.json").read_text())
        index |= {name: ["transformers", kind] for name, kind in THIRD.items()}
        (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return directory


# Kinds of ControlNets: of SD 3 as InstantX trained them, of 3.5 medium, and of 3.5 large, which reads no text and sees
# patches where the transformer does.
CONTROLNETS: dict[str, dict[str, Any]] = {
    "pooled as zeros": {"num_layers": 2},
    "pooled": {"num_layers": 1, "force_zeros_for_pooled_projection": False, "qk_norm": "rms_norm"},
    "without text": {
        "num_layers": 3,
        "force_zeros_for_pooled_projection": False,
        "joint_attention_dim": None,
        "use_pos_embed": False,
        "pos_embed_type": None,
        "pos_embed_max_size": None,
    },
}


def save_sd3_controlnet(directory: Path, *, kind: str, seed: int = 1) -> Path:
    """Save a tiny ControlNet of one of `CONTROLNETS`. A new one adds nothing, and this one much."""
    import torch
    from diffusers import SD3ControlNetModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SD3ControlNetModel(**TRANSFORMER | CONTROLNETS[kind]).eval()
        _spread(network)
    network.save_pretrained(directory)
    return directory


def _clip(sizes: dict[str, Any], vocabulary: dict[str, int]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        intermediate_size=2 * sizes["hidden_size"],
        num_hidden_layers=3,
        max_position_embeddings=77,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        **sizes,
    )
    return CLIPTextModelWithProjection(config).eval()


def _spread(transformer: Any) -> None:
    """Give the weights of a transformer, some of which begin at zero, a size at which each of them says something."""
    import torch

    for weight in transformer.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def diffusers_sd3(directory: Path, kind: str = "StableDiffusion3Pipeline", *, t5: bool = True, **parts: Any) -> Any:
    """Open a checkpoint with one of diffusers' pipelines, and with these parts.

    t5: with its third text encoder, where it has one
    """
    import diffusers

    names = ("feature_extractor", "image_encoder")
    absent: dict[str, Any] = dict.fromkeys(names)
    if not t5 or not (directory / "text_encoder_3").is_dir():
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = getattr(diffusers, kind).from_pretrained(directory, **absent, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
