"""Drawing in this process's own memory: the denoise stage in NumPy around the canonical UNet of any backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.spec import Array, Engine
from latentrt.engines.tensor_names import (
    COND,
    FRAMES,
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
    NOISE,
    STATE,
    WorkspaceShape,
    no_decoder,
    own_buffer,
)
from latentrt.engines.workspace.slot_workspace import HostBuffer, Rows, SlotWorkspace, at_once


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


class NumpyWorkspace(SlotWorkspace[HostBuffer]):
    """A workspace on which every call is done when it returns. It implements `Workspace`.

    Only rows that have a weight are computed, and no picture's numbers reach another's.

    engines: text encoders, the denoisers, decoders and ControlNets, each with its canonical inputs
    state_rows: what the sampler's plan needs; there is no larger state to carry
    denoiser: the network that its stages run
    decoder: the one that may be run, None for none
    """

    local = True

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
        super().__init__(shape, engines, state_rows=state_rows, denoiser=denoiser)
        if decoder is not None and decoder not in engines:
            raise no_decoder(decoder, engines)
        self._space, self._decoder = space, decoder
        self._size = (space.channels, shape.height // space.factor, shape.width // space.factor)
        self._keep(STATE, np.zeros((shape.pictures, state_rows, *self._size), np.float32))
        self._mixing: Mixing | None = None
        self._residuals: dict[str, Array] = {}  # what the ControlNets since the last stage add up to

    def _keep(self, name: str, array: Array) -> HostBuffer:
        self._buffers[name] = HostBuffer(array)
        return self._buffers[name]

    def _buffer(self, name: str, values: Array) -> HostBuffer | None:
        """Return a buffer as wide as what is first written to it."""
        if name in self._buffers or not values.ndim:
            return self._buffers.get(name)
        shape = (self._rows_in(name) or 1, *values.shape[1:])
        return self._keep(name, np.full(shape, AT_FIRST.get(name, 0.0), dtype=values.dtype))

    def _fetch(self, name: str) -> tuple[Array, Callable[[], None]]:
        return self._buffers[name].read(), at_once

    def _decode(self, program: str, rows: slice) -> None:
        latents = self._space.unscaled(self._buffers[STATE].array[rows, 0])
        seen = np.zeros(min(len(latents), self.shape.frames), np.float32)
        beside = {FRAMES: seen} if FRAMES in self._inputs(program) else {}
        decoded = self._programs[program]({"latent_sample": latents, **beside})
        self._show_decoded(decoded[PIXELS], decoded[SQUARES], rows)

    def _mixed(self, rows: Rows) -> tuple[Mixing, StageControl]:
        """Return how the rows of a stage are mixed, and what controls it."""
        if self._mixing is None or self._mixing.rows is not rows:
            self._mixing = Mixing(rows)
        return self._mixing, split_control(self._given[CONTROL], self.state_rows)

    def _own(self, mixing: Mixing, control: StageControl) -> dict[str, Array]:
        """Return what every network of a stage takes, a row each."""
        state = self._buffers[STATE].array
        latents = (control.input_row[:, None] @ state.reshape(*state.shape[:2], -1)).reshape(-1, *state.shape[2:])
        return {"sample": latents[mixing.owners], "timestep": control.timesteps[mixing.owners]}

    def _advance(self, rows: Rows) -> None:
        """Run the denoiser; what leaves the range of float32 is found when it is read."""
        with np.errstate(over="ignore", invalid="ignore"):
            (mixing, control), state = self._mixed(rows), self._buffers[STATE].array
            guided = mix(mixing, self._model(mixing, control), control.rescale)
            following = transit(control.transition, state, guided, self._given.get(NOISE))
            if "keep_mask" in self._buffers:
                following[:, 0] = self._kept(following[:, 0], control.level)
        self._keep(PREVIOUS, state)
        self._keep(STATE, following)
        self._residuals = {}

    def _model(self, mixing: Mixing, control: StageControl) -> Array:
        own = self._own(mixing, control)
        added = self._residuals or self._no_residuals(self._denoiser, len(mixing.owners))
        if "condition" in self._buffers:
            condition = self._buffers["condition"].array[mixing.owners]
            own["sample"] = np.concatenate([own["sample"], condition], axis=1)
        return np.asarray(self._call(self._denoiser, own | added, mixing)["out_sample"], dtype=np.float32)

    def _follow(self, program: str, rows: Rows) -> None:
        """Run a ControlNet on what those before it added up to, for the rows that follow it."""
        mixing, control = self._mixed(rows)
        scales = self._buffers[own_buffer(program, SCALE)].array
        added = self._residuals or self._no_residuals(program, len(mixing.owners))
        follows = scales[mixing.used] != 0
        own = mixing if follows.all() else Mixing(_rows_that(rows, follows))
        before = {name: array[follows] for name, array in added.items()}
        hint = self._buffers[hint_of(program)].array[own.owners]
        given = self._call(program, {**self._own(own, control), **before, COND: hint, SCALE: scales[own.used]}, own)
        self._residuals = {name: _put_rows(array, given[NEXT + name], follows) for name, array in added.items()}

    def _no_residuals(self, program: str, rows: int) -> dict[str, Array]:
        """Return zeros for what ControlNets add; nothing if a network takes no residuals."""
        axes = {"batch": rows, **level_axes(*self._size[1:])}
        return {
            tensor.name: np.zeros(
                [axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape], tensor.dtype
            )
            for tensor in self._programs[program].spec.inputs
            if is_residual(tensor.name)
        }

    def _call(self, program: str, given: Mapping[str, Array], mixing: Mixing) -> Mapping[str, Array]:
        """Run a network on what is given, and on the used rows of what was written."""
        if FRAMES in self._inputs(program):
            given = {**given, FRAMES: np.zeros(self.shape.frames, dtype=np.float32)}
        names = [name for name in self._inputs(program) if name not in given]
        own = {name: self._buffers[name].array[mixing.used] for name in names}
        return self._by_window(self._programs[program], {**given, **own}, len(mixing.owners))

    def _by_window(self, network: Engine, given: Mapping[str, Array], rows: int) -> Mapping[str, Array]:
        """Run a network on all rows at once, or on those of one window: a long video would fill the memory."""
        each = self.shape.frames
        if each == 1 or rows <= each:
            return network(given)
        parts = []
        for first in range(0, rows, each):
            some = {name: a if name == FRAMES else a[first : first + each] for name, a in given.items()}
            parts.append({name: np.array(array) for name, array in network(some).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _kept(self, drawn: Array, level: Array) -> Array:
        self._written.require("known", ALL)
        mask, known = self._buffers["keep_mask"].array, self._buffers["known"].array
        kept = np.einsum("pk,pk...->p...", level, known)
        return np.asarray(mask * drawn + (1 - mask) * kept, dtype=np.float32)


def _rows_that(rows: Rows, follows: Array) -> Rows:
    """Return some of a stage's rows. follows: a bool for each that has a weight"""
    some = copy.copy(rows)
    some.weighted = rows.weighted.copy()
    some.weighted[rows.weighted] = follows
    return some


def _put_rows(array: Array, rows: Array, where: Array) -> Array:
    """Return an array with some of its rows replaced. where: (rows of the array,) bool"""
    if where.all():
        return rows
    found = array.copy()
    found[where] = rows
    return found


class Mixing:
    """How the outputs of the m model rows that have a weight become those of P pictures."""

    def __init__(self, rows: Rows) -> None:
        index = np.flatnonzero(rows.weighted)
        self.rows = rows
        self.used = slice(0, len(index)) if rows.weighted[: len(index)].all() else index
        self.owners = rows.owners[index]  # (m,)
        self.parts: list[tuple[Array | slice, Array | slice, Array]] = []  # see `mix`
        for some in _without_repeats(self.owners):
            own = self.owners[some]
            weights = rows.guidance[own, index[some]].reshape(-1, 1, 1, 1)
            everybody = np.array_equal(own, np.arange(len(rows.pictures)))
            self.parts.append((_as_slice(some), ALL if everybody else own, weights))


def _without_repeats(owners: Array) -> Iterator[Array]:
    """Yield places of owners, in order, each time one of every owner that has some left."""
    left = np.arange(len(owners))
    while left.size:
        first = np.unique(owners[left], return_index=True)[1]
        yield left[np.sort(first)]
        left = np.delete(left, first)


def _as_slice(places: Array) -> Array | slice:
    """Return places one behind another as a slice: what lies there is then not copied."""
    first, last = int(places[0]), int(places[-1]) + 1
    return slice(first, last) if last - first == len(places) else places


def mix(mixing: Mixing, outputs: Array, rescale: Array) -> Array:
    """Return every picture's guided output, with its own contrast restored: (P, C, h, w), zeros where it has no row.

    Each is a sum over the picture's own rows, so that what is not finite stays with its picture. rescale: (P,)
    """
    guided = np.zeros((len(rescale), *outputs.shape[1:]), dtype=np.float32)
    for some, own, weights in mixing.parts:
        guided[own] += weights * outputs[some]
    for picture in np.flatnonzero(rescale):
        own_row = np.flatnonzero(mixing.owners == picture)[0]  # the prompt's comes first
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
