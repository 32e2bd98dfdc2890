"""Pictures drawn by a bundle's canonical graphs in float32 on the CPU, and what its denoisers were given and gave."""

from __future__ import annotations

import contextlib
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import LatentSpec, Manifest
from latentrt.engines.spec import Array, Engine, EngineKey, EngineView, Inputs
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.runtime.draw.job import repaints, resolve
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.request import Request
from latentrt.runtime.text.encoders import read_encoders
from latentrt.runtime.verify.stages import REFINED, References

if TYPE_CHECKING:
    from latentrt.engines.open import OpenEngines

Pair = tuple[Mapping[str, Array], Mapping[str, Array]]
"""What a denoiser was given and what it gave."""
Met = tuple[Mapping[str, Array], Mapping[str, Array], float]
"""That, and the weight that the next latents give what it gave: at the last stages next to none."""


def draw_recorded(
    bundle: Bundle, prompts: Mapping[int, str], *, steps: int, guidance: float
) -> tuple[Array, dict[str, list[list[Met]]]]:
    """Draw a picture of each prompt at the bundle's own size. prompts: by their seeds

    Returns the pixels, (prompts, height, width, 3) uint8, and by denoiser what it met: for each prompt, stage
    by stage. Raises EngineError and BundleError.
    """
    pixels, kept = [], dict[str, list[list[Met]]]()
    with contextlib.closing(CanonicalEngines(bundle)) as opened:
        loaded = Loaded(bundle, cast("OpenEngines", opened), read_encoders(bundle, opened.engines, check="size"))
        for seed, prompt in prompts.items():
            job = resolve(_request(bundle.manifest, prompt, seed=seed, steps=steps, guidance=guidance), bundle.manifest)
            drawing = loaded.drawing(job, loaded.source(job), watched=False)
            while True:
                try:
                    next(drawing)
                except StopIteration as ended:
                    pixels.append(ended.value.pixels)
                    break
            for part in job.ranges:
                weights = [abs(float(job.plan.transitions[stage][0, -2])) for stage in part.stages]
                met = [(*pair, weight) for pair, weight in zip(opened.take(part.denoiser), weights, strict=True)]
                kept.setdefault(part.denoiser, []).append(met)
    return np.concatenate(pixels), kept


def _request(manifest: Manifest, prompt: str, *, seed: int, steps: int, guidance: float) -> Request:
    """Return a request for one picture; where a denoiser fills in masked parts, of a grey one that is masked whole."""
    width, height = manifest.default_size
    masked = repaints(manifest)
    return Request(
        prompt=prompt,
        seed=seed,
        steps=steps,
        guidance=guidance,
        refine_from=REFINED if manifest.refiner else None,
        image=np.full((height, width, 3), 127, dtype=np.uint8) if masked else None,
        mask=np.full((height, width), 255, dtype=np.uint8) if masked else None,
    )


class _Recorder(EngineView):
    """An engine that keeps what it is given and what it gives."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._pairs: list[Pair] = []

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        given = {name: np.array(array) for name, array in self.spec.arrays(inputs).items()}
        found = self._engine(inputs)
        self._pairs.append((given, {name: np.array(array) for name, array in found.items()}))
        return found

    def take(self) -> list[Pair]:
        """Return what was kept since the last time."""
        pairs, self._pairs = self._pairs, []
        return pairs


class CanonicalEngines:
    """What drawing asks of opened engines, by the canonical graphs. It stands for `OpenEngines`."""

    on_demand, picks_rows = False, True
    key = EngineKey(backend="cpu", backend_version="", device="", precision="fp32", graphs="")

    def __init__(self, bundle: Bundle) -> None:
        self._references = References(bundle)
        self._recorders = {name: _Recorder(self._references[name]) for name in bundle.manifest.denoisers}
        self.engines = ChainMap(cast("dict[str, Engine]", self._recorders), cast("dict[str, Engine]", self._references))

    def take(self, denoiser: str) -> list[Pair]:
        """Return what a denoiser was given and gave since the last time, stage by stage."""
        return self._recorders[denoiser].take()

    def workspace(
        self, space: LatentSpec, shape: WorkspaceShape, *, state_rows: int, denoiser: str, decoder: str | None
    ) -> Workspace:
        """Return a workspace of any shape."""
        return NumpyWorkspace(self.engines, space, shape, state_rows=state_rows, denoiser=denoiser, decoder=decoder)

    def sizeless(self, component: str) -> Engine:
        """Return the engine of a component."""
        return self.engines[component]

    def slot_counts(self, _: WorkspaceShape) -> None:
        """Say that any number of slots will do."""

    def rest(self) -> None:
        """Free nothing: everything is in use until `close`."""

    def close(self) -> None:
        """Close every engine."""
        self._references.close()
