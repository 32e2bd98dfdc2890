"""What PEFT says beside a LoRA's matrices: how strong they are, in a file or in the metadata of diffusers' files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from latentrt.engines.bundle.parsing import ParseError, decode
from latentrt.engines.bundle.safetensors_header import TensorFile
from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.names import PEFT_PREFIX, plain_module

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the file's metadata: PEFT's config for each network, as one object
KINDS = (None, "LORA", "LOHA", "LOKR")
# How the matrices began; all others take something out of the base's weights first, and fit only what is left of them.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """PEFT's config of one network. where: which file says it"""

    where: str
    fields: Mapping[str, Any]

    @property
    def magnitudes(self) -> bool:
        """Tell whether it was trained as DoRA."""
        return bool(self.fields.get("use_dora"))

    def scale(self, module: str, rank: int | None) -> float:
        """Return the scale of a module's change. rank: of its matrices, None if only the config can tell it"""
        rank = rank or int(self._number("rank_pattern", module, self.fields.get("r")))
        alpha = self._number("alpha_pattern", module, self.fields.get("lora_alpha", self.fields.get("alpha", rank)))
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _number(self, patterns: str, module: str, default: Any) -> float:
        """Return a number that may differ between modules. Raises CheckpointError if it is none, or not positive."""
        own = {plain_module(name): value for name, value in (self.fields.get(patterns) or {}).items()}
        value = next((value for name, value in own.items() if f"_{module}".endswith(f"_{name}")), default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.where}: found {value!r} as the rank or alpha of {module}, expected a number")
        return float(value)


def read_config(file: TensorFile, part: str) -> PeftConfig | None:
    """Return what PEFT said of how a network was trained, None if it said nothing.

    Raises CheckpointError if it is missing, or says that the weights mean something else.
    """
    if DIFFUSERS_CONFIG in file.metadata:
        where, start = f"{file.path}: its metadata", f"{part}."
        document = _object(file.metadata[DIFFUSERS_CONFIG], where)
        found = {key.removeprefix(start): value for key, value in document.items() if key.startswith(start)}
        return _checked(PeftConfig(where=where, fields=found)) if found else None
    if not any(PEFT_PREFIX in key for key in file.tensors):
        return None
    path = file.path.with_name(PEFT_CONFIG)
    if not path.is_file():  # without it the LoRA would be too strong or too weak
        raise CheckpointError(f"{file.path} is PEFT's, and its scale is in {path}, which is missing; put it there")
    return _checked(PeftConfig(where=str(path), fields=_object(path.read_bytes(), str(path))))


def _checked(config: PeftConfig) -> PeftConfig:
    kind, beginning = (config.fields.get(name) for name in ("peft_type", "init_lora_weights"))
    if kind not in KINDS:
        raise CheckpointError(f"{config.where}: it is PEFT's {kind}, expected one of LORA, LOHA and LOKR")
    if beginning not in BEGINNINGS:
        raise CheckpointError(
            f"{config.where}: found init_lora_weights {beginning!r}, which changes the base's weights too; "
            "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _object(content: bytes | str, where: str) -> dict[str, Any]:
    try:
        document = decode(content, strict=False)
    except ParseError as error:
        raise CheckpointError(f"{where} {error}; download the LoRA again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is not a JSON object; download the LoRA again")
    return document
