"""What a caller sees after each stage: the latents, and previews of the picture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Self, TypeVar

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PREVIOUS
from latentrt.runtime.sampling.plan import SamplingPlan

KEPT = ("keep_mask", "known")  # what a mask keeps, and what of


class Noise:
    """A stream of unit normals that remembers what it gave last."""

    def __init__(self, draw: Callable[[], Array]) -> None:
        self._draw = draw
        self.last: Array | None = None

    def __call__(self) -> Array:
        """Return the next unit normals, (n, C, h, w)."""
        self.last = self._draw()
        return self.last


class Look:
    """The arrays after one stage, where the engines run: each is read when it is first asked for, and then kept.

    What is never asked for costs nothing. Once the next stage begins, what was not read is gone.
    """

    def __init__(self, read: Callable[[str], Array], sketch: Callable[[Array], Array], where: str) -> None:
        self._read: Callable[[str], Array] | None = read
        self.sketch, self._where = sketch, where
        self._kept: dict[str, Array] = {}
        self._lock = threading.Lock()  # held while something is read, so that no other thread starts the next stage

    def __call__(self, name: str) -> Array:
        """Return an input of the stage, read-only. Raises RequestError if it is too late to read it."""
        return self._once(name, lambda read: read(name))

    def sketched(self, predicted: Array) -> Array:
        """Return the picture that a tiny decoder makes of latents, read-only. Raises as `__call__` does."""
        return self._once("a draft", lambda _: self.sketch(predicted))

    def _once(self, name: str, make: Callable[[Callable[[str], Array]], Array]) -> Array:
        with self._lock:
            if name not in self._kept:
                if self._read is None:
                    raise RequestError(
                        f"{self._where} is over and this was not read in time; read it before the next stage "
                        "begins, or call step.keep()"
                    )
                self._kept[name] = make(self._read)
                self._kept[name].flags.writeable = False
            return self._kept[name]

    def end(self) -> None:
        """Read nothing from now on: the next stage begins."""
        with self._lock:
            self._read = None


class Step(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A finished stage: passed to `on_step`, which may raise to end the call, and given by `Pipeline.stream`.

    Arrays are read from where the engines run when they are first asked for, and are read-only. What was read once
    stays valid as long as the step is kept. The rest can be read until the next stage begins, and raises
    RequestError after that. `keep` reads all of it.
    """

    stage: int
    stages: int
    _look: Look
    _plan: SamplingPlan
    _manifest: Manifest
    _noise: Array | None
    _keeps: bool

    @property
    def latents(self) -> Array:
        """Return the latents of this stage, (n, C, h, w), float32. Reading them waits for the device.

        Raises NotFiniteError if they have left the range of floats.
        """
        return self._look("state")[:, 0]

    @property
    def predicted(self) -> Array:
        """Return the clean latents that the model predicts at this stage, (n, C, h, w), float32.

        Outside a mask they are the image's own. Reading them waits for the device. Raises as `latents` does.
        """
        from latentrt.runtime.images.preview import predicted_latents  # for who looks on

        after, before = self._look("state"), self._look(PREVIOUS)
        schedule = self._manifest.schedule
        found = predicted_latents(before, after, self._plan, self.stage - 1, schedule, noise=self._noise)
        if not self._keeps:
            return found
        mask, known = (self._look(name) for name in KEPT)
        return np.asarray(mask * found + (1 - mask) * known[:, 0], dtype=np.float32)

    @property
    def preview(self) -> Array:
        """Return a small predicted picture, one pixel for each latent: (n, h, w, 3), uint8, sRGB. It takes a few ms.

        Raises BundleError if the bundle holds no preview.
        """
        from latentrt.runtime.images.preview import preview  # as above

        return preview(self.predicted, self._manifest.latents)

    @property
    def draft(self) -> Array:
        """Return the predicted picture by the tiny decoder: (n, height, width, 3), uint8, sRGB.

        Raises BundleError if the bundle holds no tiny decoder.
        """
        return self._look.sketched(self.predicted)

    def draft_beside(self) -> Array:
        """Return the draft of a step that was kept, made now: its network runs beside the next stages.

        For a thread other than the one that draws, which does not wait for it. Raises BundleError as `draft` does.
        """
        return self._look.sketch(self.predicted)

    def keep(self) -> Self:
        """Read all that `latents`, `predicted` and `preview` need, so that they stay available; return the step.

        A draft is kept only if it was read before, since it takes a network. Raises as `latents` does.
        """
        for name in ("state", PREVIOUS, *(KEPT if self._keeps else ())):
            self._look(name)
        return self


OnStep = Callable[[Step], None]
T = TypeVar("T")
Stages = Generator[Step, None, T]  # yields each stage that is done, and returns what came of them
