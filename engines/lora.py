"""LoRA files, read with no framework: low-rank changes of weights, matched with the weights that a network has.

W' = W + strength * alpha / rank * up @ down (arXiv:2106.09685), where convolutions are matrices of their outputs by
all else.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.engines.documents import decode
from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora_names import PEFT_PREFIX, Role, from_original, plain_module, split_key
from latentrt.engines.parsing import ParseError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_files import TensorFile, read_header, weights_format

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the file's metadata: PEFT's config for each network, as one object


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to one weight: up @ down, (outputs, everything else) as float32, times a scale."""

    up: Array
    down: Array
    scale: float

    def delta(self, shape: tuple[int, ...], *, strength: float) -> Array:
        """Return what is added to a weight of this shape, float32."""
        return np.asarray((self.up @ (self.down * np.float32(strength * self.scale))).reshape(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA file whose names are understood; its tensors are read when a change is asked for.

    modules: for each network, each module's keys by their role
    """

    file: TensorFile
    modules: Mapping[str, Mapping[str, Mapping[Role, str]]]

    @property
    def path(self) -> Path:
        """Return where the file lies."""
        return self.file.path

    def match(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Find the weights of a network that the file changes: {weight: module}.

        shapes: of every weight of the network, by the name that diffusers or transformers gives it
        Raises CheckpointError where a module fits no weight, or not its shape.
        """
        weights = {plain_module(name.removesuffix(".weight")): name for name in shapes if name.endswith(".weight")}
        resnets = len({name for name in weights if re.fullmatch(r"down_blocks_0_resnets_\d+_conv1", name)})
        found: dict[str, str] = {}
        strangers = []
        for module in self.modules.get(part, {}):
            name = weights.get(module) or weights.get(from_original(module, resnets=max(resnets, 1)))
            if name is None:
                strangers.append(module)
            elif name in found:
                raise CheckpointError(f"{self.path} changes {name} twice, as {found[name]} and as {module}")
            else:
                found[name] = module
        if strangers:
            raise CheckpointError(self._misfit(part, strangers))
        for name, module in found.items():
            self._check(part, module, name, shapes[name])
        return found

    def _misfit(self, part: str, strangers: list[str]) -> str:
        base = self.file.metadata.get("ss_base_model_version")
        made = f"; its metadata say that it was made for {base}" if base else ""
        return (
            f"{self.path}: {len(strangers)} of the {len(self.modules[part])} modules that it changes are not in this "
            f"checkpoint's {part} ({', '.join(strangers[:3])}){made}; give a LoRA that was made for its family"
        )

    def _check(self, part: str, module: str, name: str, shape: tuple[int, ...]) -> None:
        keys = self.modules[part][module]
        up, down = (self.file.tensors[keys[role]].shape for role in ("up", "down"))
        mid = self.file.tensors[keys["mid"]].shape if "mid" in keys else None
        kernel = math.prod(mid[2:]) if mid else 1
        ranks = {up[1], down[0], *(mid[:2] if mid else ())}
        fits = up[0] == shape[0] and math.prod(down[1:]) * kernel == math.prod(shape[1:]) and math.prod(up[2:]) == 1
        if len(ranks) != 1 or not fits or 0 in ranks:
            shapes = " and ".join(str(self.file.tensors[keys[role]].shape) for role in keys if role != "alpha")
            raise CheckpointError(
                f"{self.path}: {module} has the shapes {shapes}, which do not fit {name} of shape {shape}; "
                "give a LoRA that was made for this checkpoint's family"
            )

    def rank(self, part: str, module: str) -> int:
        """Return the rank of one module's change."""
        return self.file.tensors[self.modules[part][module]["down"]].shape[0]

    def change(self, part: str, module: str) -> Change:
        """Read one module's change."""
        keys = self.modules[part][module]
        down, up = (self.file.read_float32(keys[role]) for role in ("down", "up"))
        rank = down.shape[0]
        if "mid" in keys:  # a convolution of rank by rank between the two, which are 1x1
            mid = self.file.read_float32(keys["mid"])
            down = np.einsum("rshw,si->rihw", mid, down.reshape(rank, -1))
        return Change(up=up.reshape(-1, rank), down=down.reshape(rank, -1), scale=self._scale(part, module, rank))

    def _scale(self, part: str, module: str, rank: int) -> float:
        """Return alpha / rank, 1 where the file has no alpha."""
        key = self.modules[part][module].get("alpha")
        if key is not None:
            return float(self.file.read_float32(key).reshape(())) / rank
        config = _peft_config(self.file, part)
        if not config:
            return 1.0
        patterns = {plain_module(name): alpha for name, alpha in (config.get("alpha_pattern") or {}).items()}
        own = (alpha for name, alpha in patterns.items() if f"_{module}".endswith(f"_{name}"))
        alpha = next(own, config.get("lora_alpha", rank))
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def find_deltas(
    lora: Lora, part: str, shapes: Mapping[str, tuple[int, ...]], *, strength: float
) -> dict[str, Callable[[], Array]]:
    """Find what a file adds to each weight of a network, computed when it is asked for: float32, of the weight's shape.

    shapes, raises: as in `Lora.match`
    """
    return {
        name: functools.partial(_delta, lora, part, module, shapes[name], strength)
        for name, module in lora.match(part, shapes).items()
    }


def _delta(lora: Lora, part: str, module: str, shape: tuple[int, ...], strength: float) -> Array:
    return lora.change(part, module).delta(shape, strength=strength)


def split_strength(text: str, *, option: str = "--lora") -> tuple[str, float]:
    """Read `file` or `file:0.8`. Raises CheckpointError."""
    path, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return text, 1.0
    if not path or not math.isfinite(strength):
        raise CheckpointError(f"{option} '{text}': expected a file and a number, as in style.safetensors:0.8")
    return path, strength


def read_lora(path: Path) -> Lora:
    """Read the names of a LoRA file. Raises CheckpointError where it is none, or of a kind that is not supported."""
    if not path.is_file():
        raise CheckpointError(f"there is no LoRA at '{path}'; give a safetensors file")
    if weights_format(path) != "safetensors":
        raise CheckpointError(f"'{path}' is no safetensors file; convert the LoRA to safetensors")
    file = read_header(path)
    modules: dict[str, dict[str, dict[Role, str]]] = {}
    for key in sorted(file.tensors):
        part, module, role = split_key(key, where=str(path))
        keys = modules.setdefault(part, {}).setdefault(module, {})
        if role in keys:
            raise CheckpointError(f"{path}: '{key}' and '{keys[role]}' say the same thing twice")
        keys[role] = key
    _require_pairs(path, modules)
    _require_config(file)
    return Lora(file=file, modules=modules)


def _require_pairs(path: Path, modules: Mapping[str, Mapping[str, Mapping[Role, str]]]) -> None:
    if not modules:
        raise CheckpointError(f"'{path}' holds nothing; download it again")
    for part in modules.values():
        for module, keys in part.items():
            absent = [role for role in ("down", "up") if role not in keys]
            if absent:
                raise CheckpointError(
                    f"{path}: {module} lacks its {' and its '.join(absent)} matrix; download it again"
                )


def _require_config(file: TensorFile) -> None:
    """PEFT writes the scale into another file: without it the LoRA would be too strong or too weak."""
    config = file.path.with_name(PEFT_CONFIG)
    if any(key.startswith(PEFT_PREFIX) for key in file.tensors) and not config.is_file():
        raise CheckpointError(f"{file.path} is PEFT's, and its scale is in {config}, which is missing; put it there")


def _peft_config(file: TensorFile, part: str) -> dict[str, Any]:
    """Return what PEFT said of how a network was trained, nothing where it said nothing."""
    if DIFFUSERS_CONFIG in file.metadata:
        start = f"{part}."
        document = _object(file.metadata[DIFFUSERS_CONFIG], f"{file.path}: its metadata")
        return {key.removeprefix(start): value for key, value in document.items() if key.startswith(start)}
    if any(key.startswith(PEFT_PREFIX) for key in file.tensors):
        config = file.path.with_name(PEFT_CONFIG)
        return _object(config.read_bytes(), str(config))
    return {}


def _object(content: bytes | str, where: str) -> dict[str, Any]:
    try:
        document = decode(content, strict=False)
    except ParseError as error:
        raise CheckpointError(f"{where} {error}; download the LoRA again") from None
    return document if isinstance(document, dict) else {}
