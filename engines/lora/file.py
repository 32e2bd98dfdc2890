"""LoRA files, read without a framework: changes of weights, matched with the weights that a network has.

What a change is stands in lora_kinds.py, what a name means in lora_names.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from latentrt.engines.bundle.safetensors_header import TensorFile, read_header, weights_format
from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.kinds import ALPHA, DIFFERENCES, DORA, KIND_OF, MAGNITUDES, Change, Kind, Role, Shape
from latentrt.engines.lora.names import Parameter, from_original, plain_module, split_key
from latentrt.engines.lora.peft_config import read_config
from latentrt.engines.lora.transformer_names import ALL, Share, from_joint
from latentrt.engines.lora.weight_changes import Delta
from latentrt.engines.spec import Array

Target = tuple[str, Parameter]
"""A module in the one form of its name, and which of its parameters changes."""


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """The change of a weight: a target's, or some of its rows."""

    target: Target
    share: Share = ALL


class LoraFile(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA file whose names are understood; its tensors are read when a change is asked for.

    modules: for each network, the keys of each parameter that changes, by their role
    """

    file: TensorFile
    modules: Mapping[str, Mapping[Target, Mapping[Role, str]]]

    @property
    def path(self) -> Path:
        """Return where the file lies."""
        return self.file.path

    def match(self, part: str, shapes: Mapping[str, Shape]) -> dict[str, Match]:
        """Find the weights of a network that the file changes.

        shapes: of every weight of the network, by the name that diffusers or transformers gives it
        Raises CheckpointError if a module fits no weight, or not its shape.
        """
        weights = {plain_module(name): name for name in shapes}
        modules = _Modules(weights)
        found: dict[str, Match] = {}
        strangers = []
        for module, parameter in self.modules.get(part, {}):
            shares = modules.named(module, parameter)
            if not shares:
                strangers.append(module if parameter == "weight" else f"{module}.{parameter}")
            for name, share in shares.items():
                if name in found:
                    raise CheckpointError(
                        f"{self.path} changes {name} twice, as {found[name].target[0]} and as {module}"
                    )
                found[name] = Match(target=(module, parameter), share=share)
        if strangers:
            raise CheckpointError(self._misfit(part, strangers))
        for name, match in found.items():
            self._check(part, match, name, shapes[name])
        return found

    def _misfit(self, part: str, strangers: list[str]) -> str:
        base = self.file.metadata.get("ss_base_model_version")
        made = f"; its metadata say that it was made for {base}" if base else ""
        return (
            f"{self.path}: {len(strangers)} of the {len(self.modules[part])} modules that it changes are not in this "
            f"checkpoint's {part} ({', '.join(strangers[:3])}){made}; give a LoRA that was made for its family"
        )

    def _shapes(self, part: str, target: Target) -> dict[Role, Shape]:
        return {role: self.file.tensors[key].shape for role, key in self.modules[part][target].items()}

    def _check(self, part: str, match: Match, name: str, shape: Shape) -> None:
        target, changed = match.target, match.share.shape(shape)
        shapes = self._shapes(part, target)
        if math.prod(alpha := shapes.pop(ALPHA, ())) != 1:
            raise CheckpointError(
                f"{self.path}: the alpha of {target[0]} has the shape {alpha}, expected one number; save the LoRA again"
            )
        if not self.kind(part, target).fits(shapes, changed):
            raise CheckpointError(
                f"{self.path}: {target[0]} has the shapes {' and '.join(map(str, shapes.values()))}, which do not fit "
                f"{name} of shape {shape}; give a LoRA that was made for this checkpoint's family"
            )

        across = [role for role in set(MAGNITUDES) & set(shapes) if MAGNITUDES[role].along(shapes[role], changed)]
        if across and not match.share.whole:
            raise CheckpointError(
                f"{self.path}: {target[0]} is one layer there and several in this network, and its {across[0]} belongs "
                "to all of them together; save the LoRA with the magnitudes of its outputs"
            )

    def kind(self, part: str, target: Target) -> Kind:
        """Return what kind of change a parameter has."""
        return next(KIND_OF[role] for role in self.modules[part][target] if role in KIND_OF)

    def kind_name(self, part: str, target: Target) -> str:
        """Return the kind's name, with what follows it."""
        name = self.kind(part, target).name
        return f"{name} with {DORA}" if set(MAGNITUDES) & set(self.modules[part][target]) else name

    def rank(self, part: str, target: Target) -> int | None:
        """Return the rank of one change, None if nothing in it is a product."""
        return self.kind(part, target).rank(self._shapes(part, target))

    def vectors(self, part: str) -> bool:
        """Tell whether it changes anything in a network that is no matrix."""
        changed = (
            key for keys in self.modules.get(part, {}).values() for role, key in keys.items() if role in DIFFERENCES
        )
        return any(len(self.file.tensors[key].shape) == 1 for key in changed)

    def change(self, part: str, target: Target, share: Share = ALL) -> Change:
        """Read one change. share: the rows of it that a weight has"""
        keys = self.modules[part][target]
        tensors = {role: self.file.read_float32(key) for role, key in keys.items() if role != ALPHA}
        return Change(kind=self.kind(part, target), tensors=tensors, scale=self._scale(part, target), share=share)

    def _scale(self, part: str, target: Target) -> float:
        """Return alpha / rank, 1 where the file has no alpha."""
        key, rank = self.modules[part][target].get(ALPHA), self.rank(part, target)
        if key is not None:
            return float(self.file.read_float32(key).reshape(())) / rank if rank else 1.0
        config = read_config(self.file, part)
        return config.scale(target[0], rank) if config and self.kind(part, target).scaled else 1.0


class _Modules:
    """The weights of a network by the names that files may have for its modules. weights: by their plain names"""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self._weights = weights
        self._resnets = self._count(r"down_blocks_0_resnets_(\d+)_conv1_weight")
        self._blocks = self._count(r"transformer_blocks_(\d+)_attn_to_q_weight")

    def _count(self, pattern: str) -> int:
        return len({name for name in self._weights if re.fullmatch(pattern, name)})

    def named(self, module: str, parameter: Parameter) -> dict[str, Share]:
        """Return the weights that a module means, and which rows of its change each has; none if any is not there."""
        original = from_original(module, resnets=max(self._resnets, 1))
        for choice in ({module: ALL}, {original: ALL}, from_joint(module, blocks=self._blocks)):
            names = [self._weights.get(f"{name}_{parameter}") for name in choice]
            if None not in names:
                return {str(name): share for name, share in zip(names, choice.values(), strict=True)}
        return {}


def find_deltas(lora: LoraFile, part: str, shapes: Mapping[str, Shape], *, strength: float) -> dict[str, Delta]:
    """Find what a file adds to each weight of a network, computed when it is asked for: float32, of the weight's shape.

    shapes, raises: as in `Lora.match`
    """
    return {
        name: functools.partial(_added, lora, part, match, strength) for name, match in lora.match(part, shapes).items()
    }


def _added(lora: LoraFile, part: str, match: Match, strength: float, weight: Array) -> Array:
    return lora.change(part, match.target, match.share).added(weight, strength=strength)


def split_strength(text: str) -> tuple[str, float]:
    """Read `file` or `file:0.8`. Raises CheckpointError."""
    path, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return text, 1.0
    if not path or not math.isfinite(strength):
        raise CheckpointError(f"--lora '{text}': expected a file and a number, as in style.safetensors:0.8")
    return path, strength


def read_lora(path: Path) -> LoraFile:
    """Read the names of a LoRA file. Raises CheckpointError if it is none, or of a kind that is not supported."""
    if not path.is_file():
        raise CheckpointError(f"there is no LoRA at '{path}'; give a safetensors file")
    if weights_format(path) != "safetensors":
        raise CheckpointError(f"'{path}' is not a safetensors file; convert the LoRA to safetensors")
    file = read_header(path)
    modules: dict[str, dict[Target, dict[Role, str]]] = {}
    adapters: set[str] = set()
    for key in sorted(file.tensors):
        found = split_key(key, where=str(path))
        keys = modules.setdefault(found.part, {}).setdefault((found.module, found.parameter), {})
        adapters |= {found.adapter} if found.adapter else set()
        if len(adapters) > 1:
            raise CheckpointError(
                f"{path} holds several adapters ({', '.join(sorted(adapters))}); save each in its own"
            )
        if found.role in keys:
            raise CheckpointError(f"{path}: '{key}' and '{keys[found.role]}' say the same thing twice")
        keys[found.role] = key
    if not modules:
        raise CheckpointError(f"'{path}' holds nothing; download it again")
    for part, targets in modules.items():
        for (module, _), keys in targets.items():
            _require_kind(path, module, keys)
        _require_magnitudes(file, part, targets)
    return LoraFile(file=file, modules=modules)


def _require_kind(path: Path, module: str, keys: Mapping[Role, str]) -> None:
    """Refuse tensors that make up no change, or of which some would have no part in it."""
    roles = set(keys)
    kinds = {KIND_OF[role].name: KIND_OF[role] for role in sorted(roles & set(KIND_OF))}
    if len(kinds) > 1:
        raise CheckpointError(f"{path} changes {module} as {' and as '.join(kinds)}, expected one of them")
    if not kinds:
        raise CheckpointError(f"{path}: {module} lacks what '{min(keys.values())}' belongs to; download it again")
    (kind,) = kinds.values()
    strangers = kind.strangers(roles) or (roles & set(MAGNITUDES) if set(MAGNITUDES) <= roles else set())
    if strangers:
        raise CheckpointError(f"{path}: '{keys[min(strangers)]}' has no meaning for a {kind.name}; remove it")
    if absent := kind.absent(roles):
        raise CheckpointError(f"{path}: {module} lacks its {' and its '.join(absent)}; download it again")


def _require_magnitudes(file: TensorFile, part: str, targets: Mapping[Target, Mapping[Role, str]]) -> None:
    config = read_config(file, part)
    if config and config.magnitudes and not any(set(MAGNITUDES) & set(keys) for keys in targets.values()):
        raise CheckpointError(f"{config.where}: it says use_dora, and {file.path} holds no magnitudes; save it again")
