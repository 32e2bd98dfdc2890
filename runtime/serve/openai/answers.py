"""What clients of OpenAI's Images API are answered, and the fields of our own that they find beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from latentrt.runtime.result import Settings
from latentrt.runtime.serve.openai.schema import Format


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """What was read. text_tokens: of prompt and negative prompt; image_tokens: one for each cell of images' latents"""

    text_tokens: int
    image_tokens: int


class OutputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """What was drawn. image_tokens: one for each cell of the pictures' latents"""

    image_tokens: int
    text_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """How much was read and drawn, in tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokens
    output_tokens_details: OutputTokens


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture, as base64 or under an address, with all that it takes to draw it again and what drawing it took.

    revised_prompt: always null: no prompt is changed
    """

    b64_json: str | None
    url: str | None
    revised_prompt: None
    seed: int
    settings: Settings
    seconds: Mapping[str, float]


class Pictures(msgspec.Struct, frozen=True, kw_only=True):
    """The answer that holds all pictures of a request. created: in seconds since 1970"""

    created: int
    data: list[Picture]
    background: Literal["opaque"]
    output_format: Format
    quality: str
    size: str
    usage: Usage
    safety_identifier: str | None


class Partial(msgspec.Struct, frozen=True, kw_only=True):
    """A picture on its way. image_index: which of the request's; stage: after how many of `stages`"""

    type: str
    b64_json: str
    background: Literal["opaque"]
    created_at: int
    output_format: Format
    partial_image_index: int
    quality: str
    size: str
    image_index: int
    stage: int
    stages: int


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that is done. usage: of this one"""

    type: str
    b64_json: str
    background: Literal["opaque"]
    created_at: int
    output_format: Format
    quality: str
    size: str
    usage: Usage
    image_index: int
    seed: int
    settings: Settings
    seconds: Mapping[str, float]
    safety_identifier: str | None
    url: str | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served. created: when its bundle was written, in seconds since 1970"""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: Literal["latentrt"] = "latentrt"


class ModelCards(msgspec.Struct, frozen=True, kw_only=True):
    """All models that are served."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
