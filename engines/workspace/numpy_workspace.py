"""Drawing in this process's own memory: the denoise stage in NumPy around the canonical UNet of any backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, Engine
from latentrt.engines.tensor_names import (
    COND,
    NEXT,
    PIXELS,
    PREVIOUS,
    SCALE,
    SQUARES,
    hint_of,
    is_residual,
    level_axes,
)
from latentrt.engines.workspace.contract import (
    ALL,
    AT_FIRST,
    CONTROL,
    GUIDANCE,
    IDS,
    NOISE,
    OWNERS,
    PER_STAGE,
    STATE,
    TEXT,
    Event,
    Instant,
    WorkspaceShape,
    Written,
    no_decoder,
    own_buffer,
    rows_in,
    span,
)

if TYPE_CHECKING:
    import numpy.typing as npt


class StageControl(NamedTuple):
    """The numbers that control one stage, as `stage.control_width` lists them, for P pictures with R rows of state."""

    timesteps: Array  # (P,)
    rescale: Array  # (P,)
    level: Array  # (P, 2)
    input_row: Array  # (P, R)
    transition: Array  # (P, R, R + 2)


def split_control(control: Array, state_rows: int) -> StageControl:
    """Take the rows of numbers apart. control: (P, control_width(state_rows))."""
    row_end = 4 + state_rows
    return StageControl(
        timesteps=control[:, 0],
        rescale=control[:, 1],
        level=control[:, 2:4],
        input_row=control[:, 4:row_end],
        transition=control[:, row_end:].reshape(-1, state_rows, state_rows + 2),
    )


class NumpyWorkspace:
    """A workspace on which every call is done when it returns. It implements `Workspace`.

    Only rows that have a weight are computed, and no picture's numbers reach another's.

    engines: text encoders, the denoisers, decoders and ControlNets, each with its canonical inputs
    state_rows: what the sampler's plan needs; there is no larger state to carry
    denoiser: the network that its stages run
    decoder: the one that may be run, None for none
    """

    queued, local = False, True

    def __init__(
        self,
        engines: Mapping[str, Engine],
        space: LatentSpec,
        shape: WorkspaceShape,
        *,
        state_rows: int,
        denoiser: str,
        decoder: str | None,
    ) -> None:
        if decoder is not None and decoder not in engines:
            raise no_decoder(decoder, engines)
        self.shape, self.state_rows = shape, state_rows
        self._engines, self._space = engines, space
        self._denoiser, self._decoder = denoiser, decoder
        self._size = (space.channels, shape.height // space.factor, shape.width // space.factor)
        self._buffers: dict[str, Array] = {STATE: np.zeros((shape.pictures, state_rows, *self._size), np.float32)}
        self._written = Written()
        self._residuals: dict[str, Array] = {}  # what the ControlNets since the last stage add up to

    def fit(self, program: str, rows: int) -> int:
        """Return the number itself: any will do."""
        return rows

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Keep a copy of rows. Raises EngineError if they are of another shape."""
        values, size = np.asarray(array), rows_in(name, self.shape.pictures)
        if size is None:
            self._buffers[name], rows, size = np.array(values), ALL, 1
        elif name in self._buffers or values.ndim:
            rows = span(name, values, rows, size)
            self._put(name, values, rows, size)
        self._written.note(name, rows, size)
        if name == STATE:
            self._written.forget(PREVIOUS, rows=rows)

    def _put(self, name: str, values: Array, rows: slice, size: int) -> None:
        if name not in self._buffers:
            self._buffers[name] = np.full((size, *values.shape[1:]), AT_FIRST.get(name, 0.0), dtype=values.dtype)
        buffer = self._buffers[name]
        if values.ndim and values.shape[1:] != buffer.shape[1:]:
            raise EngineError(f"{name}: found shape {values.shape}, expected {(len(values), *buffer.shape[1:])}")
        buffer[rows] = values

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Return a copy of rows of a buffer."""
        self._written.require(name, rows)
        return self._buffers[name][slice(self._written.extent(name)) if rows == ALL else rows].copy()

    def event(self) -> Event:
        """Note the time."""
        return Instant()

    def run(self, program: str, rows: slice = ALL) -> None:
        """Run a program; what leaves the range of float32 is found when it is read."""
        if program == self._denoiser:
            with np.errstate(over="ignore", invalid="ignore"):
                self._advance()
        elif program == self._decoder:
            self._decode(self._decoder, rows)
        elif IDS in self._inputs(program):
            self._encode(program, rows)
        elif COND in self._inputs(program):
            self._follow(program)
        else:
            raise no_decoder(program, self._engines)

    def _inputs(self, program: str) -> list[str]:
        engine = self._engines.get(program)
        return [tensor.name for tensor in engine.spec.inputs] if engine else []

    def _needed(self, name: str, rows: slice | Array = ALL) -> Array:
        self._written.require(name, rows)
        return self._buffers[name]

    def _encode(self, program: str, rows: slice) -> None:
        given = {name: self._needed(own_buffer(program, name)) for name in self._inputs(program)}
        output = self._engines[program](given)["last_hidden_state"]
        self.write(TEXT, output.reshape(-1, self.shape.tokens, output.shape[-1]), rows)

    def _decode(self, program: str, rows: slice) -> None:
        latents = self._needed(STATE, rows)[rows, 0] / np.float32(self._space.scaling_factor)
        decoded = self._engines[program]({"latent_sample": latents})
        for name in (PIXELS, SQUARES):
            self.write(name, decoded[name], slice(rows.start or 0, (rows.start or 0) + len(latents)))

    def _rows(self) -> Rows:
        """Return what the next stage runs on: the rows that have a weight."""
        guidance, owners = (self._needed(name) for name in (GUIDANCE, OWNERS))
        used = (guidance != 0).any(axis=0)
        self._written.require(STATE, (guidance != 0).any(axis=1))
        control = split_control(self._needed(CONTROL), self.state_rows)
        return Rows(guidance=guidance[:, used], used=used, owners=owners[used], control=control)

    def _own(self, rows: Rows) -> dict[str, Array]:
        """Return what every network of a stage takes, a row each."""
        latents = np.einsum("pr,pr...->p...", rows.control.input_row, self._buffers[STATE])
        return {"sample": latents[rows.owners], "timestep": rows.control.timesteps[rows.owners]}

    def _advance(self) -> None:
        rows, state = self._rows(), self._buffers[STATE]
        outputs = self._model(rows)
        guided = mix(rows, outputs)
        noise = self._buffers.pop(NOISE, None)
        following = transit(rows.control.transition, state, guided, noise)
        if "keep_mask" in self._buffers:
            following[:, 0] = self._kept(following[:, 0], rows.control.level)
        self._buffers |= {PREVIOUS: state, STATE: following}
        self._written.note(PREVIOUS, (rows.guidance != 0).any(axis=1), len(state))
        self._written.forget(*PER_STAGE)
        self._residuals = {}

    def _model(self, rows: Rows) -> Array:
        own = self._own(rows)
        added = self._residuals or self._no_residuals(self._denoiser, len(rows.owners))
        if "condition" in self._buffers:
            own["sample"] = np.concatenate([own["sample"], self._buffers["condition"][rows.owners]], axis=1)
        return np.asarray(self._call(self._denoiser, own | added, rows.used)["out_sample"], dtype=np.float32)

    def _follow(self, program: str) -> None:
        """Run a ControlNet on what those before it added up to."""
        rows = self._rows()
        added = self._residuals or self._no_residuals(program, len(rows.owners))
        hint = self._needed(hint_of(program), (rows.guidance != 0).any(axis=1))[rows.owners]
        scale = self._used(own_buffer(program, SCALE), rows.used)
        given = self._call(program, {**self._own(rows), **added, COND: hint, SCALE: scale}, rows.used)
        self._residuals = {name: given[NEXT + name] for name in added}

    def _no_residuals(self, program: str, rows: int) -> dict[str, Array]:
        """Return zeros for what ControlNets add; nothing if a network takes no residuals."""
        axes = {"batch": rows, **level_axes(*self._size[1:])}
        return {
            tensor.name: np.zeros(
                [axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape], tensor.dtype
            )
            for tensor in self._engines[program].spec.inputs
            if is_residual(tensor.name)
        }

    def _call(self, program: str, given: Mapping[str, Array], used: Array) -> dict[str, Array]:
        """Run a network on what is given, and on the used rows of what was written."""
        names = [name for name in self._inputs(program) if name not in given]
        return self._engines[program]({**given, **{name: self._used(name, used) for name in names}})

    def _used(self, name: str, used: Array) -> Array:
        return self._needed(name, used)[: len(used)][used]

    def _kept(self, drawn: Array, level: Array) -> Array:
        mask, known = self._buffers["keep_mask"], self._needed("known")
        kept = np.einsum("pk,pk...->p...", level, known)
        return np.asarray(mask * drawn + (1 - mask) * kept, dtype=np.float32)


class Rows(NamedTuple):
    """The m of M model rows that have a weight in a stage. guidance: (P, m); used: (M,) bool; owners: (m,)"""

    guidance: Array
    used: Array
    owners: Array
    control: StageControl


def mix(rows: Rows, outputs: Array) -> Array:
    """Return every picture's guided output, with its own contrast restored: (P, C, h, w), zeros where it has no row.

    Each is a sum over the picture's own rows, so that what is not finite stays with its picture.
    """
    guided = np.zeros((len(rows.guidance), *outputs.shape[1:]), dtype=np.float32)
    first = np.cumsum(rows.used) - 1  # the prompt's own row of the picture in slot p is row p
    for picture in np.flatnonzero((rows.guidance != 0).any(axis=1)):
        own = np.flatnonzero(rows.guidance[picture])
        guided[picture] = np.tensordot(rows.guidance[picture, own], outputs[own], axes=1)
        if rescale := rows.control.rescale[picture]:
            guided[picture] *= contrast_factor(outputs[first[picture]], guided[picture], rescale)
    return guided


def transit(transition: Array, state: Array, output: Array, noise: Array | None) -> Array:
    """Return transition @ [state; output; noise] for every picture.

    transition: (P, R, R + 2); state: (P, R, C, h, w); output and noise: (P, C, h, w); None is noise of no weight
    returns: (P, R, C, h, w), float32
    """
    parts = [state, output[:, None], *([] if noise is None else [noise[:, None]])]
    rows = np.concatenate(parts, axis=1).astype(np.float32, copy=False)
    weights = transition if noise is not None else transition[:, :, :-1]
    flat = weights @ rows.reshape(*rows.shape[:2], -1)
    return np.asarray(flat, dtype=np.float32).reshape(state.shape)


def contrast_factor(own: Array, guided: Array, rescale: float) -> np.float32:
    """Return what restores the contrast of a prompt's own output in the guided one.

    rescale: how much of it, 0 to 1. arXiv:2305.08891, eqs. 14 to 16
    """
    ratio = own.std() / max(float(guided.std()), 1e-10)
    return np.float32(rescale * ratio + (1 - rescale))
