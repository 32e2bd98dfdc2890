"""Prompts into what the UNet reads: chunks, weights and learned words, and a cache of what was encoded before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array, EngineSpec
from latentrt.engines.tensor_names import EXTRA_EMBEDDINGS as EXTRA
from latentrt.runtime.text.textual_inversion import Embedding
from latentrt.runtime.text.tokenizer import Chunk, Prompt, PromptTokenizer
from latentrt.runtime.text.weighting import Ids, is_weighted, needed, weigh


class _Words(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A tokenizer with the learned words it knows. `number` differs whenever they do."""

    tokenizer: PromptTokenizer
    embeddings: tuple[Embedding, ...] = ()
    number: int = 0
    vectors: Array | None = None  # of all embeddings, (rows, width)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(embedding.name for embedding in self.embeddings)


class Encoding(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One prompt, or a batch of them with an axis before, as the UNet reads it.

    states: (tokens, width); pooled: (pooled width,), None if the encoder is not read for it
    """

    states: Array
    pooled: Array | None = None

    @property
    def nbytes(self) -> int:
        """Return how much memory it takes."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class TextEncoder:
    """Encodes prompts, and remembers those it has encoded. Safe to use from many threads."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        run: Run,
        spec: EngineSpec,
        *,
        skip: int = 0,
        pooled: str | None = None,
        length: int | None = None,
        cache_bytes: int = 256 << 20,
    ) -> None:
        """Wrap a text encoder.

        run, spec: the engine, or what calls it, which nothing else calls at the same time; and the engine's spec
        skip: how many of its last layers the UNet never reads; a prompt's clip_skip comes on top
        pooled: the output with the pooled text
        length: how many tokens it reads whatever the prompt, unless the prompt says so itself; None for as many chunks
            as that needs
        cache_bytes: how much is remembered; what was not used for longest is forgotten first
        """
        self._plain, self.component = tokenizer, spec.component
        self._rows, self._skip, self._length = RowEncoder(run, spec, pooled=pooled), skip, length
        self._words = _Words(tokenizer=tokenizer)
        self.weights = ""  # names those that the engine has now, if they are not the base's
        self._cache = Cache(cache_bytes)
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[Prompt]) -> Array:
        """Encode a batch: (len(prompts), tokens, width), in the encoder's dtype.

        A prompt of fewer chunks than another is followed by chunks of the empty prompt. Raises RequestError.
        """
        return self.batch(prompts).states

    def batch(self, prompts: Sequence[Prompt]) -> Encoding:
        """Encode a batch, as `__call__` does, with the pooled text of each."""
        encodings = self.encodings(prompts)
        pooled = [one.pooled for one in encodings if one.pooled is not None]
        return Encoding(states=self._pad_to_longest(encodings, prompts), pooled=np.stack(pooled) if pooled else None)

    def _pad_to_longest(self, encodings: Sequence[Encoding], prompts: Sequence[Prompt]) -> Array:
        """Stack states, those of fewer chunks followed by chunks of the empty prompt."""
        encoded = [one.states for one in encodings]
        longest = max(map(len, encoded))
        if min(map(len, encoded)) < longest:
            empties = self.encode([Prompt(text="", clip_skip=prompt.clip_skip) for prompt in prompts])
            pairs = zip(encoded, empties, strict=True)
            encoded = [np.concatenate([row, *[end] * ((longest - len(row)) // len(end))]) for row, end in pairs]
        return np.stack(encoded)

    def encode(self, prompts: Sequence[Prompt]) -> list[Array]:
        """Encode each prompt by itself: (tokens, width), read-only; the same array for the same prompt.

        tokens is the encoder's context, 77, times the number of chunks, or its fixed length. Raises RequestError.
        """
        return [one.states for one in self.encodings(prompts)]

    def encodings(self, prompts: Sequence[Prompt]) -> list[Encoding]:
        """Encode each prompt by itself, as `encode` does, with its pooled text: that of the first chunk.

        Weights do not change the pooled text.
        """
        words, prompts = self._words, self._meant(prompts)
        found = self._remembered(words, prompts)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for length in dict.fromkeys(map(self._row, missing)):
            found |= self._encode(words, [prompt for prompt in missing if self._row(prompt) == length], length)
        return [found[prompt] for prompt in prompts]

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Return how many tokens the encoding of the longest of these prompts has. Raises RequestError."""
        words, prompts = self._words, self._meant(prompts)
        for prompt in prompts:
            self._rows.check_skip(self._skip + prompt.clip_skip)
        found = self._remembered(words, prompts)
        known = (len(encoding.states) for encoding in found.values())
        rows = (
            len(self._chunks(words, prompt)) * (self._row(prompt) or words.tokenizer.spec.max_length)
            for prompt in dict.fromkeys(prompts)
            if prompt not in found
        )
        return max(*known, *rows, 0)

    def length(self, prompt: Prompt) -> int:
        """Return how many tokens a prompt itself has, without begin, end and padding. Raises RequestError."""
        return sum(len(chunk.tokens) for chunk in self._chunks(self._words, prompt))

    def _meant(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Leave out what is said of chunks and of CLIP's layers, where rows have a fixed length."""
        if self._length is None:
            return prompts
        return [Prompt(text=one.text, syntax=one.syntax, t5_tokens=one.t5_tokens) for one in prompts]

    def _row(self, prompt: Prompt) -> int | None:
        """Return how many tokens a row has that is read whatever the prompt, None where there are chunks."""
        return self._length and (prompt.t5_tokens or self._length)

    def _chunks(self, words: _Words, prompt: Prompt) -> tuple[Chunk, ...]:
        return words.tokenizer.chunks(prompt, length=self._row(prompt))

    def device_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Array] | None:
        """Return the engine's inputs if its own output is the encoding of the whole batch, prompt after prompt.

        So it is where no word has a weight, no layer is skipped and all have the same number of chunks. None if
        it is not, and where every prompt is remembered: there, calling this encoder is what to do.
        """
        words, prompts = self._words, self._meant(prompts)
        if (
            self._skip
            or any(prompt.clip_skip for prompt in prompts)
            or len(self._remembered(words, prompts)) == len(set(prompts))
        ):
            return None
        chunks = [self._chunks(words, prompt) for prompt in prompts]
        (length, *others) = dict.fromkeys(map(self._row, prompts))
        if others or len(set(map(len, chunks))) > 1 or any(is_weighted(chunk) for row in chunks for chunk in row):
            return None
        rows = words.tokenizer.rows([chunk.ids for row in chunks for chunk in row], length=length)
        return self._rows.inputs(rows, words.vectors)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Return the learned words that prompts may use."""
        return self._words.names

    def add(self, embedding: Embedding) -> None:
        """Let prompts use a learned word. Raises RequestError if it does not fit this encoder."""
        with self._lock:
            if embedding.name in self.embeddings:
                raise RequestError(f"embeddings: '{embedding.name}' is loaded already; remove it first, or rename it")
            self._learn((*self._words.embeddings, embedding))

    def remove(self, name: str) -> None:
        """Make a learned word plain text again. Raises RequestError on a name that is not loaded."""
        with self._lock:
            if name not in self.embeddings:
                loaded = ", ".join(self.embeddings) or "nothing"
                raise RequestError(f"embeddings: found {name!r}, expected one that is loaded: {loaded}")
            self._learn(tuple(embedding for embedding in self._words.embeddings if embedding.name != name))

    def _learn(self, embeddings: tuple[Embedding, ...]) -> None:
        vectors = None
        for embedding in embeddings:
            self._rows.check_vectors(embedding.vectors)
        if embeddings:
            vectors = np.concatenate([embedding.vectors for embedding in embeddings])
            self._rows.check_vectors(vectors)
        tokenizer = self._plain.with_words({embedding.name: len(embedding.vectors) for embedding in embeddings})
        number = self._words.number + 1
        self._words = _Words(tokenizer=tokenizer, embeddings=embeddings, number=number, vectors=vectors)
        self._cache.clear()  # its entries cannot be found any more

    def _remembered(self, words: _Words, prompts: Sequence[Prompt]) -> dict[Prompt, Encoding]:
        found = {prompt: self._cache.get((words.number, self.weights, prompt)) for prompt in prompts}
        return {prompt: encoding for prompt, encoding in found.items() if encoding is not None}

    def _encode(self, words: _Words, prompts: Sequence[Prompt], length: int | None) -> dict[Prompt, Encoding]:
        """Encode prompts whose rows are of one length."""
        skips = {prompt: self._skip + prompt.clip_skip for prompt in prompts}
        for skip in skips.values():
            self._rows.check_skip(skip)
        chunks = {prompt: self._chunks(words, prompt) for prompt in prompts}
        wanted = dict.fromkeys(ids for row in chunks.values() for chunk in row for ids in needed(chunk))
        places = {ids: place for place, ids in enumerate(wanted)}
        rows = words.tokenizer.rows(list(wanted), length=length)
        states = self._rows(rows, words.vectors, keep_skipped=any(skips.values()))
        encoded = {}
        for prompt, row in chunks.items():
            array = _assemble(row, states.without(skips[prompt]), places, words.tokenizer.before)
            array.setflags(write=False)
            pooled = None if states.pooled is None else states.pooled[places[row[0].ids]].copy()
            encoded[prompt] = Encoding(states=array, pooled=pooled)
            self._cache.put((words.number, self.weights, prompt), encoded[prompt])
        return encoded


def _assemble(chunks: Sequence[Chunk], states: Array, places: Mapping[Ids, int], before: int) -> Array:
    """Weigh chunks and put them one after the other. states: (rows, context, width), by the places of their ids."""
    return np.concatenate(
        [weigh(chunk, lambda ids: np.asarray(states[places[ids]]), before=before) for chunk in chunks]
    )


class Cache:
    """Encodings by key. When one too many is put in, what was not asked for longest goes. Safe for many threads."""

    def __init__(self, size: int) -> None:
        """Hold encodings of at most so many bytes together."""
        from cachetools import LRUCache  # for what opens a bundle

        self._kept: LRUCache[Hashable, Encoding] = LRUCache(size, getsizeof=lambda encoding: encoding.nbytes)
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Encoding | None:
        """Return an encoding, and count it as the one asked for last."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: Hashable, encoding: Encoding) -> None:
        """Keep an encoding, or not if it is larger than all there is room for."""
        with self._lock, contextlib.suppress(ValueError):
            self._kept[key] = encoding

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()


IDS, STATES = "input_ids", "last_hidden_state"
SKIPPED = "skipped_hidden_states"  # (batch, skipped layers, context, width), see export.modules.TextEncoder
# At a time: a prompt of many weights is many rows, and must not take memory by the gigabyte.
MOST_ROWS = 8
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class RowStates(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What rows are encoded to: with all layers, and where the run was told to keep them, without the last ones.

    pooled: a row's pooled text, where the encoder is read for it
    """

    last: Array  # (rows, context, width)
    skipped: Array | None  # (rows, skipped layers, context, width)
    pooled: Array | None = None  # (rows, pooled width)

    def without(self, clip_skip: int) -> Array:
        """Return the states without that many of the last layers: (rows, context, width)."""
        if clip_skip == 0:
            return self.last
        assert self.skipped is not None
        return np.asarray(self.skipped[:, clip_skip - 1])


class RowEncoder:
    """The text encoder's engine, for any number of rows. Safe to use from many threads."""

    def __init__(self, run: Run, spec: EngineSpec, *, pooled: str | None = None) -> None:
        """Wrap an engine. run: the engine itself, or what calls it, which nothing else calls at the same time.

        pooled: the name of the output with the pooled text
        """
        self._run, self._lock, self._pooled = run, threading.Lock(), pooled
        self._inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in spec.outputs}

    def check_skip(self, clip_skip: int) -> None:
        """Raise RequestError where the encoder cannot leave out that many layers."""
        if clip_skip == 0:
            return
        if SKIPPED not in self._outputs:
            raise RequestError(
                f"clip_skip: found {clip_skip}, but this bundle's text encoder gives no states of earlier layers; "
                "export the checkpoint again"
            )
        layers = self._outputs[SKIPPED].shape[1]
        if isinstance(layers, int) and clip_skip > layers:
            raise RequestError(f"clip_skip: found {clip_skip}, expected at most {layers} for this text encoder")

    def check_vectors(self, vectors: Array) -> None:
        """Raise RequestError where the encoder cannot take these vectors besides its own table's."""
        if EXTRA not in self._inputs:
            raise RequestError("embeddings: the engine in use takes none; run `latentrt build --force` on this bundle")
        rows, width = self._inputs[EXTRA].shape
        if vectors.shape[1] != width:
            raise RequestError(
                f"embeddings: found vectors of width {vectors.shape[1]}, expected {width}; use embeddings that were "
                "trained for this family of checkpoints"
            )
        if isinstance(rows, int) and len(vectors) > rows:
            raise RequestError(
                f"embeddings: found {len(vectors)} vectors in all, and the engine was compiled for {rows}; remove some"
            )

    def inputs(self, rows: Array, vectors: Array | None) -> dict[str, Array]:
        """Return the engine's inputs for rows of ids, (rows, context); ids below zero are of `vectors`."""
        if EXTRA not in self._inputs:
            return {IDS: rows}
        wanted, width = self._inputs[EXTRA].shape
        assert isinstance(width, int)
        own = 0 if vectors is None else len(vectors)
        extra = np.zeros((wanted if isinstance(wanted, int) else max(1, own), width), dtype=self._inputs[EXTRA].dtype)
        if vectors is not None:
            extra[:own] = vectors
        return {IDS: rows, EXTRA: extra}

    def __call__(self, rows: Array, vectors: Array | None, *, keep_skipped: bool) -> RowStates:
        """Encode rows of ids, (rows, context)."""
        names = [STATES, *([SKIPPED] if keep_skipped else []), *([self._pooled] if self._pooled else [])]
        kept: dict[str, list[Array]] = {name: [] for name in names}
        for start in range(0, len(rows), MOST_ROWS):
            with self._lock:  # the outputs are the engine's own until its next call
                outputs = self._run(self.inputs(rows[start : start + MOST_ROWS], vectors))
                for name in names:
                    kept[name].append(outputs[name].copy())
        arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
        pooled = arrays[self._pooled] if self._pooled else None
        return RowStates(last=arrays[STATES], skipped=arrays.get(SKIPPED), pooled=pooled)
