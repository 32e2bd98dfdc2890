"""Tiny checkpoints with random weights in the layouts of SD 1.x and SD 2.x, for every test that needs a real model.

They differ wherever real ones do: the text encoder's activation, sizes and padding, linear projections, heads a
level, the VAE's factor and latent channels, the prediction type, the scheduler's class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WORDS = ["a", "red", "circle", "on", "blue", "café", "square"]
# The networks of SD 1.x and 2.x; SDXL's have a second text encoder.
NETWORKS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
START, END = "<|startoftext|>", "<|endoftext|>"

_TEXT: dict[str, dict[str, Any]] = {
    "sd1": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "hidden_act": "quick_gelu",
    },
    "sd2": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "projection_dim": 24,
        "hidden_act": "gelu",
    },
    "sdxl": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 32,
        "hidden_act": "quick_gelu",
    },
}
_TEXT_2: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "projection_dim": 40,
    "hidden_act": "gelu",
}
_UNET: dict[str, dict[str, Any]] = {
    "sd1": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
    "sd2": {
        "sample_size": 12,
        "in_channels": 6,
        "out_channels": 6,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 48,
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 80,
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
    },
}
# The same networks taking more: what an inpainting UNet and a latent consistency model add.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "inpainting": {"in_channels": 9},
    "lcm": {"time_cond_proj_dim": 16},
    "refiner": {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 5 * 8 + 40},
}
_VAE: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (8, 16, 16),
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "norm_num_groups": 4,
        "sample_size": 32,
    },
    "sd2": {
        "block_out_channels": (8, 16),
        "latent_channels": 6,
        "scaling_factor": 0.25,
        "norm_num_groups": 4,
        "sample_size": 24,
    },
    "sdxl": {
        "block_out_channels": (8, 16, 16),
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "norm_num_groups": 4,
        "sample_size": 32,
    },
}
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def save_tiny(directory: Path, *, family: str = "sd1", variant: str = "", seed: int = 0) -> Path:
    """Save a whole tiny checkpoint as a diffusers directory, as `save_pretrained` writes it. Returns the directory.

    variant: one of VARIANTS, for a UNet that takes more
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, merges = clip_vocabulary(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = CLIPTextModel(_text_config(_TEXT[family], vocabulary))
        if variant != "refiner":  # which was drawn all the same: then the second is that of the checkpoint it refines
            first.eval().save_pretrained(directory / "text_encoder")
            _prefix_keys(directory / "text_encoder" / "model.safetensors")
        if family == "sdxl":
            second = CLIPTextModelWithProjection(_text_config(_TEXT_2, vocabulary)).eval()
            second.save_pretrained(directory / "text_encoder_2")
        UNet2DConditionModel(**_UNET[family] | VARIANTS[variant]).eval().save_pretrained(directory / "unet")
        levels = len(_VAE[family]["block_out_channels"])
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        AutoencoderKL(**blocks, **_VAE[family]).eval().save_pretrained(directory / "vae")
    _scheduler(family).save_pretrained(directory / "scheduler")
    if variant != "refiner":
        save_tokenizer(directory / "tokenizer", vocabulary, merges, pad="!" if family == "sd2" else END)
    if family == "sdxl":
        save_tokenizer(directory / "tokenizer_2", vocabulary, merges, pad="!")
    _write_json(directory / "model_index.json", _model_index(family, variant))
    return directory


def save_controlnet(
    directory: Path, *, family: str = "sd1", seed: int = 1, reads: tuple[int, ...] | None = None
) -> Path:
    """Save a tiny ControlNet for a tiny checkpoint. A new one adds nothing, and this one much.

    reads: the channels of what reads the picture to follow, which halves it between them; None for the VAE's halvings
    """
    import torch
    from diffusers import ControlNetModel

    sizes = {k: v for k, v in _UNET[family].items() if k not in ("sample_size", "out_channels", "up_block_types")}
    reads = reads or (8, 16, 16)[: len(_VAE[family]["block_out_channels"])]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ControlNetModel(**sizes, conditioning_embedding_out_channels=reads).eval()
        zero = (
            network.controlnet_cond_embedding.conv_out,
            *network.controlnet_down_blocks,
            network.controlnet_mid_block,
        )
        for module in zero:
            for weight in module.parameters():
                torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(directory)
    return directory


def save_adapter(directory: Path, *, family: str = "sd1", seed: int = 1, channels: int = 3) -> Path:
    """Save a tiny T2I-Adapter for a tiny checkpoint. channels: of the pictures that it reads"""
    import torch
    from diffusers import T2IAdapter

    factor = 2 ** (len(_VAE[family]["block_out_channels"]) - 1)
    kind, cell = ("full_adapter_xl", 2 * factor) if family == "sdxl" else ("full_adapter", factor)
    sizes = {"channels": list(_UNET[family]["block_out_channels"]), "num_res_blocks": 1, "downscale_factor": cell}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = T2IAdapter(in_channels=channels, adapter_type=kind, **sizes).eval().requires_grad_(False)
        network.adapter.conv_in.weight *= 20  # an untrained one says little
    network.save_pretrained(directory)
    return directory


def save_motion(directory: Path, *, seed: int = 1, places: int = 24, middle: bool = False) -> Path:
    """Save a tiny motion adapter for a tiny SD 1 checkpoint. A new one moves nothing, and this one much.

    places: the most frames that it sees at once; middle: whether it has modules in the UNet's middle, as v1-5-2 has
    """
    import torch
    from diffusers import MotionAdapter

    unet = _UNET["sd1"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MotionAdapter(
            block_out_channels=unet["block_out_channels"],
            motion_layers_per_block=unet["layers_per_block"],
            motion_num_attention_heads=2,
            motion_norm_num_groups=unet["norm_num_groups"],
            motion_max_seq_length=places,
            use_motion_mid_block=middle,
        ).eval()
        for name, weight in network.named_parameters():
            if name.endswith("proj_out.weight"):
                torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(directory)
    return directory


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 24,
}


def save_image_encoder(directory: Path, *, seed: int = 3) -> Path:
    """Save a tiny CLIP vision model, as the published repository of IP-Adapters has one in models/image_encoder."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval().save_pretrained(directory)
    return directory


def save_ip_adapter(file: Path, *, family: str = "sd1", kind: str = "plain", seed: int = 5) -> Path:
    """Save a tiny IP-Adapter under the names of the published files, which says much. kind: plain, plus or full"""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    unet = UNet2DConditionModel(**_UNET[family])
    width = _UNET[family]["cross_attention_dim"]
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    shapes = {f"image_proj.{name}": shape for name, shape in _projection(kind, width).items()}
    for number, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        shapes |= {f"ip_adapter.{2 * number + 1}.{one}.weight": (hidden, width) for one in ("to_k_ip", "to_v_ip")}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {name: 0.3 * tensor if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    return file


def _projection(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what makes tokens of an image, under the published names."""
    embeds, states = VISION["projection_dim"], VISION["hidden_size"]

    def both(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    if kind == "plain":
        return both("proj", 4 * width, embeds) | both("norm", width)
    if kind == "full":
        return both("proj.0", states, states) | both("proj.2", width, states) | both("proj.3", width)
    inner, head = 40, 64
    found: dict[str, tuple[int, ...]] = {"latents": (1, 6, inner)}
    found |= both("proj_in", inner, states) | both("proj_out", width, inner) | both("norm_out", width)
    for layer in range(4):
        start = f"layers.{layer}"
        found |= both(f"{start}.0.norm1", inner) | both(f"{start}.0.norm2", inner)
        found |= {f"{start}.0.to_q.weight": (2 * head, inner), f"{start}.0.to_kv.weight": (4 * head, inner)}
        found |= {f"{start}.0.to_out.weight": (inner, 2 * head)} | both(f"{start}.1.0", inner)
        found |= {f"{start}.1.1.weight": (4 * inner, inner), f"{start}.1.3.weight": (inner, 4 * inner)}
    return found


def _text_config(sizes: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=77,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        **sizes,
    )


def save_tokenizer(directory: Path, vocabulary: Mapping[str, int], merges: list[str], *, pad: str) -> None:
    """Write the four files that the tokenizers of published SD 1.x and 2.x checkpoints consist of."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "vocab.json", dict(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    _write_json(directory / "special_tokens_map.json", special)
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    _write_json(directory / "tokenizer_config.json", config)


def clip_vocabulary(words: list[str]) -> tuple[dict[str, int], list[str]]:
    """Make a byte-level CLIP vocabulary in which each given word becomes few tokens. Returns entries and merges."""
    letters = byte_letters()
    merges: list[str] = []
    for word in words:
        pieces = ["".join(letters[byte] for byte in letter.encode()) for letter in word]
        symbols = [*pieces[:-1], pieces[-1] + "</w>"]
        while len(symbols) > 1:
            pair = f"{symbols[0]} {symbols[1]}"
            if all(len(piece) == 1 for piece in pieces) and pair not in merges:
                merges.append(pair)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    printable = sorted(letters.values(), key=lambda letter: (ord(letter) > 255, letter))
    entries = [*printable, *(f"{letter}</w>" for letter in printable)]
    entries = [*dict.fromkeys([*entries, *(merge.replace(" ", "") for merge in merges)]), START, END]
    return {entry: number for number, entry in enumerate(entries)}, merges


def byte_letters() -> dict[int, str]:
    """One printable letter for each byte: its own where it has one, the letters from 256 on for the others."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _prefix_keys(file: Path) -> None:
    """Write the keys that published checkpoints have: transformers 5 leaves out a prefix that version 4 needs."""
    from safetensors.torch import load_file, save_file

    prefix = "text_model."
    tensors = {prefix + key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _scheduler(family: str) -> Any:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

    make: Mapping[str, Callable[[], Any]] = {
        "sd1": lambda: PNDMScheduler(
            **{k: v for k, v in _SCHEDULE.items() if k != "clip_sample"}, skip_prk_steps=True, steps_offset=1
        ),
        "sd2": lambda: DDIMScheduler(
            **_SCHEDULE, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        "sdxl": lambda: EulerDiscreteScheduler(
            **{k: v for k, v in _SCHEDULE.items() if k != "clip_sample"}, steps_offset=1, timestep_spacing="leading"
        ),
    }
    return make[family]()


def _model_index(family: str, variant: str) -> dict[str, Any]:
    if family == "sdxl":
        return _xl_index(refiner=variant == "refiner")
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(_scheduler(family)).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _xl_index(*, refiner: bool) -> dict[str, Any]:
    first: dict[str, list[str | None]] = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": not refiner,
        "image_encoder": [None, None],
        **({"requires_aesthetics_score": True} if refiner else {}),
        "scheduler": ["diffusers", type(_scheduler("sdxl")).__name__],
        **{name: [None, None] if refiner else entry for name, entry in first.items()},
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
