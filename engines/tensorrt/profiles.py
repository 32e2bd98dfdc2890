"""Which profile of a compiled engine fits, and the sentence that says how to build one where none does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from latentrt.engines.bundle.files import typed
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import EngineSpec, TensorSpec
from latentrt.engines.tensor_names import level_axes

Shape = tuple[int, ...]
REBUILD = "run `latentrt build --force` on this bundle"


def shape_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """Return a tensor's shape under a profile. Raises EngineError where that gives a named axis no size."""
    if missing := [axis for axis in tensor.shape if isinstance(axis, str) and axis not in sizes]:
        raise EngineError(f"a profile gives {', '.join(missing)} of {tensor} no size; {REBUILD}")
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape)


def input_shapes(spec: EngineSpec, profile: int) -> dict[str, Shape]:
    """Return the shape of every input under one profile."""
    return {tensor.name: shape_of(tensor, spec.profiles[profile]) for tensor in spec.inputs}


def nbytes(tensor: TensorSpec, shape: Shape) -> int:
    """Return how many bytes a tensor of this shape has."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


def profiles_for(spec: EngineSpec, axes: Mapping[str, int], *, free: str) -> dict[int, int]:
    """Return {size of the free axis: profile} of the profiles that have the given sizes on all other axes.

    Raises EngineError where the engine names an axis that is neither given nor free.
    """
    found: dict[int, int] = {}
    for number, sizes in enumerate(spec.profiles):
        if unknown := set(sizes) - set(axes) - {free}:
            raise EngineError(
                f"{spec.component} has an axis named {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(axes)}; {REBUILD}"
            )
        if all(size == axes[name] for name, size in sizes.items() if name != free):
            found.setdefault(sizes.get(free, axes.get(free, 1)), number)
    return found


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where engines came from, for the command that builds others beside them.

    factor: how many pixels an element of the latents is wide
    """

    bundle: Path
    backend: str
    factor: int

    def refuse(self, spec: EngineSpec, asked: Mapping[str, int]) -> EngineError:
        """Return the error that no profile fits what was asked, with the shapes there are and how to fix it."""
        built = "; ".join(dict.fromkeys(_words(sizes) for sizes in spec.profiles)) or "no shapes at all"
        return EngineError(
            f"{spec.component} is not compiled for {_words(asked)} (shapes must match exactly, nothing is padded); "
            f"it is compiled for {built}; run `{self.build_command(spec, asked)}`"
        )

    def build_command(self, spec: EngineSpec, asked: Mapping[str, int]) -> str:
        """Return the command that builds what there is and what was asked."""
        words = [f"latentrt build {typed(self.bundle)} --backend {self.backend}"]
        profiles = [*spec.profiles, asked]
        options: dict[str, list[object]] = {
            "--size": [self._size(sizes) for sizes in profiles],
            "--batch": [sizes.get("pictures", sizes.get("batch")) for sizes in profiles],
            "--tokens": [sizes.get("tokens") for sizes in profiles],
        }
        for option, values in options.items():
            if listed := ",".join(_distinct(values)):
                words.append(f"{option} {listed}")
        return " ".join(words)

    def _size(self, sizes: Mapping[str, int]) -> str | None:
        if {"width", "height"} <= set(sizes):
            return f"{sizes['width']}x{sizes['height']}"
        if {"latent_width", "latent_height"} <= set(sizes):
            return f"{sizes['latent_width'] * self.factor}x{sizes['latent_height'] * self.factor}"
        return None


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _words(sizes: Mapping[str, int]) -> str:
    shown = {name: size for name, size in sizes.items() if name not in level_axes(1, 1)}  # these follow from the others
    return ", ".join(f"{name} {size}" for name, size in shown.items()) or "one shape"
