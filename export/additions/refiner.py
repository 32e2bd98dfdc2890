"""A second denoiser beside a checkpoint's own: SDXL's refiner, which takes the last part of the noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.configs.families import FAMILIES
from latentrt.export.options import CheckpointOptions

# What of a training schedule a plan is made of: both denoisers follow one plan.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "edm",
)


def add_refiner(base: Checkpoint, options: CheckpointOptions) -> Checkpoint:
    """Return a checkpoint with the refiner that the options name, or as it is where they name none.

    Its UNet is taken, and the base's text encoder and VAE serve both: whether the text encoders are the same is seen
    when their weights are read. Raises CheckpointError if the two do not belong together.
    """
    if options.refiner is None:
        return base
    tokenizer = options.tokenizer or str(next(iter(base.tokenizers.values())))
    own = CheckpointOptions(tokenizer=tokenizer, vae=options.vae, allow_pickle=options.allow_pickle)
    refiner = open_checkpoint(options.refiner, options=own)
    for sentence in _objections(base, refiner):
        raise CheckpointError(f"--refiner '{options.refiner}': {sentence}")
    named = {**base.options, "refiner": Path(options.refiner).name}
    return replace(base, refiner=refiner, files={**base.files, **_files(refiner)}, options=named)


def _objections(base: Checkpoint, refiner: Checkpoint) -> list[str]:
    """Say what keeps the two from drawing one picture, a sentence each."""
    found = []
    if FAMILIES[refiner.family].refines != base.family:
        found.append(
            f"found a checkpoint of the family {refiner.family} beside one of {base.family}, "
            "expected SDXL's refiner beside SDXL"
        )
    if "onnx" in (base.source, refiner.source):
        found.append("it cannot be added to graphs that optimum exported, nor be one; give diffusers' layout of both")
    if base.dimensions["unet_channels"] != base.latents.channels:
        found.append("an inpainting checkpoint takes none: the refiner sees no mask")
    if (base.latents, base.normalising) != (refiner.latents, refiner.normalising):
        found.append("its latents are not those of the checkpoint: their VAEs differ in channels, factor or scale")
    if unlike := [name for name in SCHEDULE if getattr(base.schedule, name) != getattr(refiner.schedule, name)]:
        found.append(f"it was trained with another noise schedule than the checkpoint ({', '.join(unlike)})")
    return found


def _files(refiner: Checkpoint) -> dict[str, Path]:
    """Name what the export reads of it: not its VAE, nor its vocabulary."""
    left_out = ("vae/", "tokenizer")
    return {f"refiner/{name}": path for name, path in refiner.files.items() if not name.startswith(left_out)}
