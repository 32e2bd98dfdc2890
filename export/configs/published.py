"""The configurations that the published checkpoints of each family have, for weights that come without any.

A single file holds no configs. Whatever follows a published architecture has these; anything else needs --config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.engines.bundle.manifest import Family
from latentrt.engines.bundle.training import Prediction
from latentrt.export.configs.families import FAMILIES

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
_CLIP_L: Config = {
    **_TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_OPEN_CLIP_G: Config = {
    **_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_UNET_XL: Config = {
    **_UNET,
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
_VAE_XL: Config = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_SCHEDULER_XL: Config = {
    **_SCHEDULER,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
# Of SD 3 and 3.5; the transformer's own is read from its weights, and these are the rest.
_CLIP_L_3: Config = {**_CLIP_L, "architectures": ["CLIPTextModelWithProjection"]}
_T5: Config = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
CONFIGS: Mapping[Family, Mapping[str, Config]] = {
    "sd1": {
        "text_encoder": _CLIP_L,
        "unet": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE,
        "scheduler": {**_SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
        "index": {"_class_name": "StableDiffusionPipeline"},
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
        "index": {"_class_name": "StableDiffusionPipeline"},
    },
    "sdxl": {
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_G,
        "unet": {
            **_UNET_XL,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _VAE_XL,
        "scheduler": _SCHEDULER_XL,
        "index": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    },
    "sdxl_refiner": {
        "text_encoder_2": _OPEN_CLIP_G,
        "unet": {
            **_UNET_XL,
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": 4,
            "attention_head_dim": [6, 12, 24, 24],
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
        "vae": _VAE_XL,
        "scheduler": _SCHEDULER_XL,
        "index": {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
        },
    },
    "sd3": {
        "text_encoder": _CLIP_L_3,
        "text_encoder_2": _OPEN_CLIP_G,
        "text_encoder_3": _T5,
        "transformer": {"_class_name": "SD3Transformer2DModel", "sample_size": 128},
        "vae": {
            **_VAE,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "force_upcast": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        "index": {"_class_name": "StableDiffusion3Pipeline"},
    },
}
DEFAULT_SAMPLE_SIZE = 64


def sample_size(family: Family, prediction: Prediction) -> int:
    """Return how many latents a side the pictures have that a published checkpoint draws."""
    known = CONFIGS.get(family, {}).get(FAMILIES[family].denoiser, {}).get("sample_size")
    return known or FAMILIES[family].sample_sizes.get(prediction, DEFAULT_SAMPLE_SIZE)


# Where the vocabulary, the same for all, may lie in the hub's cache: a repository and a folder of it.
VOCABULARIES = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
