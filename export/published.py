"""The configurations that the published checkpoints of each family have, for weights that come without any.

A single file holds no configs. Whatever follows a published architecture has these; anything else needs --config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.engines.manifest import Family, Prediction

Config = Mapping[str, Any]

_WIDTHS = [320, 640, 1280, 1280]
_VAE_WIDTHS = [128, 256, 512, 512]
_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": _WIDTHS,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": _VAE_WIDTHS,
    "down_block_types": ["DownEncoderBlock2D"] * len(_VAE_WIDTHS),
    "up_block_types": ["UpDecoderBlock2D"] * len(_VAE_WIDTHS),
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_TEXT: Config = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-05,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_SCHEDULER: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
CONFIGS: Mapping[Family, Mapping[str, Config]] = {
    "sd1": {
        "text_encoder": {
            **_TEXT,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
        },
        "unet": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE,
        "scheduler": {**_SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
    },
    "sd2": {
        "text_encoder": {
            **_TEXT,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,  # of 24: the last one is never used
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
        "unet": {
            **_UNET,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,  # as in 2.1, whose attention leaves float16's range
        },
        "vae": _VAE,
        "scheduler": {**_SCHEDULER, "_class_name": "DDIMScheduler"},
    },
}
# Latents a side of the pictures it was trained on, by what it predicts.
SAMPLE_SIZES: Mapping[Family, Mapping[Prediction, int]] = {"sd1": {}, "sd2": {"v_prediction": 96}}
DEFAULT_SAMPLE_SIZE = 64
PADDING: Mapping[Family, str] = {"sd1": "<|endoftext|>", "sd2": "!"}
# Where the vocabulary, the same for both, may lie in the hub's cache: a repository and a folder of it.
VOCABULARIES = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
