"""What a picture follows: images that a bundle's ControlNets and T2I-Adapters read, how strongly, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import CONTROL_ROLES, Manifest, Role
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import COND, FEATURE, level_axes
from latentrt.runtime.draw.finite import FOLLOWED, finite
from latentrt.runtime.request import Control


class ResolvedControl(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A control that can be followed.

    role, of: what its component is, and the denoiser that it adds to
    pixels: (pictures, 3, height, width), float32, 0 to 1
    stages: (K,) bool, where the plan follows it
    """

    component: str
    role: Role
    of: str
    pixels: Array
    scale: float
    stages: Array


def resolve_controls(
    controls: Sequence[Control], manifest: Manifest, *, pictures: int, size: tuple[int, int], stages: int
) -> tuple[ResolvedControl, ...]:
    """Check controls against a bundle, and read their images. Raises RequestError.

    size: (width, height) to draw; stages: of the plan
    """
    if not isinstance(controls, list | tuple) or not all(isinstance(one, Control) for one in controls):
        raise RequestError(f"controls: found {controls!r}, expected a list of Control(name=…, image=…)")
    names = [control.name for control in controls]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"controls: found '{twice}' twice, expected each ControlNet once")
    return tuple(_resolve(control, manifest, pictures=pictures, size=size, stages=stages) for control in controls)


def _resolve(
    control: Control, manifest: Manifest, *, pictures: int, size: tuple[int, int], stages: int
) -> ResolvedControl:
    where = f"controls, '{control.name}'"
    component = manifest.find_control(control.name)
    if component is None:
        raise RequestError(f"{where}: {_known(manifest)}")
    spec = manifest.components[component]
    assert spec.of is not None
    if spec.role == "adapter":
        _check_multiple(component, manifest, size, where=where)
    scale = control.scale
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise RequestError(f"{where}: found the scale {scale!r}, expected a number")
    from latentrt.runtime.images.read import read_hints  # with Pillow

    pixels = read_hints(control.image, size=size, name=where)
    if len(pixels) not in (1, pictures):
        raise RequestError(
            f"{where}: found {len(pixels)} images for {pictures} pictures, expected one, or one for each"
        )
    planar = np.ascontiguousarray(np.broadcast_to(pixels, (pictures, *pixels.shape[1:])).transpose(0, 3, 1, 2))
    return ResolvedControl(
        component=component,
        role=spec.role,
        of=spec.of,
        pixels=planar,
        scale=float(scale),
        stages=followed_stages(control.start, control.stop, stages, where=where),
    )


def _known(manifest: Manifest) -> str:
    names = [str(manifest.components[name].control) for name in manifest.of_role(*CONTROL_ROLES)]
    if names:
        return f"this bundle holds no ControlNet or adapter of that name, it holds {', '.join(names)}"
    return "this bundle holds no ControlNet; export it again with --controlnet NAME=CHECKPOINT"


def _check_multiple(component: str, manifest: Manifest, size: tuple[int, int], *, where: str) -> None:
    """Refuse a size that an adapter cannot cut into whole cells: its first feature's, of some latents each."""
    first = str(manifest.components[component].outputs[0].shape[2])
    multiple = int(first.rpartition("_")[2]) * manifest.latents.factor
    if any(side % multiple for side in size):
        raise RequestError(f"{where}: found {size[0]}x{size[1]} to draw, expected multiples of {multiple} pixels")


def followed_stages(start: float, stop: float, stages: int, *, where: str) -> Array:
    """Tell at which stages of a plan a control is followed: (K,) bool.

    Stage k of K is, where start <= k / K and (k + 1) / K <= stop: diffusers' rule. Raises RequestError.
    """
    for value in (start, stop):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise RequestError(f"{where}: found {value!r} for start or stop, expected fractions of the steps, 0 to 1")
    if not 0 <= start < stop <= 1:
        raise RequestError(f"{where}: found {start:g} to {stop:g}, expected 0 <= start < stop <= 1")
    followed = np.array([k / stages >= start and (k + 1) / stages <= stop for k in range(stages)])
    if not followed.any():
        raise RequestError(f"{where}: none of {stages} stages lies from {start:g} to {stop:g}; omit it")
    return followed


def strengths_at(controls: Sequence[ResolvedControl], stage: int) -> Mapping[str, float]:
    """Return the ControlNets that run at a stage, and how strongly each is followed."""
    return {
        one.component: one.scale for one in controls if one.role == "controlnet" and one.stages[stage] and one.scale
    }


class Features:
    """What T2I-Adapters add to a denoiser along a plan: computed once a picture, and written where it changes.

    shapes: of the denoiser's inputs for features, whose row r is picture r % pictures; run: runs a component
    """

    def __init__(
        self,
        controls: Sequence[ResolvedControl],
        shapes: Mapping[str, tuple[int, ...]],
        run: Callable[[str, Mapping[str, Array]], Mapping[str, Array]],
    ) -> None:
        self._shapes = shapes
        self._given = [
            (
                one.stages,
                one.scale,
                {
                    name: finite(np.array(array), FOLLOWED, pictures=len(one.pixels))
                    for name, array in run(one.component, {COND: one.pixels}).items()
                },
            )
            for one in controls
            if one.role == "adapter"
        ]

    def at(self, stage: int, *, since: int = 0) -> dict[str, Array]:
        """Return what to write before a stage, {the denoiser's input: (rows, …)}, float32; nothing where it stays.

        since: the first stage for which something was written where these pictures are
        """
        followed = [bool(stages[stage]) for stages, _, _ in self._given]
        if stage > since and followed == [bool(stages[stage - 1]) for stages, _, _ in self._given]:
            return {}
        written = {name: np.zeros(shape, dtype=np.float32) for name, shape in self._shapes.items()}
        for on, (_, scale, features) in zip(followed, self._given, strict=True):
            for name, array in features.items() if on else ():
                written[name] += np.float32(scale) * np.resize(array, written[name].shape)
        return written


def feature_shapes(
    manifest: Manifest, denoiser: str, *, size: tuple[int, int], rows: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what T2I-Adapters add to a denoiser. size: (width, height) to draw; rows: the model's"""
    width, height = (side // manifest.latents.factor for side in size)
    axes = {"batch": rows, **level_axes(height, width)}
    return {
        spec.name: tuple(axis if isinstance(axis, int) else axes[axis] for axis in spec.shape)
        for spec in manifest.components[denoiser].inputs
        if spec.name.startswith(FEATURE)
    }
