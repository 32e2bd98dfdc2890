"""What clients of A1111's API send. Any field may be null, and a number or a boolean may be a string, as there.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/master/modules/api/models.py
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

DEFAULT_CFG, DEFAULT_STRENGTH = 7.0, 0.75  # A1111's own
RANDOM = -1  # as a seed
Text = Annotated[str, msgspec.Meta(max_length=32_000)]
Name = Annotated[str, msgspec.Meta(max_length=256)]


class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """What txt2img and img2img have in common.

    sampler_index: an older name of sampler_name; clip_skip: SD.Next's name of the option CLIP_stop_at_last_layers
    """

    prompt: Text | None = None
    negative_prompt: Text | None = None
    seed: int | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    sampler_name: Name | None = None
    sampler_index: Name | None = None
    scheduler: Name | None = None
    batch_size: int | None = None
    n_iter: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    denoising_strength: float | None = None
    clip_skip: int | None = None
    disable_extra_networks: bool | None = None
    enable_hr: bool | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = None
    send_images: bool | None = None
    save_images: bool | None = None


class Txt2Img(Drawing, frozen=True, kw_only=True):
    """The body of POST /sdapi/v1/txt2img."""


class Img2Img(Drawing, frozen=True, kw_only=True):
    """The body of POST /sdapi/v1/img2img. Images are base64 of a file, or data URLs."""

    init_images: list[str] | None = None
    mask: str | None = None
    mask_blur: float | None = None
    mask_blur_x: float | None = None
    mask_blur_y: float | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpainting_mask_invert: bool | None = None
    resize_mode: int | None = None
    include_init_images: bool | None = None


class PngInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /sdapi/v1/png-info. image: base64 of a file, or a data URL"""

    image: str


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of txt2img and img2img. images: base64 of files; info: JSON"""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of png-info. info: the settings' text; items: all texts of the file; parameters: what `info` says"""

    info: str
    items: dict[str, str]
    parameters: dict[str, str]
