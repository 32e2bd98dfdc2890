"""Rows of tokens through the text encoder, whatever its bundle was exported with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.graphs import EXTRA_EMBEDDINGS as EXTRA
from latentrt.engines.spec import Array, EngineSpec

IDS, STATES = "input_ids", "last_hidden_state"
SKIPPED = "skipped_hidden_states"  # (batch, skipped layers, context, width), see export.modules.TextEncoder
# At a time: a prompt of many weights is many rows, and must not take memory by the gigabyte.
MOST_ROWS = 8
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowStates:
    """What rows are encoded to: with all layers, and where the run was told to keep them, without the last ones.

    pooled: what stands for a row's whole text, where the encoder is read for it
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
        """Wrap an engine. run: the engine itself, or what calls it, which no one else does meanwhile.

        pooled: the name of the output that stands for a whole row
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
