"""What models look like: tables by which a checkpoint is recognised from its configs, or from a file's keys and shapes.

Names of models are what is printed; only what `engines.manifest.Family` lists can be exported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from latentrt.engines.bundle.manifest import Defaults, Family, TextSpec
from latentrt.engines.bundle.safetensors_header import TensorFile
from latentrt.engines.bundle.training import Prediction

SUPPORTED = "Stable Diffusion 1.x, 2.x, XL, 3.x or Stable Video Diffusion"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """What a family's checkpoints have in common, and what diffusers' pipelines for it do.

    text_encoders: those that its denoiser takes, in the order in which they join
    denoiser: the folder of it
    rows: of the table of components, for networks whose row is not called as they are
    sized: whether its UNet is told the sizes of pictures beside the text (addition_embed_type text_time)
    pipeline: diffusers' class, for graphs that optimum opens; None where those have other names of tensors
    activation: of its text encoder, where that alone tells it from another family
    refines: the family whose pictures it finishes
    enlarges: whether its pipelines take a side below 64 latents for a mistake where an old version wrote it
    normalises: whether its pipelines read the mean and the deviation of latents in a VAE's config
    shifts: whether they read the shift there
    corrections, inpainting_corrections: what its pipelines make of a scheduler's config, whatever that says
    wide: whether its pipelines draw 16:9, with as many pixels as a square of its sample size has
    shown: the image encoder whose embedding stands for a text: that of its kind of denoiser
    flows: whether its pipelines are for flows: they tell a scheduler how far the size of a picture shifts its steps,
        and take the step whole that a strength ends in
    sample_sizes: how many latents a side it draws by what its UNet predicts, where it was published with several kinds
    padding: the word that fills up a short text, by tokenizer
    defaults: what its pipelines take where a call says nothing
    separate: what its text encoders are called where they come in files of their own, which single files may lack
    """

    text_encoders: tuple[TextSpec, ...]
    padding: Mapping[str, str]
    pipeline: str | None = None
    denoiser: str = "unet"
    rows: Mapping[str, str] = field(default_factory=dict)
    sized: bool = False
    activation: str | None = None
    refines: Family | None = None
    separate: Mapping[str, str] = field(default_factory=dict)
    enlarges: bool = False
    normalises: bool = False
    shifts: bool = False
    corrections: Mapping[str, Any] = field(default_factory=dict)
    inpainting_corrections: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False
    shown: str | None = None
    flows: bool = False
    sample_sizes: Mapping[Prediction, int] = field(default_factory=dict)
    defaults: Defaults = field(default_factory=Defaults)

    @property
    def networks(self) -> tuple[str, ...]:
        """Return the text encoders, by component, that none of its checkpoints is without."""
        return tuple(text.component for text in self.text_encoders if text.component and not text.optional)

    def held(self, components: Collection[str]) -> tuple[TextSpec, ...]:
        """Return how its text encoders join where a checkpoint has these: zeros stand for what it does not have."""
        absent: dict[str, Any] = {"component": None, "tokenizer": None, "optional": False}
        return tuple(
            text if text.component in components else msgspec.structs.replace(text, **absent)
            for text in self.text_encoders
        )


# SDXL's denoisers read the layer before the last, whose states have had no norm.
_CLIP = TextSpec(component="text_encoder", tokenizer="tokenizer")
_FIRST = msgspec.structs.replace(_CLIP, skip=1)
_SECOND = TextSpec(component="text_encoder_2", tokenizer="tokenizer_2", skip=1, pooled="text_embeds")
_THIRD = TextSpec(component="text_encoder_3", tokenizer="tokenizer_3", join="length", tokens=256, optional=True)
_OLD: dict[str, Any] = {
    "text_encoders": (_CLIP,),
    "pipeline": "StableDiffusionPipeline",
    "enlarges": True,
    "corrections": {"steps_offset": 1, "clip_sample": False},
    "inpainting_corrections": {"steps_offset": 1, "skip_prk_steps": True},
}
FAMILIES: Mapping[Family, FamilyRow] = {
    # A text encoder's activation tells OpenAI's CLIP of SD 1.x from OpenCLIP of SD 2.x, whatever its size.
    "sd1": FamilyRow(**_OLD, activation="quick_gelu", padding={"tokenizer": "<|endoftext|>"}),
    "sd2": FamilyRow(
        **_OLD, activation="gelu", padding={"tokenizer": "!"}, sample_sizes={"epsilon": 64, "v_prediction": 96}
    ),
    "sdxl": FamilyRow(
        text_encoders=(_FIRST, _SECOND),
        pipeline="StableDiffusionXLPipeline",
        padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        sized=True,
        normalises=True,
    ),
    "sdxl_refiner": FamilyRow(
        text_encoders=(_SECOND,),
        pipeline="StableDiffusionXLImg2ImgPipeline",
        padding={"tokenizer_2": "!"},
        sized=True,
        normalises=True,
        refines="sdxl",
    ),
    "sd3": FamilyRow(
        text_encoders=(msgspec.structs.replace(_FIRST, pooled="text_embeds"), _SECOND, _THIRD),
        padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        denoiser="transformer",
        rows={"text_encoder": "projected_text_encoder"},
        separate={"text_encoder": "CLIP L (clip_l.safetensors)", "text_encoder_2": "CLIP G (clip_g.safetensors)"},
        shifts=True,
        flows=True,
        defaults=Defaults(guidance=7.0, strength=0.6, masked_strength=0.6),
    ),
    "svd": FamilyRow(
        text_encoders=(),
        padding={},
        rows={"unet": "video_unet", "vae_decoder": "video_decoder", "vae_encoder": "video_encoder"},
        wide=True,
        sample_sizes={"v_prediction": 96},
        shown="image_encoder",
    ),
}
# The text encoders that a checkpoint and an export may be without.
OPTIONAL_TEXT = tuple(
    text.component for row in FAMILIES.values() for text in row.text_encoders if text.optional and text.component
)
# Recognised in a directory and not supported: by the class of a network, and by a key of the UNet's config.
OTHER_NETWORKS = {
    "ChatGLMModel": "Kolors",
    "ORTTransformer": "a transformer in graphs that optimum exported",
    "FluxTransformer2DModel": "Flux",
    "Flux2Transformer2DModel": "Flux 2",
    "PixArtTransformer2DModel": "PixArt",
    "SanaTransformer2DModel": "Sana",
    "StableCascadeUNet": "Stable Cascade",
    "QwenImageTransformer2DModel": "Qwen-Image",
}
# The classes of a denoiser that are supported, by its folder; UNets are told apart by their configs.
DENOISER_CLASSES: Mapping[str, tuple[str, ...]] = {"transformer": ("SD3Transformer2DModel",)}
OTHER_UNETS = (  # (key of unet/config.json, the value besides null that is supported, what any other is)
    ("addition_embed_type", "text_time", "a UNet with added embeddings"),
    ("class_embed_type", None, "a UNet with class embeddings"),
    ("num_class_embeds", None, "a UNet with class embeddings (an upscaler)"),
    ("encoder_hid_dim_type", None, "a UNet with image prompts"),
)
# Files of a UNet in a directory that holds it in no form that is read, and what that form is.
OTHER_FORMATS = {
    "openvino_model.xml": "graphs for OpenVINO",
    "diffusion_flax_model.msgpack": "weights for Flax",
}
# A pipeline's class in model_index.json begins with one of these; the first that fits, so the longest first.
PIPELINES: tuple[tuple[str, str], ...] = (
    ("StableDiffusionXL", "Stable Diffusion XL"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("StableDiffusionUpscale", "Stable Diffusion's upscaler"),
    ("StableDiffusionLatentUpscale", "Stable Diffusion's latent upscaler"),
    ("StableDiffusionDepth", "Stable Diffusion 2 with depth"),
    ("StableDiffusionInstructPix2Pix", "InstructPix2Pix"),
    ("StableUnCLIP", "Stable unCLIP"),
    ("StableVideo", "Stable Video Diffusion"),
    ("StableCascade", "Stable Cascade"),
    ("Flux2", "Flux 2"),
    ("Flux", "Flux"),
    ("Wuerstchen", "Wuerstchen"),
    ("PixArt", "PixArt"),
    ("Sana", "Sana"),
    ("QwenImage", "Qwen-Image"),
    ("Kandinsky", "Kandinsky"),
    ("HunyuanDiT", "Hunyuan-DiT"),
    ("AuraFlow", "AuraFlow"),
    ("Lumina", "Lumina"),
    ("ZImage", "Z-Image"),
    ("Kolors", "Kolors"),
    ("Chroma", "Chroma"),
    ("LatentConsistencyModel", "a latent consistency model"),
    ("IF", "DeepFloyd IF"),
)
# A file with one of these keys, with or without the prefix that a whole checkpoint gives its denoiser, is that model.
DENOISER_PREFIX = "model.diffusion_model."
# What of Stable Video Diffusion's UNet no other has: its tensors lie among names of Stable Diffusion's.
VIDEO_KEY = "middle_block.1.time_stack.0.attn1.to_q.weight"
OTHER_DENOISER_KEYS: tuple[tuple[str, str], ...] = (
    (VIDEO_KEY, "Stable Video Diffusion in one file (give a directory in diffusers' layout, which is exported)"),
    ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "Stable Diffusion 3's transformer alone"),
    ("single_stream_modulation.lin.weight", "Flux 2"),
    ("distilled_guidance_layer.in_proj.bias", "Chroma"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
    ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "HunyuanVideo"),
    ("double_layers.0.attn.w2q.weight", "AuraFlow"),
    ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ("patchify_proj.weight", "LTX-Video"),
    ("layers.0.adaLN_modulation.0.weight", "Z-Image"),
    ("cap_embedder.0.weight", "Lumina 2"),
    ("head.modulation", "Wan"),
    ("clip_txt_mapper.weight", "Stable Cascade, stage C"),
    ("down_blocks.1.0.channelwise.0.weight", "Stable Cascade, stage B"),
    ("blocks.0.cross_attn.q_linear.weight", "Sana or PixArt"),
    ("encoder_hid_proj.weight", "Kolors"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A Stable Diffusion by the sizes of its UNet.

    family: None if it cannot be exported from a single file
    channels: behind its first convolution
    added: how many numbers it takes beside the text, 0 where it takes none
    """

    label: str
    family: Family | None
    channels: int
    added: int = 0


# By the width of the text that the UNet attends to.
BASES: Mapping[int, Base] = {
    768: Base(label="Stable Diffusion 1.x", family="sd1", channels=320),
    1024: Base(label="Stable Diffusion 2.x", family="sd2", channels=320),
    1280: Base(label="Stable Diffusion XL refiner", family="sdxl_refiner", channels=384, added=2560),
    2048: Base(label="Stable Diffusion XL", family="sdxl", channels=320, added=2816),
}
TRANSFORMER = Base(label="Stable Diffusion 3.x", family="sd3", channels=16)  # whose config is read from its file
INPAINTING = 9
INPUTS: Mapping[int, str] = {  # channels that a UNet takes, where it draws four
    5: "with a depth map",
    7: "an upscaler",
    8: "an editor of pictures (InstructPix2Pix)",
    INPAINTING: "for inpainting",
}
VIDEOS = Base(label="Stable Video Diffusion", family="svd", channels=320, added=768)
LABELS: Mapping[Family, str] = {
    base.family: base.label for base in (*BASES.values(), TRANSFORMER, VIDEOS) if base.family
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A kind of file that is not a whole checkpoint: any key that begins or ends as said, or has it, gives it away.

    option: how it is given beside the checkpoint that it belongs to, empty if it cannot be
    """

    label: str
    option: str = ""
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    has: str | None = None

    def fits(self, file: TensorFile) -> bool:
        """Say whether a file is of this kind."""
        return any(
            key.startswith(self.starts) or key.endswith(self.ends) or (self.has is not None and self.has in key)
            for key in file.tensors
        )


CONTROLNET = "ControlNet"
LORA = "LoRA"  # and related kinds: engines/lora/kinds.py
LORA_ENDS = tuple(f"{name}.weight" for name in ("lora_down", "lora.down", "lora_linear_layer.down"))
LORA_PARTS = (".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".dora_scale", ".lora_magnitude_vector", ".diff", ".w_norm")
LORA_STARTS = ("lora_unet_", "lora_te", "lycoris_")
PARTS: tuple[Part, ...] = (
    Part(label=LORA, option="--lora FILE", starts=LORA_STARTS, ends=(*LORA_ENDS, *LORA_PARTS), has=".lora_A."),
    Part(label="IP-Adapter", option="--ip-adapter NAME=FILE", starts=("ip_adapter.", "image_proj.")),
    Part(label="Control-LoRA", starts=("lora_controlnet",)),
    Part(label="ControlNet-LLLite", starts=("lllite_",)),
    Part(label="ControlNet Union", starts=("task_embedding", "control_model.task_embedding", "control_add_embedding.")),
    Part(
        label=CONTROLNET, option="--controlnet NAME=FILE", starts=("control_model.", "controlnet_", "input_hint_block.")
    ),
    Part(label="T2I-Adapter", option="--adapter NAME=FILE", starts=("adapter.", "body.0.")),
    Part(label="textual inversion embedding", starts=("emb_params", "string_to_param")),
    Part(
        label="tiny VAE (TAESD)",
        option="--tiny-vae DIRECTORY that holds its config.json beside the weights",
        starts=("encoder.layers.", "decoder.layers.", "taesd_", "3.conv.0."),
    ),
    Part(label="VAE", option="--vae FILE", starts=("encoder.conv_in.", "decoder.conv_in.")),
    Part(label="motion adapter (AnimateDiff)", option="--motion-adapter FILE", has=".motion_modules."),
    Part(label="UNet without text encoder and VAE", option="--unet FILE", starts=("down_blocks.0.", "input_blocks.0.")),
    Part(label="T5", option="--text-encoder FILE", starts=("encoder.block.0.",)),
    Part(label="text encoder", starts=("text_model.embeddings.", "embeddings.token_embedding.")),
)


def option_for(label: str) -> str:
    """Return how a kind of file is given beside a checkpoint, empty if it cannot be."""
    return next((part.option for part in PARTS if part.label == label), "")


def name_pipeline(pipeline: str) -> str:
    """Return what model a pipeline's class draws with, or the class itself."""
    return next((label for start, label in PIPELINES if pipeline.startswith(start)), pipeline)
