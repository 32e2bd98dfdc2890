"""Drawing in this process's own memory: the denoise stage in NumPy around the canonical UNet of any backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, Engine
from latentrt.engines.tensor_names import (
    COND,
    DECODER,
    NEXT,
    PIXELS,
    PREVIOUS,
    SCALE,
    SQUARES,
    UNET,
    hint_of,
    is_residual,
    level_axes,
)
from latentrt.engines.workspace.contract import (
    ImmediateWorkspace,
    StageInput,
    WorkspaceShape,
    no_decoder,
    sums_of_squares,
)


class Control(NamedTuple):
    """The numbers that control one stage, as `stage.control_width` lists them, for P pictures with R rows of state."""

    timesteps: Array  # (P,)
    rescale: Array  # (P,)
    level: Array  # (P, 2)
    input_row: Array  # (P, R)
    transition: Array  # (P, R, R + 2)


def split_control(control: Array, state_rows: int) -> Control:
    """Take the rows of numbers apart. control: (P, control_width(state_rows))."""
    row_end = 4 + state_rows
    return Control(
        timesteps=control[:, 0],
        rescale=control[:, 1],
        level=control[:, 2:4],
        input_row=control[:, 4:row_end],
        transition=control[:, row_end:].reshape(-1, state_rows, state_rows + 2),
    )


class NumpyWorkspace(ImmediateWorkspace):
    """A workspace on which every call is done when it returns. It implements `Workspace`.

    engines: text_encoder, the denoisers, decoders and ControlNets, each with its canonical inputs
    state_rows: what the sampler's plan needs; there is no larger state to carry
    denoiser: the network that its stages run
    decoder: what `decode` runs, None for nothing
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        space: LatentSpec,
        shape: WorkspaceShape,
        *,
        state_rows: int,
        denoiser: str = UNET,
        decoder: str | None = DECODER,
    ) -> None:
        super().__init__()
        if decoder is not None and decoder not in engines:
            raise no_decoder(decoder, engines)
        self._decoder = decoder
        self.shape, self.state_rows = shape, state_rows
        self._engines, self._space, self._denoiser = engines, space, denoiser
        self._size = (space.channels, shape.height // space.factor, shape.width // space.factor)
        self._written: dict[str, Array] = {}

    def encode(self, inputs: Mapping[str, Array]) -> None:
        """Run the text encoder and keep its output as the stage's text."""
        output = self._engines["text_encoder"](inputs)["last_hidden_state"]
        self._written["encoder_hidden_states"] = output.reshape(-1, self.shape.tokens, output.shape[-1]).copy()

    def write(self, name: str, array: Array) -> None:
        """Keep a copy of one of the stage's inputs. Raises EngineError where the state is of another shape."""
        expected = (self.shape.pictures, self.state_rows, *self._size)
        if name == "state" and array.shape != expected:
            raise EngineError(f"state: found shape {array.shape}, expected {expected}")
        self._written[name] = np.array(array)
        if name == "state":
            self._written.pop(PREVIOUS, None)

    def advance(self, stage: StageInput) -> None:
        """Run one denoise stage in NumPy around the UNet; what leaves float32's range is left to `lost`."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._advance(stage)

    def _advance(self, stage: StageInput) -> None:
        control = split_control(stage.control, self.state_rows)
        state = self._read("state")
        outputs = self._unet(np.einsum("pr,pr...->p...", control.input_row, state), control, stage)
        guided = np.tensordot(stage.guidance, outputs, axes=1)
        if control.rescale.any():
            guided *= contrast_factor(outputs[: len(state)], guided, control.rescale)
        following = transit(control.transition, state, guided, stage.noise)
        if "keep_mask" in self._written:
            following[:, 0] = self._kept(following[:, 0], control.level)
        self._written |= {PREVIOUS: state, "state": following}

    def _unet(self, latents: Array, control: Control, stage: StageInput) -> Array:
        owners = stage.picture_of_row
        own = {"sample": latents[owners], "timestep": control.timesteps[owners]}
        added = self._residuals(own, stage)
        if "condition" in self._written:
            own["sample"] = np.concatenate([own["sample"], self._written["condition"][owners]], axis=1)
        return np.asarray(self._run(self._denoiser, own | added)["out_sample"], dtype=np.float32)

    def _residuals(self, own: Mapping[str, Array], stage: StageInput) -> dict[str, Array]:
        """Return what the stage's ControlNets add to the UNet: nothing, where it takes nothing of the kind."""
        rows = len(stage.picture_of_row)
        axes = {"batch": rows, **level_axes(*self._size[1:])}
        added = {
            spec.name: np.zeros([axis if isinstance(axis, int) else axes[axis] for axis in spec.shape], spec.dtype)
            for spec in self._engines[self._denoiser].spec.inputs
            if is_residual(spec.name)
        }
        for component, scale in stage.scales.items():
            hint = self._read(hint_of(component))[stage.picture_of_row]
            given = self._run(component, {**own, **added, COND: hint, SCALE: scale})
            added = {name: given[NEXT + name] for name in added}
        return added

    def _run(self, component: str, given: Mapping[str, Array]) -> dict[str, Array]:
        """Run a network on what is given, and on what was written, a row for each of the sample's."""
        engine, rows = self._engines[component], len(given["sample"])
        names = [spec.name for spec in engine.spec.inputs if spec.name not in given]
        return engine({**given, **{name: self._read(name)[:rows] for name in names}})

    def _kept(self, drawn: Array, level: Array) -> Array:
        mask, known = self._written["keep_mask"], self._read("known")
        kept = np.einsum("pk,pk...->p...", level, known)
        return np.asarray(mask * drawn + (1 - mask) * kept, dtype=np.float32)

    def _read(self, name: str) -> Array:
        try:
            return self._written[name]
        except KeyError:
            raise EngineError(f"{name} was not written to the workspace before it was needed") from None

    def decode(self) -> None:
        """Run the decoder on the first row of the state."""
        if self._decoder is None:
            raise no_decoder(None, self._engines)
        latents = self._read("state")[:, 0] / np.float32(self._space.scaling_factor)
        decoded = self._engines[self._decoder]({"latent_sample": latents})
        self._pixels, self._squares = decoded[PIXELS].copy(), decoded[SQUARES].copy()

    def lost(self) -> tuple[int, ...]:
        """Return the pictures whose latents are not finite: a look at them costs next to nothing here."""
        finite = np.isfinite(sums_of_squares(self._read("state")[:, 0]))
        return tuple(np.flatnonzero(~finite).tolist())

    def read(self, name: str) -> Array:
        """Return a copy of one of the stage's inputs."""
        return self._read(name).copy()


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


def contrast_factor(own: Array, guided: Array, rescale: Array) -> Array:
    """Return what restores the contrast of the prompts' own outputs in the guided ones: (P, 1, 1, 1).

    rescale: (P,), how much of it, 0 to 1. arXiv:2305.08891, eqs. 14 to 16
    """
    axes = tuple(range(1, own.ndim))
    ratio = own.std(axis=axes) / np.maximum(guided.std(axis=axes), 1e-10)
    return np.asarray(rescale * ratio + (1 - rescale), dtype=np.float32).reshape(-1, 1, 1, 1)
