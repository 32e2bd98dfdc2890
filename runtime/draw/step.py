"""What a caller who watches is told after each stage: the latents, and pictures of them long before the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PREVIOUS
from latentrt.engines.workspace.contract import Workspace
from latentrt.runtime.draw.finite import LATENTS, finite
from latentrt.runtime.images.preview import predicted_latents, preview
from latentrt.runtime.sampling.plan import SamplingPlan


class Noise:
    """A stream of unit normals that remembers what it gave last."""

    def __init__(self, draw: Callable[[], Array]) -> None:
        self._draw = draw
        self.last: Array | None = None

    def __call__(self) -> Array:
        """Return the next unit normals, (n, C, h, w)."""
        self.last = self._draw()
        return self.last


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """Told to `on_step` after each stage. Raise in it to end the call. What it shows is to be looked at in there."""

    stage: int
    stages: int
    _workspace: Workspace
    _plan: SamplingPlan
    _manifest: Manifest
    _noise: Array | None
    _keeps: bool
    _sketch: Callable[[Array], Array]

    @property
    def latents(self) -> Array:
        """Return the latents of this stage, (n, C, h, w), float32. A device is waited for, so look when it matters."""
        return self._finite(self._workspace.read("state")[:, 0])

    def _finite(self, latents: Array) -> Array:
        return finite(latents, LATENTS, pictures=len(latents), stage=self.stage, stages=self.stages)

    @property
    def predicted(self) -> Array:
        """Return the clean latents that the model has in mind, (n, C, h, w), float32: a picture when half is noise yet.

        What a mask keeps is the image's own. A device is waited for.
        """
        before, after = self._workspace.read(PREVIOUS), self._workspace.read("state")
        self._finite(after[:, 0])
        schedule = self._manifest.schedule
        found = predicted_latents(before, after, self._plan, self.stage - 1, schedule, noise=self._noise)
        if not self._keeps:
            return found
        mask, kept = self._workspace.read("keep_mask"), self._workspace.read("known")[:, 0]
        return np.asarray(mask * found + (1 - mask) * kept, dtype=np.float32)

    @property
    def preview(self) -> Array:
        """Return the predicted picture in small, a pixel for each latent: (n, h, w, 3), uint8, sRGB. It takes some ms.

        Raises BundleError where the bundle holds no preview.
        """
        return preview(self.predicted, self._manifest.latents)

    @property
    def draft(self) -> Array:
        """Return the predicted picture by the tiny decoder: (n, height, width, 3), uint8, sRGB.

        Raises BundleError where the bundle holds no tiny decoder.
        """
        return self._sketch(self.predicted)


Watch = Callable[[Step], None]
