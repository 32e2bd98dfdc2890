"""The options of A1111's API that hold for its later calls: what GET and POST /sdapi/v1/options speak of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from latentrt.runtime.request import NoiseSource
from latentrt.runtime.serve.a1111.neutral import refuse_unless_neutral
from latentrt.runtime.serve.a1111.schema import Name
from latentrt.runtime.serve.bodies import invalid
from latentrt.runtime.serve.web_errors import WebError

NOISES: Mapping[str, NoiseSource] = {"CPU": "cpu", "GPU": "cuda", "NV": "cuda"}
MOST_CLIP_STOP = 12


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename={"clip_stop": "CLIP_stop_at_last_layers"}):
    """What may be set.

    sd_model_checkpoint: the model that is drawn with, where a call names none
    clip_stop: at which of the text encoder's layers to stop, from the end: 1 for the last
    randn_source: whose generator seeds are for
    """

    sd_model_checkpoint: Name
    clip_stop: int = 1
    randn_source: Literal["CPU", "GPU", "NV"] = "CPU"

    @property
    def noise(self) -> NoiseSource:
        """Return whose generator seeds are for."""
        return NOISES[self.randn_source]

    def changed(self, options: Mapping[str, Any]) -> Settings:
        """Return the settings with some options of A1111's. Raises WebError on what cannot be set.

        What has the value that `options` gives, or says that something is off, may always be sent.
        """
        own = {name: value for name, value in options.items() if name in NAMES and value is not None}
        for name, value in options.items():
            if name not in NAMES and FIXED.get(name, ...) != value:
                refuse_unless_neutral(name, value)
        try:
            changed = msgspec.convert(self.options | own, Settings, strict=False)
        except msgspec.ValidationError as error:
            raise invalid(error) from error
        if not 1 <= changed.clip_stop <= MOST_CLIP_STOP:
            raise WebError(
                f"CLIP_stop_at_last_layers: found {changed.clip_stop}, expected 1 to {MOST_CLIP_STOP}",
                param="CLIP_stop_at_last_layers",
            )
        return changed

    @property
    def options(self) -> dict[str, Any]:
        """Return the object that GET /sdapi/v1/options gives."""
        return dict(FIXED) | dict(msgspec.to_builtins(self))


NAMES = frozenset(Settings.__struct_encode_fields__)

# What clients look for, as it is here. It cannot be set.
FIXED: Mapping[str, Any] = {
    "sd_checkpoint_hash": "",
    "sd_vae": "Automatic",
    "sd_unet": "Automatic",
    "samples_format": "png",
    "samples_save": False,
    "grid_save": False,
    "enable_pnginfo": True,
    "live_previews_enable": True,
    "show_progress_every_n_steps": 1,
    "eta_noise_seed_delta": 0,
    "initial_noise_multiplier": 1.0,
    "inpainting_mask_weight": 1.0,
    "img2img_color_correction": False,
    "img2img_fix_steps": False,
    "token_merging_ratio": 0.0,
    "face_restoration": False,
    "tiling": False,
}
