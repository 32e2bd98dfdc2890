"""Prompts into tokens, with the bundle's own tokenizer and the `tokenizers` library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from latentrt.engines.errors import BundleError, RequestError
from latentrt.engines.manifest import TokenizerSpec
from latentrt.engines.spec import Array

logger = logging.getLogger(__name__)


class PromptTokenizer:
    """Text in, rows of token ids out, padded to the length that the text encoder was trained with."""

    def __init__(self, file: Path, spec: TokenizerSpec) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{file} is not a tokenizer ({error}); export the checkpoint again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.spec = spec

    def __call__(self, texts: Sequence[str]) -> Array:
        """Return token ids: (len(texts), max_length), int64. Raises RequestError on what is not text."""
        return np.array([self._row(text) for text in texts], dtype=np.int64).reshape(len(texts), -1)

    def _row(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"prompt: found {type(text).__name__} ({text!r}), expected a string")
        spec = self.spec
        try:
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # lone surrogates are no text
            raise RequestError(f"prompt: {text!r} is not valid Unicode text") from None
        room = spec.max_length - 2
        if len(tokens) > room:
            logger.warning("the prompt has %d tokens; the last %d are not used", len(tokens), len(tokens) - room)
        row = [spec.begin_id, *tokens[:room], spec.end_id]
        return row + [spec.pad_id] * (spec.max_length - len(row))
