"""A checkpoint taken apart: its documents, and for each network where the weights lie and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Source = Literal["torch", "onnx"]
Layout = Literal["diffusers", "original"]
Part = Literal["text_encoder", "unet", "vae"]
# Whose weights a network has: half of a VAE is loaded from the whole.
PARTS: Mapping[str, Part] = {
    "text_encoder": "text_encoder",
    "unet": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
# The folder that a network's weights or graph are in, for each layout.
FOLDERS: Mapping[Source, Mapping[str, str]] = {
    "torch": PARTS,
    "onnx": {name: name for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to write the folder that a network is loaded from, where there is none as it is needed.

    config: the text of its config.json
    files: what holds the weights; files that hold other networks too are read in part
    layout: `original` for the names of the first Stable Diffusion, which single files have
    """

    part: Part
    config: str
    files: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A checkpoint before anybody has asked what it means.

    root: the directory or the file, for errors
    configs: the parsed config.json of each network
    networks: a folder that can be loaded as it is, or how to write one
    special_tokens: what the tokenizer's folder is not to decide
    files: whatever the export reads, by the name it has in the bundle's provenance
    options: choices that change the result, for the provenance
    """

    root: Path
    source: Source
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    networks: Mapping[str, Path | Recipe]
    tokenizer: Path
    files: Mapping[str, Path]
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
