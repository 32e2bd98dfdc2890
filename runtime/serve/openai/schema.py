"""What clients of OpenAI's Images API send, and the fields of our own that they may add.

Any field may be null, as if it had not been sent. https://platform.openai.com/docs/api-reference/images
"""

from __future__ import annotations

from typing import Literal

import msgspec

Format = Literal["png", "jpeg", "webp"]


class Drawing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a generation and an edit have in common."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    style: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: int | None = None
    stream: bool | None = None
    partial_images: int | None = None
    # ours
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    deadline: float | None = None


class Generation(Drawing, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/images/generations."""
