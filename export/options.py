"""The options of an export: what is added to a checkpoint, replaced in it, or said about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from latentrt.engines.bundle.training import Prediction
from latentrt.engines.errors import CheckpointError

CONTROL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it is part of the names of files


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOption:
    """A LoRA file, and how strongly it changes the weights."""

    path: str
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraOption:
        """Read `file` or `file:0.8`. Raises CheckpointError."""
        from latentrt.engines.lora.file import split_strength  # after a long chain of its own

        path, strength = split_strength(text)
        return cls(path=path, strength=strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetOption:
    """A ControlNet's or an adapter's directory or file, and the name that requests use for it."""

    name: str
    path: str

    @classmethod
    def parse(cls, text: str, *, option: str = "--controlnet") -> ControlNetOption:
        """Read `canny=directory`. Raises CheckpointError, which begins with the option's name."""
        name, equals, path = text.partition("=")
        if not equals or not path or not CONTROL_NAME.fullmatch(name):
            raise CheckpointError(
                f"{option} '{text}': expected a name of letters, digits, - and _, then = and a directory or file, "
                "as in canny=./controlnet-canny"
            )
        return cls(name=name, path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Choices that go with a checkpoint. None means "as the checkpoint says".

    revision: branch, tag or commit of a hub id, or of its folder in the hub's cache
    config: a diffusers directory whose configs and tokenizer a single file uses instead of the published ones
    tokenizer: a directory with CLIP's vocabulary, or a checkpoint with one; a single file contains none
    vae: a VAE to use instead of the checkpoint's: a directory or a file
    tiny_vae: a small VAE (diffusers' AutoencoderTiny) whose decoder is added to the bundle: a directory
    unet: a UNet to use instead of the checkpoint's, such as SDXL-Lightning's: a directory or a file
    prediction_type: what the UNet predicts, where the checkpoint does not say, or says it wrongly
    motion_adapter: AnimateDiff's modules, which are put into the UNet: a directory or a file
    refiner: a checkpoint whose UNet can take over the last part of a picture; it reads the text as this one does
    text_encoders: where a single file of SD 3 lacks them: files with one text encoder or several, or directories
    skip_layers: the blocks of a transformer that a picture can be guided away from; none where it is empty
    t5: whether to export the text encoder that a checkpoint can do without, SD 3's T5
    loras: LoRAs to merge into the weights; their order does not matter
    controlnets, adapters: ControlNets and T2I-Adapters that requests may use; their order does not matter
    ip_adapters: IP-Adapters, with which images are prompts; their order does not matter
    image_encoder: the directory of the CLIP vision model that they read images with; None for one that lies beside them
    allow_pickle: whether weights in pickles may be opened
    """

    revision: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    tiny_vae: str | None = None
    unet: str | None = None
    prediction_type: Prediction | None = None
    motion_adapter: str | None = None
    refiner: str | None = None
    text_encoders: tuple[str, ...] = ()
    skip_layers: tuple[int, ...] | None = None
    t5: bool = True
    loras: tuple[LoraOption, ...] = ()
    controlnets: tuple[ControlNetOption, ...] = ()
    adapters: tuple[ControlNetOption, ...] = ()
    ip_adapters: tuple[ControlNetOption, ...] = ()
    image_encoder: str | None = None
    allow_pickle: bool = False
