"""Manifests of schema 1, in which a component's name alone says what it is. Nothing else knows what the names meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASE, REFINER = "unet", "refiner"
ROLES: Mapping[str, str] = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    BASE: "denoiser",
    REFINER: "denoiser",
    "vae_encoder": "encoder",
    "vae_decoder": "decoder",
    "tiny_decoder": "tiny_decoder",
}
CONTROL_PREFIXES: Mapping[str, str] = {"controlnet_": "controlnet", "adapter_": "adapter"}  # by how the names begin
SHARED = ("original_height", "original_width", "crop_top", "crop_left")
SIZES: Mapping[int, tuple[str, ...]] = {  # by how many numbers a denoiser is told beside the text
    6: (*SHARED, "target_height", "target_width"),
    5: (*SHARED, "aesthetic_score"),
}
DENOISER_KEYS = ("text_encoders", "zero_negative")  # of the only denoiser, or of the first
DEFAULT_ENCODERS = [{"component": "text_encoder", "tokenizer": "tokenizer"}]  # of a manifest that names none


def upgrade(document: object) -> object:
    """Return a decoded manifest of schema 1 as one of schema 2; anything else as it is, for its reader to judge.

    A component whose name is not known here gets no role, which the reader then misses.
    """
    if not isinstance(document, dict) or document.get("schema_version") != 1:
        return document
    components = document.get("components")
    if not isinstance(components, dict):
        return document
    kept = {key: value for key, value in document.items() if key not in (*DENOISER_KEYS, REFINER)}
    first = {"text_encoders": DEFAULT_ENCODERS, **{key: document[key] for key in DENOISER_KEYS if key in document}}
    denoisers = {BASE: first} | ({REFINER: document[REFINER]} if document.get(REFINER) is not None else {})
    return kept | {
        "schema_version": 2,
        "components": {name: _component(name, component) for name, component in components.items()},
        "denoisers": {
            name: {**spec, "sizes": _sizes(components.get(name))} if isinstance(spec, dict) else spec
            for name, spec in denoisers.items()
        },
    }


def _component(name: str, component: object) -> object:
    if not isinstance(component, dict):
        return component
    if name in ROLES:
        return component | {"role": ROLES[name]}
    for start, role in CONTROL_PREFIXES.items():
        if name.startswith(start):
            return component | {"role": role, "of": BASE, "control": name.removeprefix(start)}
    return component


def _sizes(component: Any) -> list[str]:
    """Return what the numbers beside the text are."""
    try:
        counts = [tensor["shape"][1] for tensor in component["inputs"] if tensor["name"] == "time_ids"]
        return list(SIZES[counts[0]]) if counts else []
    except (TypeError, KeyError, IndexError):  # the reader says what is wrong with it
        return []
