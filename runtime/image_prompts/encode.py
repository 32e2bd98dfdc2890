"""From an image to the tokens that a denoiser attends to, in its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from latentrt.engines.bundle.manifest import ImagePromptSpec, Manifest
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import IMAGE_SCALE, IMAGE_TOKENS
from latentrt.runtime.image_prompts.resolve import ResolvedImage
from latentrt.runtime.text.encoder import Cache, Encoding

Run = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""runs a component of the bundle on its inputs"""

CACHE_BYTES = 64 << 20


class ImagePrompts:
    """Encodes images for a bundle's denoisers, and remembers those it has encoded. Safe to use from many threads."""

    def __init__(self, manifest: Manifest, run: Run, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._manifest, self._run, self._cache = manifest, run, Cache(cache_bytes)
        self._lock = threading.Lock()  # what an engine gives holds until its next call

    def __call__(
        self, images: Sequence[ResolvedImage], *, denoiser: str, pictures: int, guided: bool
    ) -> dict[str, Array]:
        """Return a denoiser's inputs by name, float32, the prompts' rows first and then the negative prompts'.

        They are zeros for adapters that are not asked for, and nothing where the denoiser attends to no images.
        guided: whether there are negative prompts
        """
        specs = self._manifest.denoisers[denoiser].image_prompts
        shapes = {tensor.name: tensor.shape[1:] for tensor in self._manifest.components[denoiser].inputs}
        rows = pictures * (2 if guided else 1)
        made = {
            name: np.zeros((rows, *map(int, shapes[name])), dtype=np.float32)
            for name in (IMAGE_TOKENS, IMAGE_SCALE)
            if name in shapes
        }
        start = 0
        for number, spec in enumerate(specs):
            asked = next((one for one in images if one.spec == spec and one.scale.any()), None)
            own = slice(start, start + spec.tokens)
            if asked is not None:
                made[IMAGE_SCALE][:, number] = asked.scale
                made[IMAGE_TOKENS][:pictures, own] = [self._tokens(spec, image) for image in asked.images]
                if guided:
                    made[IMAGE_TOKENS][pictures:, own] = self._tokens(spec, None)
            start = own.stop
        return made

    def _tokens(self, spec: ImagePromptSpec, image: Array | None) -> Array:
        """Return the tokens of an image, or of none for a negative prompt: (tokens, width).

        Each is encoded alone, so that its tokens do not depend on what is drawn beside it.
        """
        key = (spec.name, None if image is None else digest_of(image))
        with self._lock:
            kept = self._cache.get(key)
            if kept is None:
                given = self._no_image(spec) if image is None else self._encoded(spec, image)
                tokens = self._run(spec.projection, {spec.reads: given})[IMAGE_TOKENS][0]
                kept = Encoding(states=np.array(tokens, dtype=np.float32))
                self._cache.put(key, kept)
        return kept.states

    def _encoded(self, spec: ImagePromptSpec, image: Array) -> Array:
        from latentrt.runtime.images.clip import normalise  # with Pillow

        return self._encode(spec, normalise(image[None]))

    def _no_image(self, spec: ImagePromptSpec) -> Array:
        encoder = self._manifest.components[spec.encoder]
        if not spec.zero_negative:
            return self._encode(spec, np.zeros((1, *map(int, encoder.inputs[0].shape[1:])), dtype=np.float32))
        (output,) = (tensor for tensor in encoder.outputs if tensor.name == spec.reads)
        return np.zeros((1, *map(int, output.shape[1:])), dtype=np.float32)

    def _encode(self, spec: ImagePromptSpec, pixels: Array) -> Array:
        (pixel_values,) = self._manifest.components[spec.encoder].inputs
        return np.array(self._run(spec.encoder, {pixel_values.name: pixels})[spec.reads])


def digest_of(image: Array) -> bytes:
    """Return what tells an image from others."""
    import hashlib  # with OpenSSL, for what opens a bundle

    return hashlib.sha256(image.tobytes()).digest()
