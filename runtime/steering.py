"""What a picture follows: images that a bundle's ControlNets read, how strongly, and at which part of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import Manifest
from latentrt.engines.residuals import PREFIX
from latentrt.engines.spec import Array
from latentrt.runtime.image_sources import Source, read_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """An image to follow, as one of the bundle's ControlNets reads it.

    name: of the ControlNet, as the bundle was exported with
    image: as `Request.image`, one for all pictures or one for each; it is brought to the size that is drawn
    scale: how strongly to follow it; 0 is not at all
    start, stop: the fractions of the steps between which it is followed, as diffusers' control_guidance_start and _end
    """

    name: str
    image: Source | Sequence[Source]
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __str__(self) -> str:
        part = f":{self.start:g}:{self.stop:g}" if (self.start, self.stop) != (0, 1) else ""
        return f"{self.name}:{self.scale:g}{part}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steering:
    """A control that can be followed.

    pixels: (pictures, 3, height, width), float32, 0 to 1
    stages: (K,) bool, where the plan follows it
    """

    component: str
    pixels: Array
    scale: float
    stages: Array


def steer(
    controls: Sequence[Control], manifest: Manifest, *, pictures: int, size: tuple[int, int], stages: int
) -> tuple[Steering, ...]:
    """Check controls against a bundle, and read their images. Raises RequestError.

    size: (width, height) to draw; stages: of the plan
    """
    if not isinstance(controls, list | tuple) or not all(isinstance(one, Control) for one in controls):
        raise RequestError(f"controls: found {controls!r}, expected a list of Control(name=…, image=…)")
    names = [control.name for control in controls]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"controls: found '{twice}' twice, expected each ControlNet once")
    return tuple(_steer(control, manifest, pictures=pictures, size=size, stages=stages) for control in controls)


def _steer(control: Control, manifest: Manifest, *, pictures: int, size: tuple[int, int], stages: int) -> Steering:
    component, where = f"{PREFIX}{control.name}", f"controls, '{control.name}'"
    if component not in manifest.components:
        raise RequestError(f"{where}: {_known(manifest)}")
    scale = control.scale
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise RequestError(f"{where}: found the scale {scale!r}, expected a number")
    pixels = read_hints(control.image, size=size, name=where)
    if len(pixels) not in (1, pictures):
        raise RequestError(f"{where}: found {len(pixels)} images for {pictures} pictures, expected one, or one each")
    planar = np.ascontiguousarray(np.broadcast_to(pixels, (pictures, *pixels.shape[1:])).transpose(0, 3, 1, 2))
    return Steering(
        component=component,
        pixels=planar,
        scale=float(scale),
        stages=followed_stages(control.start, control.stop, stages, where=where),
    )


def _known(manifest: Manifest) -> str:
    names = [name.removeprefix(PREFIX) for name in manifest.components if name.startswith(PREFIX)]
    if names:
        return f"this bundle holds no ControlNet of that name, it holds {', '.join(names)}"
    return "this bundle holds no ControlNet; export it again with --controlnet NAME=CHECKPOINT"


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
        raise RequestError(f"{where}: no one of {stages} stages lies from {start:g} to {stop:g}; leave it away")
    return followed


def scales_at(steering: Sequence[Steering], stage: int, rows: int) -> Mapping[str, Array]:
    """Return the controls that are followed at a stage, and how strongly: {component: (rows,) float32}."""
    return {
        one.component: np.full(rows, one.scale, dtype=np.float32) for one in steering if one.stages[stage] and one.scale
    }
