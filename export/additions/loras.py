"""LoRA added to a checkpoint's weights: chosen before anything is exported, summed while a network is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.engines.bundle.files import hash_file
from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.file import LoraFile, find_deltas, read_lora
from latentrt.engines.lora.weight_changes import Delta
from latentrt.export.options import LoraOption
from latentrt.export.sources.diffusers_folder import to_weight_source
from latentrt.export.sources.parts import PARTS, LoraFusion, Parts, WeightSource
from latentrt.export.sources.weight_files import find_weights

if TYPE_CHECKING:
    from torch import Tensor

WeightDeltas = Mapping[str, Sequence[Delta]]
"""What is added to each weight that changes, computed when it is asked for: one weight's is in memory at a time."""


def add_loras(parts: Parts, loras: Sequence[LoraOption]) -> Parts:
    """Have LoRAs added to the networks that they change. Raises CheckpointError if one fits another model.

    The sum is always in the order of the files' hashes, so that it is the same in whichever order they were given.
    """
    if parts.source == "onnx":
        raise CheckpointError("--lora cannot change graphs that optimum exported; give the checkpoint they came from")
    files = sorted((hash_file(_existing(lora)), lora.strength, lora.path) for lora in loras)
    fusions = tuple(LoraFusion(path=str(Path(path).absolute()), strength=strength) for _, strength, path in files)
    opened = [read_lora(Path(fusion.path)) for fusion in fusions]
    present = {PARTS[component] for component in parts.networks}
    for lora in opened:
        for part in sorted(set(lora.modules) - present):
            raise CheckpointError(
                f"{lora.path} changes a {part}, which this checkpoint does not have; "
                "give a LoRA that was made for its family"
            )
    names = [f"lora/{number}-{Path(fusion.path).name}" for number, fusion in enumerate(fusions, start=1)]
    return replace(
        parts,
        networks={
            component: _with_loras(component, network, opened, fusions) for component, network in parts.networks.items()
        },
        files={**parts.files, **{name: Path(fusion.path) for name, fusion in zip(names, fusions, strict=True)}},
        options={**parts.options, **{n: str(fusion.strength) for n, fusion in zip(names, fusions, strict=True)}},
    )


def _existing(lora: LoraOption) -> Path:
    if not Path(lora.path).is_file():
        raise CheckpointError(f"there is no LoRA at '{lora.path}'; write it as FILE or FILE:SCALE")
    return Path(lora.path)


def _with_loras(
    component: str, network: Path | WeightSource, opened: Sequence[LoraFile], fusions: Sequence[LoraFusion]
) -> Path | WeightSource:
    """Return how to write a network with what changes it."""
    part = PARTS[component]
    mine = [(lora, fusion) for lora, fusion in zip(opened, fusions, strict=True) if part in lora.modules]
    if not mine:
        return network
    if isinstance(network, Path):
        weights = find_weights(network)
        shapes = {key: stored.shape for shard in weights.shards for key, stored in shard.tensors.items()}
        for lora, _ in mine:  # at once, where the names are known without a conversion
            lora.match(part, shapes)
    return replace(to_weight_source(part, network), loras=tuple(fusion for _, fusion in mine))


def find_weight_deltas(weight_source: WeightSource, tensors: Mapping[str, Tensor]) -> WeightDeltas:
    """Find what is added to each tensor of a network. Raises CheckpointError if a LoRA fits another model."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    changes: dict[str, list[Delta]] = {}
    for fusion in weight_source.loras:
        lora = read_lora(Path(fusion.path))
        for key, delta in find_deltas(lora, weight_source.part, shapes, strength=fusion.strength).items():
            changes.setdefault(key, []).append(delta)
    return changes


def fuse(tensor: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """Return a weight with its changes, in float32: what it was stored in would round small changes away.

    A weight that nothing changes is returned as it is.
    """
    import torch

    if not deltas:
        return tensor
    weight = tensor.to(torch.float32)
    total = weight.clone()
    for delta in deltas:
        total += torch.from_numpy(delta(weight.numpy()))
    return total
