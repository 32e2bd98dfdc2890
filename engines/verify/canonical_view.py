"""Engines that were built for the denoising loop, seen as the checkpoint's own networks: what `verify` compares.

The fused denoise stage with a transition that takes only the model's output is the UNet, the decoder that begins
at the sampler's state is the VAE's decoder, and the text encoder that takes learned words is one without any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, Engine, EngineView, Inputs
from latentrt.engines.tensor_names import COND, EXTRA_EMBEDDINGS, FRAMES, HINT, control_width

if TYPE_CHECKING:
    import numpy.typing as npt

STATE, CONTROL = "state", "control"
# What an input of the stage holds where it must have no effect; any that is not named here holds zeros.
NEUTRAL = {"keep_mask": 1.0}
# The numbers of `stage.control_width` before the input row: timestep, rescaling, two weights of what is kept.
HEAD = 4


def as_canonical(engine: Engine, space: LatentSpec, *, pictures: int | None = None, slots: int | None = None) -> Engine:
    """Return an engine with the inputs and outputs of the checkpoint's own network; most are that already.

    pictures: of a UNet, how many pictures its model rows belong to, None for one each; row r belongs to picture
        r % pictures, and its sample must be that of row r % pictures
    slots: the pictures that it is compiled for, None for as many; those that no row belongs to are blank
    """
    names = {tensor.name for tensor in engine.spec.inputs}
    if EXTRA_EMBEDDINGS in names:
        return _TextEncoder(engine)
    if STATE not in names:
        return engine
    if HINT in names:
        return _ControlNet(engine, pictures, slots)
    if CONTROL in names:
        return _Unet(engine, pictures, slots)
    return _Decoder(engine, space)


class _TextEncoder(EngineView):
    """Tokens in, none of them from the extra embeddings."""

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        (extra,) = (tensor for tensor in self.spec.inputs if tensor.name == EXTRA_EMBEDDINGS)
        shape = [axis if isinstance(axis, int) else 1 for axis in extra.shape]
        return self._engine({**inputs, EXTRA_EMBEDDINGS: np.zeros(shape, dtype=extra.dtype)})


class _FromState(EngineView):
    """A view of an engine that reads the sampler's state."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._state = next(tensor for tensor in engine.spec.inputs if tensor.name == STATE)

    def _state_of(self, latents: Array) -> Array:
        """Return a state whose first row is (n, C, h, w), the others zeros."""
        rows = int(self._state.shape[1])
        state = np.zeros((len(latents), rows, *latents.shape[1:]), dtype=np.float32)
        state[:, 0] = latents
        return state


class _Decoder(_FromState):
    """Latents as the VAE takes them in, pixels out."""

    def __init__(self, engine: Engine, space: LatentSpec) -> None:
        super().__init__(engine)
        self._space = space

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        latents = np.asarray(inputs["latent_sample"], dtype=np.float32)
        beside = {name: array for name, array in inputs.items() if name == FRAMES}
        return self._engine({STATE: self._state_of(self._space.scaled(latents)), **beside})


class _FromControl(_FromState):
    """A view of an engine that reads the stage's control too: model rows in, of which row r is picture r % pictures."""

    def __init__(self, engine: Engine, pictures: int | None, slots: int | None) -> None:
        super().__init__(engine)
        self._pictures, self._slots = pictures, slots

    def _rows(self, inputs: Inputs) -> tuple[Array, int]:
        """Return the sample of each picture, and how many model rows there are. Raises EngineError."""
        sample = np.asarray(inputs["sample"], dtype=np.float32)
        rows, pictures = len(sample), self._pictures or len(sample)
        if rows % pictures or any(not np.array_equal(sample[i], sample[i % pictures]) for i in range(rows)):
            component = self.spec.component
            raise EngineError(f"{component}: expected {rows} rows of which row r is that of picture r % {pictures}")
        return sample[:pictures], rows

    def _blank(self, array: Array) -> Array:
        """Return an array with a row for each picture, with zeros for the pictures that no row belongs to."""
        missing = max(0, (self._slots or 0) - len(array))
        return np.concatenate([array, np.zeros((missing, *array.shape[1:]), dtype=array.dtype)])

    def _control(self, timesteps: Array) -> Array:
        """Return control that reads the state's first row and writes the model's output over it."""
        rows = int(self._state.shape[1])
        row = np.zeros(control_width(rows), dtype=np.float32)
        row[HEAD] = 1.0  # the input row: the state's first
        row[HEAD + rows + rows] = 1.0  # the transition, (rows, rows + 2): the model's output into the first row
        control = np.tile(row, (len(timesteps), 1))
        control[:, 0] = timesteps
        return control


class _ControlNet(_FromControl):
    """What a ControlNet takes in, a row each, and the residuals with its own out."""

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        sample, rows = self._rows(inputs)
        made: Inputs = {
            STATE: self._blank(self._state_of(sample)),
            "control": self._blank(self._control(np.resize(inputs["timestep"], len(sample)))),
            "picture_of_row": np.arange(rows) % len(sample),
            HINT: self._blank(np.asarray(inputs[COND], dtype=np.float32)[: len(sample)]),
        }
        return self._engine({tensor.name: {**inputs, **made}[tensor.name] for tensor in self.spec.inputs})


class _Unet(_FromControl):
    """Sample, timestep and text in, a row each, the model's output out."""

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the stage as often as it takes to see every model row: once for each row of a picture."""
        sample, rows = self._rows(inputs)
        pictures, turns = len(sample), []
        feeds = self._feeds(inputs, sample, rows)
        for first in range(0, rows, pictures):
            guidance = self._blank(np.eye(pictures, rows, k=first, dtype=np.float32))
            turns.append(self._engine({**feeds, "guidance": guidance})["next_state"][:pictures, 0].copy())
        return {"out_sample": np.concatenate(turns)}

    def _feeds(self, inputs: Inputs, sample: Array, rows: int) -> dict[str, npt.ArrayLike]:
        """Return every input of the stage: made of the UNet's, the UNet's own, or what has no effect."""
        pictures, _, height, width = sample.shape
        channels = int(self._state.shape[2])
        made: Inputs = {
            STATE: self._blank(self._state_of(sample[:, :channels])),
            "control": self._blank(self._control(np.resize(inputs["timestep"], pictures))),
            "picture_of_row": np.arange(rows) % pictures,
            "condition": self._blank(sample[:, channels:]),
        }
        sizes = {
            "pictures": max(pictures, self._slots or 0),
            "rows": rows,
            "latent_height": height,
            "latent_width": width,
        }
        feeds = {}
        for tensor in self._engine.spec.inputs:
            if tensor.name in made:
                feeds[tensor.name] = made[tensor.name]
            elif tensor.name in inputs:
                feeds[tensor.name] = inputs[tensor.name]
            else:
                shape = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape)
                feeds[tensor.name] = np.full(shape, NEUTRAL.get(tensor.name, 0.0), dtype=tensor.dtype)
        return feeds
