"""A tiny checkpoint of Stable Video Diffusion with random weights, in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "num_attention_heads": (1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
    "num_frames": 6,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "sample_size": 32,
}
VISION: dict[str, Any] = {  # diffusers' pipeline shows it pictures of 224x224, whatever it says
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
SCHEDULER: dict[str, Any] = {  # as published
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "interpolation_type": "linear",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "steps_offset": 1,
}


def make_svd(directory: Path, *, seed: int = 0) -> Path:
    """Save a whole tiny checkpoint as a diffusers directory: kinds as published, sizes not. Returns it."""
    import torch
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNetSpatioTemporalConditionModel(**UNET).eval()
        vae = AutoencoderKLTemporalDecoder(**VAE).eval()
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
        for network in (unet, vae.decoder):
            _mix(network)
    StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=vision,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(directory)
    return directory


def _mix(network: Any) -> None:
    """Have what sees several frames say as much as what sees one, and change what it is given: new ones do not."""
    import torch

    for name, weight in network.named_parameters():
        if name.endswith("mix_factor"):
            torch.nn.init.zeros_(weight)  # a half of each
        elif "temporal" in name and weight.ndim > 1 and ("conv2" in name or "proj_out" in name or "to_out" in name):
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
