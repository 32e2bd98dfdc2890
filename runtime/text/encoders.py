"""All text encoders of a bundle: the states that the UNet attends to, and the pooled text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from latentrt.engines.bundle.files import Bundle, Check
from latentrt.engines.bundle.manifest import DenoiserSpec, Join, Manifest, TextSpec
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array, Engine
from latentrt.runtime.text.encoder import Encoding, TextEncoder
from latentrt.runtime.text.textual_inversion import ENCODERS, LearnedWord
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer

STATES = "encoder_hidden_states"  # a denoiser's name for it
POOLED = ("text_embeds", "pooled_projections")  # what denoisers call the pooled text


def read_tokenizers(bundle: Bundle, *, check: Check) -> dict[str, PromptTokenizer]:
    """Read the bundle's tokenizers, by name. Raises BundleError."""
    specs = bundle.manifest.tokenizers
    return {name: PromptTokenizer(bundle.path(spec.file, check=check), spec) for name, spec in specs.items()}


def read_encoders(bundle: Bundle, engines: Mapping[str, Engine], *, check: Check) -> PromptEncoders:
    """Read the bundle's tokenizers for text encoders that are open. Raises BundleError."""
    return PromptEncoders(bundle.manifest, engines, read_tokenizers(bundle, check=check))


class PromptEncoders:
    """The encoders of a bundle, and which of them each denoiser takes, in what order. A shared one is there once.

    engines: by component; others may take their place
    """

    def __init__(
        self, manifest: Manifest, engines: Mapping[str, Engine], tokenizers: Mapping[str, PromptTokenizer]
    ) -> None:
        self.engines = engines
        self._readings = manifest.denoisers
        self._pooled = {name: _pooled_input(manifest, name) for name in manifest.denoisers}
        self._encoders: dict[TextSpec, TextEncoder] = {}
        for text in dict.fromkeys(text for reading in self._readings.values() for text in reading.text_encoders):
            if text.component is None or text.tokenizer is None:
                continue
            self._encoders[text] = TextEncoder(
                tokenizers[text.tokenizer],
                partial(self._run, text.component),  # the engine may be wrapped later, by what times it
                engines[text.component].spec,
                skip=text.skip,
                pooled=text.pooled,
                length=text.tokens,
            )

    def _run(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.engines[component](inputs)

    def __call__(self, prompts: Sequence[Prompt], negatives: Sequence[Prompt], *, denoiser: str) -> dict[str, Array]:
        """Encode a batch: a denoiser's inputs by name, the prompts' rows first and then the negative prompts'.

        negatives: as many as there are prompts, or none; zeros replace those that were not given, if the UNet was
            trained so
        """
        rows = [*prompts, *negatives]
        reading = self._readings[denoiser]
        batches = [self._batch(text, rows) for text in reading.text_encoders]
        inputs = {STATES: _joined(reading, batches, rows)}
        pooled = [batch.pooled for batch in batches if batch and batch.pooled is not None]
        if pooled:
            inputs[self._pooled[denoiser]] = np.concatenate(pooled, axis=-1)
        absent = [len(prompts) + i for i, prompt in enumerate(negatives) if not prompt.given]
        return _zeroed(inputs, absent) if reading.zero_negative and absent else inputs

    def _batch(self, text: TextSpec, rows: Sequence[Prompt]) -> Encoding | None:
        """Return what an encoder gives, None where there is none or the request leaves it out."""
        if text not in self._encoders or (text.optional and not all(prompt.t5 for prompt in rows)):
            return None
        return self._encoders[text].batch(rows)

    def tokens(self, prompts: Sequence[Prompt], *, denoiser: str) -> int:
        """Return how many tokens the longest prompt's encoding has. Raises RequestError on what cannot be read."""
        texts = self._readings[denoiser].text_encoders
        counts = [_fixed(text, prompts) or self._encoders[text].tokens(prompts) for text in texts]
        return joined_length(counts, [text.join for text in texts])

    def length(self, prompt: Prompt) -> int:
        """Return how many tokens a prompt itself has, as the first encoder reads it. Raises RequestError."""
        return next(iter(self._encoders.values())).length(prompt)

    def device_inputs(
        self, prompts: Sequence[Prompt], negatives: Sequence[Prompt], *, denoiser: str
    ) -> tuple[str, dict[str, Array]] | None:
        """Return the one text encoder and its inputs where what it gives is what `__call__` would give; else None."""
        reading = self._readings[denoiser]
        if len(reading.text_encoders) > 1 or (reading.zero_negative and not all(prompt.given for prompt in negatives)):
            return None
        encoder = self._encoders[reading.text_encoders[0]]
        inputs = None if reading.text_width else encoder.device_inputs([*prompts, *negatives])
        return None if inputs is None else (encoder.component, inputs)

    def adapt(self, weights: Mapping[str, str]) -> None:
        """Remember from now on what engines with other weights give, by component; the base's where none is named."""
        for encoder in self._encoders.values():
            encoder.weights = weights.get(encoder.component, "")

    @property
    def _learning(self) -> list[TextEncoder]:
        return [encoder for text, encoder in self._encoders.items() if text.tokens is None]

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Return the learned words that prompts may use."""
        return next(iter(self._encoders.values())).embeddings

    def add(self, word: LearnedWord) -> None:
        """Let prompts use a learned word: every encoder learns it, or none does. Raises RequestError.

        An encoder of a fixed length reads it as the text that it is.
        """
        learning = self._learning
        components = {encoder.component for encoder in learning}
        if not word.fits(components):
            expected = " and ".join(ENCODERS) if len(components) > 1 else "a single text encoder"
            raise RequestError(
                f"embeddings: '{word.name}' was learned for {word.origin}, expected {expected}; "
                "use a file that was trained for this family of checkpoints"
            )
        taught: list[TextEncoder] = []
        try:
            for encoder in learning:
                encoder.add(word.taught(encoder.component))
                taught.append(encoder)
        except RequestError:
            for encoder in taught:
                encoder.remove(word.name)
            raise

    def remove(self, name: str) -> None:
        """Make a learned word plain text again. Raises RequestError on a name that is not loaded."""
        for encoder in self._learning:
            encoder.remove(name)


def _pooled_input(manifest: Manifest, denoiser: str) -> str:
    """Return what a denoiser calls the pooled text."""
    return next((one.name for one in manifest.components[denoiser].inputs if one.name in POOLED), POOLED[0])


def _fixed(text: TextSpec, prompts: Sequence[Prompt]) -> int:
    """Return how many tokens a row has that is read whatever the prompt; 0 where there are chunks."""
    return (text.tokens and max(prompt.t5_tokens or text.tokens for prompt in prompts)) or 0


def _joined(reading: DenoiserSpec, batches: Sequence[Encoding | None], prompts: Sequence[Prompt]) -> Array:
    """Return what a denoiser attends to: (rows, tokens, width). batches: of each encoder, None for zeros"""
    dtype, texts = next(batch.states.dtype for batch in batches if batch), reading.text_encoders
    states = [
        # made as wide as the others
        batch.states if batch else np.zeros((len(prompts), _fixed(text, prompts), 1), dtype=dtype)
        for text, batch in zip(texts, batches, strict=True)
    ]
    joined = join_states(states, [text.join for text in texts])
    return joined if reading.text_width is None else _grown(joined, reading.text_width, axis=2)


def join_states(states: Sequence[Array], joins: Sequence[Join]) -> Array:
    """Return what a denoiser attends to, of what its encoders gave: (rows, tokens, width).

    states: of each encoder, (rows, its tokens, its width); joins: how each joins those before it
    """
    blocks = [_beside([states[i] for i in block]) for block in _blocks(joins)]
    return _after(blocks) if len(blocks) > 1 else blocks[0]


def joined_length(tokens: Sequence[int], joins: Sequence[Join]) -> int:
    """Return how many tokens are attended to. tokens: of each encoder"""
    return sum(max(tokens[i] for i in block) for block in _blocks(joins))


def _blocks(joins: Sequence[Join]) -> list[list[int]]:
    """Return the encoders that join by width, block after block."""
    blocks: list[list[int]] = [[]]
    for number, join in enumerate(joins):
        if join == "length" and number:
            blocks.append([])
        blocks[-1].append(number)
    return blocks


def _beside(states: Sequence[Array]) -> Array:
    """Concatenate states along the width, with zeros where another encoder's tokenizer needed more chunks."""
    longest = max(one.shape[1] for one in states)
    return np.concatenate([_grown(one, longest, axis=1) for one in states], axis=2) if len(states) > 1 else states[0]


def _after(blocks: Sequence[Array]) -> Array:
    """Put blocks one after another, the narrower ones filled up with zeros."""
    widest = max(block.shape[2] for block in blocks)
    return np.concatenate([_grown(block, widest, axis=2) for block in blocks], axis=1)


def _grown(states: Array, size: int, *, axis: int) -> Array:
    missing = size - states.shape[axis]
    return np.pad(states, [(0, missing if i == axis else 0) for i in range(3)]) if missing else states


def _zeroed(inputs: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    """Return the inputs with some rows zero: SDXL was trained with zeros where there is no text."""
    copies = {name: array.copy() for name, array in inputs.items()}
    for array in copies.values():
        array[list(rows)] = 0
    return copies
