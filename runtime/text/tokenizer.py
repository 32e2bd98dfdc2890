"""Prompts into tokens, with the bundle's own tokenizer and the `tokenizers` library."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import TokenizerSpec
from latentrt.engines.bundle.text_lengths import MOST_FIXED
from latentrt.engines.errors import BundleError, RequestError, library_failed
from latentrt.engines.spec import Array
from latentrt.runtime.text.syntax import EXPLICIT_WEIGHT, Part, Segment, Syntax, loaded_by_name, parse_weighted

logger = logging.getLogger(__name__)

Overflow = Literal["chunks", "truncate"]

# A chunk's last comma is preferred to its last word where it lies among this many tokens at the end.
COMMA_REACH = 20
# 32 chunks are 2400 tokens; an essay that is pasted by mistake ends here, not in the memory of the attention.
MOST_CHUNKS = 32


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A text and how it is read. Raises RequestError if a field has no meaning.

    syntax: `plain` takes every sign as text, as diffusers does; `weighted` reads weights and BREAK
    overflow: what becomes of tokens that the text encoder has no room for: further `chunks`, or `truncate` as
        diffusers does, with a warning
    clip_skip: how many of the text encoder's last layers are left out, 0 for none, counted as diffusers does; the
        community's interfaces count one more
    given: whether anyone wrote it: where no negative prompt was given, SDXL's zeros stand for it
    t5: whether the text encoder that a checkpoint can do without, SD 3's T5, reads it too
    t5_tokens: how many tokens of it that encoder reads, None for the bundle's own number
    """

    text: str
    syntax: Syntax = "plain"
    overflow: Overflow = "chunks"
    clip_skip: int = 0
    given: bool = True
    t5: bool = True
    t5_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise RequestError(f"prompt: found {type(self.text).__name__} ({self.text!r}), expected a string")
        for name, value, known in (
            ("prompt_syntax", self.syntax, get_args(Syntax)),
            ("overflow", self.overflow, get_args(Overflow)),
        ):
            if value not in known:
                raise RequestError(f"{name}: found {value!r}, expected one of {', '.join(known)}")
        if type(self.clip_skip) is not int or self.clip_skip < 0:
            raise RequestError(f"clip_skip: found {self.clip_skip!r}, expected a number of layers from 0 up")
        if self.t5_tokens is not None and not (type(self.t5_tokens) is int and 1 <= self.t5_tokens <= MOST_FIXED):
            raise RequestError(f"t5_tokens: found {self.t5_tokens!r}, expected a number from 1 to {MOST_FIXED}")


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One token of a prompt: its weight, the number of its segment, and whether a word or a clause ends with it."""

    id: int
    weight: float
    segment: int
    ends_word: bool
    ends_clause: bool


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """What one row of the text encoder holds between its begin and its end."""

    tokens: tuple[Token, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the tokens' ids."""
        return tuple(token.id for token in self.tokens)

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the tokens' weights."""
        return tuple(token.weight for token in self.tokens)

    @property
    def weak_segments(self) -> dict[int, float]:
        """Return the weights of the segments that weigh less than 1, by their numbers."""
        return {token.segment: token.weight for token in self.tokens if token.weight < 1}

    def without(self, segment: int) -> Chunk:
        """Return the chunk as it were if a segment had not been written."""
        return Chunk(tokens=tuple(token for token in self.tokens if token.segment != segment))


class PromptTokenizer:
    """Text in, chunks of tokens out, each small enough for one row of the text encoder."""

    def __init__(self, file: Path, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer  # for what opens a bundle

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except BaseException as error:  # the library raises bare Exception
            if not library_failed(error):
                raise
            raise BundleError(f"{file} is not a tokenizer ({error}); export the checkpoint again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._learned: dict[int, range] = {}
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())  # words that are one token each
        self.spec = spec

    @property
    def before(self) -> int:
        """Return how many tokens stand before those of the text: the begin token, where there is one."""
        return 0 if self.spec.begin_id is None else 1

    @property
    def room(self) -> int:
        """Return how many tokens fit between begin and end."""
        return self._room(self.spec.max_length)

    def _room(self, length: int) -> int:
        return length - self.before - 1

    def __call__(self, texts: Sequence[str]) -> Array:
        """Return token ids: (len(texts), max_length), int64. Raises RequestError on what is not text."""
        chunks = [self.chunks(Prompt(text=text, overflow="truncate"))[0] for text in texts]
        return self.rows([chunk.ids for chunk in chunks])

    def with_words(self, words: Mapping[str, int]) -> PromptTokenizer:
        """Return a tokenizer that also knows learned words, as diffusers' tokenizer does once they are loaded.

        words: how many tokens each stands for; in their order they get the ids -1, -2, …, see
            `graphs.append_embedding_input`
        Raises RequestError on a word that the tokenizer has already.
        """
        from tokenizers import AddedToken, Tokenizer

        other = copy.copy(self)
        other._tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        other._learned, following = dict(self._learned), -1
        for word, tokens in words.items():
            if not word.strip() or other._tokenizer.token_to_id(word) is not None:
                raise RequestError(f"'{word}' cannot be the name of an embedding: the tokenizer has it; choose another")
            other._tokenizer.add_tokens([AddedToken(word)])
            added = other._tokenizer.token_to_id(word)
            assert added is not None
            other._learned[added] = range(following, following - tokens, -1)
            following -= tokens
        other._added = self._added | other._learned.keys()
        return other

    def chunks(self, prompt: Prompt, *, length: int | None = None) -> tuple[Chunk, ...]:
        """Split a prompt into chunks, at least one. Raises RequestError on what is not text or does not parse.

        length: of the row that a text encoder of a fixed length reads, begin and end included: then all of the prompt
            is one chunk, whatever its BREAKs and its overflow, and what does not fit is left out with a warning
        """
        if prompt.syntax == "weighted":
            parts = parse_weighted(prompt.text)
        else:
            _hint(prompt.text)
            parts = ((Segment(text=prompt.text),),)
        if length is not None:
            return (self._only(parts, length),)
        chunks = tuple(chunk for part in parts for chunk in self._part(part, prompt.overflow))
        if len(chunks) > MOST_CHUNKS:
            raise RequestError(
                f"prompt: found {sum(len(chunk.tokens) for chunk in chunks)} tokens in {len(chunks)} chunks, expected "
                f"at most {MOST_CHUNKS} chunks of {self.room} tokens; shorten it"
            )
        return chunks

    def rows(self, chunks: Sequence[Sequence[int]], *, length: int | None = None) -> Array:
        """Put begin, end and padding around chunks' ids: (len(chunks), length), int64.

        length: None for max_length
        """
        spec = self.spec
        begin = () if spec.begin_id is None else (spec.begin_id,)
        rows = np.full((len(chunks), length or spec.max_length), spec.pad_id, dtype=np.int64)
        for row, ids in zip(rows, chunks, strict=True):
            row[: len(begin) + len(ids) + 1] = (*begin, *ids, spec.end_id)
        return rows

    def _part(self, part: Part, overflow: Overflow) -> Iterator[Chunk]:
        tokens = self._read(part)
        return _split(tokens, self.room) if overflow == "chunks" else iter((_cut(tokens, self.room),))

    def _only(self, parts: Sequence[Part], length: int) -> Chunk:
        return _cut(self._read([segment for part in parts for segment in part]), self._room(length))

    def _read(self, segments: Sequence[Segment]) -> tuple[Token, ...]:
        return tuple(token for number, segment in enumerate(segments) for token in self._tokens(segment, number))

    def _tokens(self, segment: Segment, number: int) -> Iterator[Token]:
        try:
            encoding = self._tokenizer.encode(segment.text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # lone surrogates are no text
            raise RequestError(f"prompt: {segment.text!r} is not valid Unicode text") from None
        except BaseException as error:
            if not library_failed(error):
                raise
            words = f"the bundle's tokenizer {self.spec.file} fails on this prompt ({error})"
            raise BundleError(f"{words}; export the checkpoint again") from None
        for token, piece in zip(encoding.ids, encoding.tokens, strict=True):
            ids = self._learned.get(token, range(token, token + 1))
            for id in ids:
                yield Token(
                    id=id,
                    weight=segment.weight,
                    segment=number,
                    ends_word=id == ids[-1] and (piece.endswith("</w>") or token in self._added),
                    ends_clause=piece == ",</w>",
                )


def _hint(text: str) -> None:
    """Say so where a plain prompt holds another interface's syntax: taken as text, it draws brackets and numbers."""
    found = re.search(EXPLICIT_WEIGHT, text)
    if found:
        how = "prompt_syntax='weighted', or --weighted"
        logger.warning("the prompt is plain text, '%s' included; weights need %s", found[0], how)
    for named, where in loaded_by_name(text):
        logger.warning("the prompt is plain text, '%s' included, which loads nothing here: %s", named[0], where)


def _cut(tokens: tuple[Token, ...], room: int) -> Chunk:
    if len(tokens) > room:
        logger.warning("the prompt has %d tokens; the last %d are not used", len(tokens), len(tokens) - room)
    return Chunk(tokens=tokens[:room])


def _split(tokens: Sequence[Token], room: int) -> Iterator[Chunk]:
    """Split tokens into chunks that fit. A chunk ends with a clause or a word where it can."""
    while len(tokens) > room:
        end = _end(tokens[:room])
        yield Chunk(tokens=tuple(tokens[:end]))
        tokens = tokens[end:]
    yield Chunk(tokens=tuple(tokens))


def _end(tokens: Sequence[Token]) -> int:
    choices: tuple[tuple[Callable[[Token], bool], int], ...] = (
        (lambda token: token.ends_clause, len(tokens) - COMMA_REACH),
        (lambda token: token.ends_word, 0),
    )
    for good, least in choices:
        for end in range(len(tokens), max(least, 0), -1):
            if good(tokens[end - 1]):
                return end
    return len(tokens)
