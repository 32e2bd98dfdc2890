"""What ControlNets and T2I-Adapters have in common when they are added to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.export.options import ControlNetOption
from latentrt.export.sources.parts import ControlKind, ControlNetwork, Parts, WeightSource

Found = tuple[Mapping[str, Any], Path | WeightSource, Sequence[Path]]
"""A network's config, where its weights are, and the files that the export reads."""

ADDED_WITH: Mapping[str, str] = {
    "ControlNetModel": "--controlnet",
    "SD3ControlNetModel": "--controlnet",
    "T2IAdapter": "--adapter",
    "MotionAdapter": "--motion-adapter",
    "AutoencoderTiny": "--tiny-vae",
}
"""By diffusers' class: the option of what is added to a checkpoint."""


def option_instead(found: str, option: str) -> str:
    """Say which option takes a network of diffusers' class `found`; empty if none does, or the one that was used."""
    other = ADDED_WITH.get(found, option)
    return f"; add it with {other}" if other != option else ""


def _none(_: Mapping[str, Any]) -> dict[str, int]:
    return {}


def add_controls(
    parts: Parts,
    options: Sequence[ControlNetOption],
    read: Callable[[ControlNetOption, Parts], Found],
    *,
    kind: ControlKind,
    row: str,
    dimensions: Callable[[Mapping[str, Any]], Mapping[str, int]] = _none,
) -> Parts:
    """Add networks to a checkpoint's, in the order of their names. Raises CheckpointError.

    read: opens one and checks it against the checkpoint
    row: of the table of components; dimensions: the sizes of its own that a config names
    """
    if parts.source == "onnx":
        raise CheckpointError(
            f"--{kind} needs a UNet with inputs for it, and optimum exported this one without; "
            "give the checkpoint that it came from"
        )
    for option in sorted(options, key=lambda option: option.name):
        if option.name in (one.control for one in parts.controls.values()):
            raise CheckpointError(f"--{kind}: the name '{option.name}' was given twice; give each a name of its own")
        config, network, files = read(option, parts)
        control = ControlNetwork(kind=kind, row=row, control=option.name, dimensions=dimensions(config))
        parts = replace(
            parts,
            configs={**parts.configs, control.component: config},
            networks={**parts.networks, control.component: network},
            files={**parts.files, **{f"{control.component}/{file.name}": file for file in files}},
            controls={**parts.controls, control.component: control},
        )
    return parts
