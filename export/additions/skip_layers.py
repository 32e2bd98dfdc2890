"""The blocks of a transformer that a model row may skip, for skip-layer guidance."""

from __future__ import annotations

from dataclasses import replace

from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.denoisers import kind_of
from latentrt.export.sources.parts import Parts


def add_skip_layers(parts: Parts, chosen: tuple[int, ...] | None) -> Parts:
    """Say which blocks of a checkpoint's denoiser can be skipped. Raises CheckpointError on blocks that are not there.

    chosen: their numbers from 0; None for those that were published with this kind of checkpoint, if any were
    """
    kind, config = kind_of(parts.denoiser, parts.configs[parts.denoiser]), parts.configs[parts.denoiser]
    layers, blocks = kind.skipped(config) if chosen is None else chosen, kind.blocks(config)
    if not layers:
        return parts
    if len({*layers}) != len(layers) or not all(0 <= layer < blocks for layer in layers):
        expected = f"different blocks from 0 to {blocks - 1}" if blocks else "none: its blocks cannot be skipped"
        raise CheckpointError(
            f"--skip-layers: found {','.join(map(str, layers))} for the {kind.label} of {parts.root}, "
            f"expected {expected}"
        )
    layers = tuple(sorted(layers))
    options = {**parts.options, "skip_layers": ",".join(map(str, layers))}
    return replace(parts, skip_layers=layers, options=options)
