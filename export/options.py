"""What whoever exports may add to a checkpoint, or say of it."""

from __future__ import annotations

from dataclasses import dataclass

from latentrt.engines.manifest import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Choices that go with a checkpoint. None is "as the checkpoint says".

    revision: branch, tag or commit of a hub id
    config: a diffusers directory whose configs, and tokenizer, a single file follows in place of the published ones
    tokenizer: a directory with CLIP's vocabulary, or a checkpoint with one; a single file holds none
    vae: a VAE to take in place of the checkpoint's: a directory or a file
    prediction_type: what the UNet predicts, where the checkpoint does not say or says it wrongly
    allow_pickle: whether weights in pickles may be opened
    """

    revision: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    prediction_type: Prediction | None = None
    allow_pickle: bool = False
