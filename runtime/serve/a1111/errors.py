"""Errors in the form that clients of A1111's API read, and by its names of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from latentrt.runtime.serve.web_errors import WebError, web_error

BELOW = "/sdapi/"  # the paths whose errors have this form
# What a `Request` calls it, and A1111's field for it.
FIELDS: Mapping[str, str] = {
    "clip_skip": "CLIP_stop_at_last_layers",
    "guidance": "cfg_scale",
    "image": "init_images",
    "n": "batch_size",
    "sampler": "sampler_name",
    "size": "width",
    "spacing": "scheduler",
    "strength": "denoising_strength",
    "variation_seed": "subseed",
    "variation_strength": "subseed_strength",
}


def renamed(error: Exception) -> WebError:
    """Return how an error is answered, with the field at fault as A1111's API calls it."""
    answer = web_error(error)
    name = FIELDS.get(answer.param or "")
    if name is None or answer.param is None:
        return answer
    sentence = name + str(answer).removeprefix(answer.param)
    return WebError(
        sentence, status=answer.status, code=answer.code, param=name, kind=answer.kind, headers=answer.headers
    )


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to what cannot be done. detail: for people, and errors the same; error: a code, for programs"""

    error: str
    detail: str
    body: str = ""
    errors: str


def body_of(error: WebError) -> dict[str, Any]:
    """Return the body that says it."""
    return msgspec.structs.asdict(Refused(error=error.code, detail=str(error), errors=str(error)))
