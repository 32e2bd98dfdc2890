"""What a length of the text that a denoiser attends to is made of: chunks of a prompt, and rows of a fixed length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from latentrt.engines.bundle.manifest import Manifest

MOST_FIXED = 512  # tokens of a row of a fixed length, where a request says how long it is: as in diffusers


class TextLength(msgspec.Struct, frozen=True, kw_only=True):
    """How many chunks of a prompt, and how many tokens that are there whatever the prompt: T5's, or zeros for them."""

    chunks: int
    fixed: int


def split_length(tokens: int, manifest: Manifest, denoiser: str) -> TextLength | None:
    """Return what a length is made of, None where no text has it.

    Where it is whole chunks before what a bundle has by itself, it is these; else as few chunks as leave a row of a
    fixed length that is short enough.
    """
    fixed = manifest.text_tokens(denoiser, chunks=0)
    chunk = manifest.text_tokens(denoiser) - fixed
    if not chunk:  # it reads no text
        return TextLength(chunks=1, fixed=fixed) if tokens == fixed else None
    chunks, rest = divmod(tokens - fixed, chunk)
    if not rest:
        return TextLength(chunks=chunks, fixed=fixed) if chunks > 0 else None
    chunks = max(1, -(-(tokens - MOST_FIXED) // chunk))
    own = tokens - chunks * chunk
    return TextLength(chunks=chunks, fixed=own) if fixed and own > 0 else None
