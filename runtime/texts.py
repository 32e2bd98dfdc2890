"""All text encoders of a bundle together: what the UNet attends to, and what it takes of the whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from latentrt.engines.bundle import Bundle, Check
from latentrt.engines.manifest import Manifest
from latentrt.engines.spec import Array, Engine
from latentrt.runtime.embeddings import Embedding
from latentrt.runtime.prompt import Prompt, PromptTokenizer
from latentrt.runtime.text import TextEncoder

STATES, POOLED = "encoder_hidden_states", "text_embeds"  # the UNet's names


def read_tokenizers(bundle: Bundle, *, check: Check) -> dict[str, PromptTokenizer]:
    """Read the bundle's tokenizers, by name. Raises BundleError."""
    specs = bundle.manifest.tokenizers
    return {name: PromptTokenizer(bundle.path(spec.file, check=check), spec) for name, spec in specs.items()}


class Texts:
    """The encoders of a bundle, in the order in which the UNet takes what they give."""

    def __init__(
        self, manifest: Manifest, engines: Mapping[str, Engine], tokenizers: Mapping[str, PromptTokenizer]
    ) -> None:
        self._zero_negative = manifest.zero_negative
        self._encoders: dict[str, TextEncoder] = {}
        for text in manifest.text_encoders:
            self._encoders[text.component] = TextEncoder(
                tokenizers[text.tokenizer],
                partial(_run, engines, text.component),  # the engine may be wrapped later, by what times it
                engines[text.component].spec,
                skip=text.skip,
                pooled=text.pooled,
            )

    def __call__(self, prompts: Sequence[Prompt], negatives: Sequence[Prompt]) -> dict[str, Array]:
        """Encode a batch: the UNet's inputs by name, the prompts' rows first and then the negative prompts'.

        negatives: as many as there are prompts, or none
        """
        rows = [*prompts, *negatives]
        batches = [encoder.batch(rows) for encoder in self._encoders.values()]
        longest = max(batch.states.shape[1] for batch in batches)
        states = [_even(batch.states, longest) for batch in batches]
        inputs = {STATES: np.concatenate(states, axis=-1) if len(states) > 1 else states[0]}
        pooled = [batch.pooled for batch in batches if batch.pooled is not None]
        if pooled:
            inputs[POOLED] = np.concatenate(pooled, axis=-1)
        empty = [len(prompts) + i for i, prompt in enumerate(negatives) if not prompt.text]
        return _zeroed(inputs, empty) if self._zero_negative and empty else inputs

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Return how many tokens the longest prompt's encoding has. Raises RequestError on what cannot be read."""
        return max(encoder.tokens(prompts) for encoder in self._encoders.values())

    def device_inputs(self, prompts: Sequence[Prompt], negatives: Sequence[Prompt]) -> dict[str, Array] | None:
        """Return the text encoder's inputs where its output, as it is, is what `__call__` would give; else None."""
        if len(self._encoders) > 1 or self._zero_negative:
            return None
        (encoder,) = self._encoders.values()
        return encoder.device_inputs([*prompts, *negatives])

    def adapt(self, weights: Mapping[str, str]) -> None:
        """Remember from now on what engines with other weights give, by component; the base's where none is named."""
        for component, encoder in self._encoders.items():
            encoder.weights = weights.get(component, "")

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Return the learned words that prompts may use."""
        return next(iter(self._encoders.values())).embeddings

    def add(self, embedding: Embedding) -> None:
        """Let prompts use a learned word. Raises RequestError where it does not fit."""
        next(iter(self._encoders.values())).add(embedding)

    def remove(self, name: str) -> None:
        """Make a learned word plain text again. Raises RequestError on a name that is not loaded."""
        next(iter(self._encoders.values())).remove(name)


def _run(engines: Mapping[str, Engine], component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    return engines[component](inputs)


def _even(states: Array, tokens: int) -> Array:
    """Repeat the last chunk's place with zeros where another encoder's tokenizer needed more chunks."""
    missing = tokens - states.shape[1]
    return np.pad(states, ((0, 0), (0, missing), (0, 0))) if missing else states


def _zeroed(inputs: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    """Return the inputs with some rows zero: SDXL was trained with zeros where there is no prompt."""
    copies = {name: array.copy() for name, array in inputs.items()}
    for array in copies.values():
        array[list(rows)] = 0
    return copies
