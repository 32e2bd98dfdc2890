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
        self._rows: Rows | None = None  # of the stages to come, once they are known
        self._residuals: dict[str, Array] = {}  # what the ControlNets since the last stage add up to

    def fit(self, program: str, rows: int) -> int:
        """Return the number itself: any will do."""
        return rows

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Keep a copy of rows. Raises EngineError if they are of another shape."""
        values, size = np.asarray(array), rows_in(name, self.shape.pictures)
        if size is None:
            self._buffers[name], rows, size = np.array(values), ALL, 1
            self._rows = None if name in (GUIDANCE, OWNERS) else self._rows
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

    def _stage(self) -> tuple[Rows, StageControl]:
        """Return what the next stage runs on, and what controls it."""
        if self._rows is None:
            self._rows = Rows(*(self._needed(name) for name in (GUIDANCE, OWNERS)))
        if STATE not in self._rows.met:
            self._written.require(STATE, self._rows.pictures)
            self._rows.met.add(STATE)
        return self._rows, split_control(self._needed(CONTROL), self.state_rows)

    def _own(self, rows: Rows, control: StageControl) -> dict[str, Array]:
        """Return what every network of a stage takes, a row each."""
        state = self._buffers[STATE]
        latents = (control.input_row[:, None] @ state.reshape(*state.shape[:2], -1)).reshape(-1, *state.shape[2:])
        return {"sample": latents[rows.owners], "timestep": control.timesteps[rows.owners]}

    def _advance(self) -> None:
        (rows, control), state = self._stage(), self._buffers[STATE]
        guided = mix(rows, self._model(rows, control), control.rescale)
        following = transit(control.transition, state, guided, self._buffers.pop(NOISE, None))
        if "keep_mask" in self._buffers:
            following[:, 0] = self._kept(following[:, 0], control.level)
        self._buffers |= {PREVIOUS: state, STATE: following}
        self._written.note(PREVIOUS, rows.pictures, len(state))
        self._written.forget(CONTROL, NOISE)
        self._residuals = {}

    def _model(self, rows: Rows, control: StageControl) -> Array:
        own = self._own(rows, control)
        added = self._residuals or self._no_residuals(self._denoiser, len(rows.owners))
        if "condition" in self._buffers:
            own["sample"] = np.concatenate([own["sample"], self._buffers["condition"][rows.owners]], axis=1)
        return np.asarray(self._call(self._denoiser, own | added, rows)["out_sample"], dtype=np.float32)

    def _follow(self, program: str) -> None:
        """Run a ControlNet on what those before it added up to, for the rows that follow it."""
        rows, control = self._stage()
        added = self._residuals or self._no_residuals(program, len(rows.owners))
        follows = self._used(own_buffer(program, SCALE), rows) != 0
        own = rows if follows.all() else self._rows_that(rows, follows)
        before = {name: array[follows] for name, array in added.items()}
        hint = self._needed(hint_of(program), own.pictures)[own.owners]
        scale = self._used(own_buffer(program, SCALE), own)
        given = self._call(program, {**self._own(own, control), **before, COND: hint, SCALE: scale}, own)
        self._residuals = {name: _put_rows(array, given[NEXT + name], follows) for name, array in added.items()}

    def _rows_that(self, rows: Rows, follows: Array) -> Rows:
        """Return some of a stage's rows. follows: (m,) bool"""
        guidance, owners = (self._buffers[name] for name in (GUIDANCE, OWNERS))
        weighted = rows.weighted.copy()
        weighted[rows.weighted] = follows
        return Rows(np.where(weighted, guidance, 0), owners)

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

    def _call(self, program: str, given: Mapping[str, Array], rows: Rows) -> dict[str, Array]:
        """Run a network on what is given, and on the used rows of what was written."""
        names = [name for name in self._inputs(program) if name not in given]
        return self._engines[program]({**given, **{name: self._used(name, rows) for name in names}})

    def _used(self, name: str, rows: Rows) -> Array:
        if name not in rows.met:
            self._written.require(name, rows.weighted)
            rows.met.add(name)
        return self._buffers[name][rows.used]

    def _kept(self, drawn: Array, level: Array) -> Array:
        mask, known = self._buffers["keep_mask"], self._needed("known")
        kept = np.einsum("pk,pk...->p...", level, known)
        return np.asarray(mask * drawn + (1 - mask) * kept, dtype=np.float32)


def _put_rows(array: Array, rows: Array, where: Array) -> Array:
    """Return an array with some of its rows replaced. where: (rows of the array,) bool"""
    if where.all():
        return rows
    found = array.copy()
    found[where] = rows
    return found


class Rows:
    """The m of M model rows that have a weight in the stages of P slots, whose pictures take part in them."""

    def __init__(self, guidance: Array, owners: Array) -> None:
        """Take what was written: (P, M) and (M,)."""
        slots = len(guidance)
        self.weighted = (guidance != 0).any(axis=0)  # (M,)
        self.pictures = (guidance != 0).any(axis=1)  # (P,)
        index = np.flatnonzero(self.weighted)
        self.used = slice(0, len(index)) if self.weighted[: len(index)].all() else index
        self.owners = owners[index]
        self.met: set[str] = set()  # the buffers that are known to have what these rows need
        self.parts: list[tuple[slice, Array | slice, Array]] = []  # see `mix`
        for part in range(-(-len(owners) // slots)):  # prompts, then negative prompts: a picture has one row in each
            start, stop = np.searchsorted(index, (part * slots, (part + 1) * slots))
            own = index[start:stop] - part * slots
            weights = guidance[own, index[start:stop]].reshape(-1, 1, 1, 1)
            self.parts.append((slice(start, stop), ALL if len(own) == slots else own, weights))


def mix(rows: Rows, outputs: Array, rescale: Array) -> Array:
    """Return every picture's guided output, with its own contrast restored: (P, C, h, w), zeros where it has no row.

    Each is a sum over the picture's own rows, so that what is not finite stays with its picture. rescale: (P,)
    """
    guided = np.zeros((len(rows.pictures), *outputs.shape[1:]), dtype=np.float32)
    for some, own, weights in rows.parts:
        guided[own] += weights * outputs[some]
    for picture in np.flatnonzero(rescale):
        own_row = np.flatnonzero(rows.owners == picture)[0]  # the prompt's comes first
        guided[picture] *= contrast_factor(outputs[own_row], guided[picture], rescale[picture])
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
