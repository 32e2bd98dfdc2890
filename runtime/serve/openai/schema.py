"""What clients of OpenAI's Images API send, and the fields of our own that they may add.

Any field may be null, as if it had not been sent. https://platform.openai.com/docs/api-reference/images
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Format = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Number = Annotated[float, Meta(ge=-1000, le=1000)]
Side = Annotated[int, Meta(ge=0, le=2**16)]
Text = Annotated[str, Meta(max_length=32_000)]
Name = Annotated[str, Meta(max_length=256)]


class NamedLora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA of the service's own folder, by its file's name without the ending."""

    name: Name
    scale: Number = 1.0


class SentControl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image to follow. name: of one of the model's ControlNets; image: a PNG, JPEG or WebP in base64.

    In a form the images are files, `controls[][image]`, in the order of the names.
    """

    name: Name
    image: str | None = None
    scale: Number = 1.0
    start: Share = 0.0
    stop: Share = 1.0


class SentImagePrompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image that says what to draw. name: of one of the model's IP-Adapters; image: a PNG, JPEG or WebP in base64.

    scale: one, one for each layer, or one for each layer's or block's name. In a form the images are files,
    `image_prompts[][image]`, in the order of the names.
    """

    name: Name
    image: str | None = None
    scale: (
        Number | Annotated[list[Number], Meta(max_length=1000)] | Annotated[dict[Name, Number], Meta(max_length=1000)]
    ) = 1.0


class Drawing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a generation and an edit have in common: first OpenAI's fields, then those of a `Request`."""

    prompt: Text
    model: Name | None = None
    n: int | None = None
    size: Name | None = None
    quality: Quality | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["low", "auto"] | None = None
    style: Name | None = None
    complexity: Name | None = None
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Meta(ge=0, le=3)] | None = None

    negative_prompt: Text | None = None
    prompt_syntax: Literal["plain", "weighted"] | None = None
    overflow: Literal["chunks", "truncate"] | None = None
    clip_skip: Annotated[int, Meta(ge=0, le=100)] | None = None
    t5: bool | None = None
    t5_tokens: Annotated[int, Meta(ge=1, le=512)] | None = None
    seed: Seed | None = None
    steps: int | None = None
    sampler: Name | None = None
    spacing: Name | None = None
    eta: Share | None = None
    shift: Annotated[float, Meta(gt=0, le=1000)] | None = None
    stop: Share | None = None
    timesteps: tuple[Annotated[float, Meta(ge=0, le=1e6)], ...] | None = None
    sigmas: tuple[Annotated[float, Meta(ge=0, le=1e6)], ...] | None = None
    forecast: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance: Number | None = None
    guidance_interval: tuple[Share, Share] | None = None
    guidance_rescale: Share | None = None
    skip_layer_guidance: Number | None = None
    skip_layer_interval: tuple[Share, Share] | None = None
    strength: Share | None = None
    loras: Annotated[list[NamedLora], Meta(max_length=16)] | None = None
    controls: Annotated[list[SentControl], Meta(max_length=8)] | None = None
    image_prompts: Annotated[list[SentImagePrompt], Meta(max_length=8)] | None = None
    variation_seed: Seed | None = None
    variation_strength: Share | None = None
    original_size: tuple[Side, Side] | None = None
    target_size: tuple[Side, Side] | None = None
    crop: tuple[Side, Side] | None = None
    noise: Literal["cpu", "cuda"] | None = None
    decoder: Literal["full", "tiny"] | None = None
    refine_from: Share | None = None
    aesthetic_score: Annotated[float, Meta(ge=0, le=10)] | None = None
    negative_aesthetic_score: Annotated[float, Meta(ge=0, le=10)] | None = None
    tile: Annotated[int, Meta(ge=64, le=2**16)] | None = None
    deadline: Annotated[float, Meta(gt=0, le=86_400)] | None = None


class Generation(Drawing, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/images/generations."""


class Edit(Drawing, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text fields of the form that is POST /v1/images/edits; `image` and `mask` are files beside them."""

    input_fidelity: Literal["low", "high"] | None = None
