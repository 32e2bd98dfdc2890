"""Every stage of one short drawing, computed by a backend and by the float32 graphs from the same numbers.

A golden pair is one input, with shapes and timesteps of its own. What is compiled wrongly may show at other timesteps,
in the guided rows, or in the stage around the network alone: where pictures are drawn.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from latentrt.engines.backends import BACKENDS, backend_on
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import CONTROL_ROLES, EngineRecord, LatentSpec, Manifest, Role
from latentrt.engines.bundle.text_lengths import TextLength, split_length
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.find import Choice, serving_engines
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.compiled import on_host
from latentrt.engines.onnxruntime import library
from latentrt.engines.open import OpenEngines
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import BackendName, Engine
from latentrt.engines.tensor_names import PIXELS
from latentrt.engines.verify.canonical_graph import open_canonical
from latentrt.engines.verify.tolerances import PIXEL_LEVEL, tolerance
from latentrt.engines.verify.verify import Row
from latentrt.engines.workspace.contract import STATE, TEXT, Workspace, WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.runtime.draw.job import repaints, resolve
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.request import Control, ImagePrompt, Request
from latentrt.runtime.text.encoders import read_encoders
from latentrt.runtime.verify.compared import ComparedWorkspace, Difference
from latentrt.runtime.video.request import VideoRequest

OUTPUTS: Mapping[Role, str] = {"text_encoder": TEXT, "denoiser": STATE, "decoder": PIXELS}
STEPS = 5
GUIDED = (0.0, 0.6)  # of the steps: then both a row and two rows for each picture are run
SKIPPING = (0.1, 0.6)  # of the steps: a third row, where layers can be skipped
GUIDANCE = 2.0  # small, or the difference of two outputs would be what is compared
PROMPT = "a red circle on a plain blue background"
FRAMES = 3  # of a video, where any number will do
REFINED = 0.5  # from where a refiner draws on


def verify_stages(
    bundle: Bundle, *, backend: BackendName | None = None, device: int = 0, report: Report = silent
) -> Iterator[Row]:
    """Draw a picture on all engines that can run here; compare each stage of it, its text and its pixels.

    backend: only this one; device: which of the visible GPUs to run on, from 0
    The pictures are drawn at the smallest size that engines are compiled for; where any will do, at half the bundle's.
    """
    for name in (backend,) if backend else tuple(BACKENDS):
        if backend_on(name, device).unavailable() is not None:
            continue  # which `verify` tells
        for directory, record in serving_engines(bundle, name, device=device):
            if reason := library.unavailable("cpu") or graphs.unavailable():
                yield Row(what="stages", backend=name, ok=True, message=f"not compared: {reason}")
                break
            yield from _verify_engines(
                bundle, Choice(backend=name, reason="verify", device=device), (directory, record), report
            )


def _verify_engines(bundle: Bundle, choice: Choice, found: tuple[Path, EngineRecord], report: Report) -> Iterator[Row]:
    backend = choice.backend
    what, done = f"verify stages ({backend})", itertools.count(1)
    request = short_request(bundle.manifest, found[1])
    differences: list[Difference] = []

    def tell(difference: Difference) -> None:
        differences.append(difference)
        report(what, min(next(done), STEPS), STEPS + 1)

    report(what, 0, STEPS + 1)
    fault: Row | None = None
    try:
        _draw(bundle, choice, found, request, tell)
    except (EngineError, BundleError) as error:
        fault = Row(what="stages", backend=backend, ok=False, message=str(error))
    report(what, STEPS + 1, STEPS + 1)
    precisions = bundle.manifest.precision, found[1].key.precision
    limits = {name: tolerance(spec, *precisions) for name, spec in bundle.manifest.components.items()}
    yield from _rows(differences, backend, limits, request)
    if fault is not None:
        yield fault


def _rows(
    differences: list[Difference],
    backend: BackendName,
    limits: Mapping[str, float],
    request: Request | VideoRequest,
) -> Iterator[Row]:
    sides: tuple[int, int] | None = request.options["size"] if isinstance(request, VideoRequest) else request.size
    assert sides is not None
    size, stage = "x".join(map(str, sides)), 0
    for one in differences:
        stage += one.output == STATE
        limit = limits[one.program]
        allowed = max(limit, PIXEL_LEVEL) if one.output == PIXELS else limit
        ok = one.error <= allowed  # False for NaN too
        yield Row(
            what=one.program,
            backend=backend,
            ok=ok,
            message=f"{'agrees with' if ok else 'leaves'} the float32 graph",
            error=one.error,
            limit=allowed,
            profile=f"stage {stage}, {size}" if one.output == STATE else f"drawn, {size}",
        )


def _draw(
    bundle: Bundle,
    choice: Choice,
    found: tuple[Path, EngineRecord],
    request: Request | VideoRequest,
    tell: Callable[[Difference], None],
) -> None:
    """Draw a request on the engines of one directory. Raises EngineError and BundleError."""
    with contextlib.closing(ComparedEngines(bundle, choice, found, tell)) as opened:
        loaded = Loaded(bundle, opened, read_encoders(bundle, opened.engines, check="hash"))
        if isinstance(request, VideoRequest):
            from latentrt.runtime.video.resolve import resolve_video, video_source  # for bundles that can

            video = resolve_video(request, bundle.manifest)
            job, source = video.job, video_source(loaded, video)
        else:
            job = resolve(request, bundle.manifest)
            source = loaded.source(job)
        for _ in loaded.drawing(job, source, watched=False):
            pass


def short_request(manifest: Manifest, record: EngineRecord) -> Request | VideoRequest:
    """Return a request that makes each denoiser and ControlNet of a bundle run, at sizes that its engines take."""
    width, height, pictures, text = _least(manifest, record)
    chunks, fixed = (text.chunks, text.fixed) if text else (1, 0)
    grey = np.tile(np.linspace(0, 255, width, dtype=np.uint8)[:, None], (height, 1, 3))
    if manifest.denoisers[manifest.denoiser].shown is not None:
        size, guided = (width, height), {"guidance": GUIDANCE, "guidance_interval": GUIDED}
        return VideoRequest(frames=pictures, options={"image": grey, "seed": 0, "steps": STEPS, "size": size, **guided})
    words = next(iter(manifest.tokenizers.values())).max_length - 2
    controls = [one.control for one in manifest.components.values() if one.role in CONTROL_ROLES]
    repainted, skips = repaints(manifest), manifest.row_groups(manifest.denoiser) > 2
    return Request(
        prompt=PROMPT + " a" * words * (chunks - 1),
        negative_prompt="",
        t5_tokens=fixed or None,
        n=pictures,
        seed=0,
        steps=STEPS,
        size=(width, height),
        guidance=GUIDANCE,
        guidance_interval=GUIDED,
        skip_layer_guidance=GUIDANCE if skips else 0.0,
        skip_layer_interval=SKIPPING,
        refine_from=REFINED if manifest.refiner else None,
        controls=tuple(Control(name=name, image=grey) for name in controls if name is not None),
        image_prompts=tuple(
            ImagePrompt(name=spec.name, image=grey) for spec in manifest.denoisers[manifest.denoiser].image_prompts
        ),
        image=grey if repainted else None,
        mask=np.full((height, width), 255, dtype=np.uint8) if repainted else None,
    )


def _least(manifest: Manifest, record: EngineRecord) -> tuple[int, int, int, TextLength | None]:
    """Return the width and height in pixels, the pictures and the length of the text to draw with, None for any."""
    factor, profiles = manifest.latents.factor, record.specs[manifest.denoiser].profiles
    if not profiles:
        grid = 8 * factor  # a UNet halves its latents up to three times
        width, height = (max(side // 2 // grid, 1) * grid for side in manifest.default_size)
        return width, height, FRAMES if manifest.denoisers[manifest.denoiser].shown else 1, None
    least = min(profiles, key=lambda sizes: (sizes["latent_width"] * sizes["latent_height"], sizes["tokens"]))
    pictures = min(sizes["pictures"] for sizes in profiles)
    text = split_length(least["tokens"], manifest, manifest.denoiser)
    return least["latent_width"] * factor, least["latent_height"] * factor, pictures, text


class ComparedEngines(OpenEngines):
    """The engines of one directory, whose workspaces are compared with the reference's."""

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice,
        found: tuple[Path, EngineRecord],
        tell: Callable[[Difference], None],
    ) -> None:
        manifest = bundle.manifest
        super().__init__(
            bundle,
            choice,
            components=manifest.of_role("text_encoder", "denoiser", "controlnet", "decoder"),
            threads=None,
            cuda_graphs=None,
            check="hash",
            found=found,
        )
        self._references, self._tell = References(bundle), tell
        roles = {name: component.role for name, component in manifest.components.items()}
        self._outputs = {name: OUTPUTS[role] for name, role in roles.items() if role in OUTPUTS}

    def workspace(
        self,
        space: LatentSpec,
        shape: WorkspaceShape,
        *,
        state_rows: int,
        denoiser: str,
        decoder: str | None,
    ) -> Workspace:
        """Return the backend's workspace with the reference beside it."""
        found = super().workspace(space, shape, state_rows=state_rows, denoiser=denoiser, decoder=decoder)
        reference = NumpyWorkspace(
            self._references, space, found.shape, state_rows=found.state_rows, denoiser=denoiser, decoder=decoder
        )
        return ComparedWorkspace(found, reference, self._outputs, self._tell)

    def close(self) -> None:
        """Close every engine, and the reference's."""
        super().close()
        self._references.close()


class References(Mapping[str, Engine]):
    """The canonical graphs as engines that compute in float32 on the CPU, each opened when it is first asked for."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._opened = bundle, dict[str, Engine]()

    def __getitem__(self, component: str) -> Engine:
        if component not in self._opened:
            told = self._bundle.manifest.components[component]
            edit = partial(on_host, role=told.role)
            with tempfile.TemporaryDirectory(prefix="latentrt-verify-") as scratch:
                self._opened[component] = open_canonical(self._bundle, component, Path(scratch), edit=edit)
        return self._opened[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.components)

    def __len__(self) -> int:
        return len(self._bundle.manifest.components)

    def close(self) -> None:
        """Close every engine."""
        for engine in self._opened.values():
            engine.close()
        self._opened.clear()
