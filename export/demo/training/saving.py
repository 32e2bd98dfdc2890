"""Writing of the demo checkpoint in the layout of Stable Diffusion 1.x, in float16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from latentrt.export.demo.training.tokens import CONTEXT, END, START

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
_PREFIX = "text_model."


def save_checkpoint(
    folder: Path,
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` reads.

    The networks come out in float16; those passed in change their precision too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "model_index.json", INDEX)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_tokenizer(tokenizer, folder / "tokenizer")
    unet.half().save_pretrained(folder / "unet")
    vae.half().save_pretrained(folder / "vae")
    text_encoder.half().save_pretrained(folder / "text_encoder")
    prefix_keys(folder / "text_encoder" / "model.safetensors")
    tidy_settings(folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer with the files that older readers expect as well."""
    tokenizer.save_pretrained(folder)
    contents = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _write_json(folder / "vocab.json", contents["vocab"])
    merges = "\n".join(" ".join(pair) for pair in contents["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CONTEXT,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def prefix_keys(path: Path) -> None:
    """Give the weights of a text encoder the names of real checkpoints: transformers 5 drops the prefix."""
    weights: dict[str, torch.Tensor] = load_file(path)
    named = {name if name.startswith(_PREFIX) else _PREFIX + name: weights[name] for name in weights}
    save_file(named, path, metadata={"format": "pt"})


def tidy_settings(folder: Path) -> None:
    """Drop where networks were loaded from, and have the text encoder read in float32 as the others are."""
    for path in folder.glob("*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if settings.pop("dtype", None):
            settings["torch_dtype"] = "float32"
        _write_json(path, settings)


def _write_json(path: Path, contents: object) -> None:
    text = json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
