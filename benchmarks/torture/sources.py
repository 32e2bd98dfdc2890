"""What the parts start from: a tiny checkpoint, its bundles, and a store of its engines. Made once for a folder."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """What scenes start from and never change.

    checkpoint: tiny; bundle: it in float32 with engines of the CPU; other: it in float16; store: holds those engines
    """

    checkpoint: Path
    bundle: Path
    other: Path
    store: Path


def sources(folder: Path) -> Sources:
    """Return what scenes start from; what is not in the folder yet is made."""
    from tests.tiny import save_tiny

    from latentrt.engines.build import build_engines
    from latentrt.engines.bundle.files import Bundle
    from latentrt.export.export import export_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    made = Sources(
        checkpoint=folder / "checkpoint",
        bundle=folder / "tiny",
        other=folder / "tiny-fp16",
        store=folder / "store",
    )
    if not (made.checkpoint / "model_index.json").is_file():
        save_tiny(made.checkpoint)
    if not made.bundle.exists():
        export_checkpoint(str(made.checkpoint), made.bundle, precision="fp32")
    if not made.other.exists():
        export_checkpoint(str(made.checkpoint), made.other, precision="fp16")
    build_engines(Bundle.open(made.bundle), "cpu", store=str(made.store))
    return made


def controlled(folder: Path) -> Path:
    """Return a bundle of the same checkpoint with a ControlNet, `edges`."""
    from tests.tiny import save_controlnet

    from latentrt.export.export import export_checkpoint
    from latentrt.export.options import CheckpointOptions, ControlNetOption

    network, bundle = folder / "edges", folder / "tiny-controlled"
    if not network.exists():
        save_controlnet(network)
    if not bundle.exists():
        options = CheckpointOptions(controlnets=(ControlNetOption(name="edges", path=str(network)),))
        export_checkpoint(str(folder / "checkpoint"), bundle, precision="fp32", options=options)
    return bundle
