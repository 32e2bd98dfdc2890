"""Which backend runs here, and which of a bundle's engines."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from latentrt.engines.backends import BACKENDS, backend_on
from latentrt.engines.build_options import REFITTABLE, BuildOptions
from latentrt.engines.bundle.files import Bundle, typed
from latentrt.engines.bundle.manifest import ENGINE_RECORD, EngineRecord
from latentrt.engines.bundle.quantisation import ON_THE_CPU
from latentrt.engines.cuda import gpus
from latentrt.engines.errors import BundleError, EngineError, WrongMachineError
from latentrt.engines.spec import QUANTISED, BackendName
from latentrt.engines.workspace.contract import WorkspaceShape

# The fastest first. `auto` takes the first of these that a bundle has engines for here, or that can build them here.
FOR_GPUS: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx", "cuda")
COMPILED_FOR_SIZES: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx")
FOR_CPUS: BackendName = "cpu"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The backend that was chosen, and why. device: which of the visible GPUs it is for, 0 on a CPU"""

    backend: BackendName
    reason: str
    device: int = 0


def choose(asked: str, bundle: Bundle, *, device: int = 0) -> Choice:
    """Choose a backend to run a bundle on: the one asked for, always.

    device: which of the visible GPUs, from 0
    With `auto`, on a machine whose NVIDIA GPU answers: the first of `FOR_GPUS` for which the bundle holds engines of
    that GPU; elsewhere the CPU. Raises EngineError if what was asked for is unknown or there is no such GPU, and
    where the bundle holds no engines for it: there is no silent second choice.
    """
    if asked != "auto":
        return _told(_as_asked(asked, device), bundle)
    gpu = _gpu(device)
    if gpu is None:
        return _told(Choice(backend=FOR_CPUS, reason="auto: no NVIDIA GPU answers here"), bundle)
    reasons: list[EngineError] = []
    for name in FOR_GPUS:
        try:
            _, record = find_engines(bundle, name, device=device)
        except EngineError as error:
            reasons.append(error)
            continue
        reason = f"auto: {gpu.name} answers here, and the bundle's {name} {record.key.backend_version} engines"
        return Choice(backend=name, device=device, reason=reason)
    words = (
        f"{gpu.name} answers here and '{bundle.root}' holds no engines for it; run `latentrt build {typed(bundle.root)}"
        f"{_asking(device)}` on this machine, or choose --backend {FOR_CPUS} ({'; '.join(map(str, reasons))})"
    )
    other = next((error for error in reasons if isinstance(error, WrongMachineError) and error.differences), None)
    raise WrongMachineError(words, differences=other.differences) if other else EngineError(words)


def _told(choice: Choice, bundle: Bundle) -> Choice:
    """Return a choice that says what 8 bits are on a CPU, where a bundle has some."""
    precision = bundle.manifest.precision
    if choice.backend != FOR_CPUS or precision not in QUANTISED:
        return choice
    return msgspec.structs.replace(choice, reason=f"{choice.reason}; the CPU {ON_THE_CPU}")


def _gpu(device: int) -> gpus.Gpu | None:
    """Find a GPU; None where there is none at all and none was asked for. Raises EngineError."""
    gpu = gpus.find_gpu(device)
    if gpu is None and device:
        raise gpus.no_gpu(f"GPU {device} was asked for and no NVIDIA GPU answers here")
    return gpu


def serves(asked: str, bundle: Bundle, *, device: int = 0) -> bool:
    """Tell whether a bundle holds engines of this machine for the backend asked for, or with `auto` for one it takes.

    Raises EngineError on an unknown backend, and BundleError.
    """
    if asked != "auto":
        names: tuple[BackendName, ...] = (_as_asked(asked, device).backend,)
    else:
        names = FOR_GPUS if _gpu(device) is not None else (FOR_CPUS,)
    return any(
        backend_on(name, device).unavailable() is None and serving_engines(bundle, name, device=device)
        for name in names
    )


def cannot_build(backend: BackendName, options: BuildOptions, *, device: int = 0) -> EngineError | None:
    """Return the error that says why a backend's engines cannot be built here with these options, or None."""
    if backend != "cuda" and (options.recipe, options.tf32) != (None, None):
        return EngineError("--recipe and --tf32 are for the backend cuda: omit them")
    reason = backend_on(backend, device).cannot_build(options)
    if reason is not None or not options.references or backend not in COMPILED_FOR_SIZES:
        return reason
    from latentrt.engines.verify.references import unavailable  # which a service that only runs never needs

    return unavailable()


def choose_to_build(asked: str, options: BuildOptions, *, device: int = 0) -> Choice:
    """Choose a backend to build for: the one asked for, or with `auto` the best that can be built here for a GPU.

    Raises EngineError if there is none.
    """
    if asked != "auto":
        return _as_asked(asked, device)
    gpu = _gpu(device)
    if gpu is None:
        return Choice(backend=FOR_CPUS, reason="auto: no NVIDIA GPU answers here")
    refusals = {name: cannot_build(name, options, device=device) for name in FOR_GPUS}
    best = next((name for name, refusal in refusals.items() if refusal is None), None)
    if best is None:
        words = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
        raise EngineError(f"{gpu.name} answers here and nothing can build engines for it ({words})")
    return Choice(backend=best, device=device, reason=f"auto: {gpu.name} answers here, and {best} can build for it")


def _as_asked(asked: str, device: int) -> Choice:
    for name in BACKENDS:
        if name == asked:
            return Choice(backend=name, device=device, reason="as asked")
    raise EngineError(f"there is no backend '{asked}'; choose one of auto, {', '.join(BACKENDS)}")


def find_engines(
    bundle: Bundle, backend: BackendName, *, needs: WorkspaceShape | None = None, device: int = 0
) -> tuple[Path, EngineRecord]:
    """Find the engines of a backend that run on this machine, or one of its GPUs, and were compiled for a shape.

    needs: the shape to draw in; None for any, the bundle's own size by preference
    Raises EngineError, which says how to fix it, and BundleError if a record contradicts its directory.
    """
    reason = backend_on(backend, device).unavailable()
    if reason is not None:
        raise reason.within(f"the backend '{backend}' cannot run here: ")
    serving = serving_engines(bundle, backend, device=device)
    if not serving:
        raise _no_engines(bundle, backend, device)
    fitting = [found for found in serving if fits(found[1], needs or _own_shape(bundle), bundle)]
    fitting.sort(key=lambda found: REFITTABLE not in found[1].key.options)  # those that LoRAs can change come first
    if needs is not None and not fitting:
        raise EngineError(_no_shape(bundle, backend, needs, serving))
    return (fitting or serving)[0]


def serving_engines(bundle: Bundle, backend: BackendName, *, device: int = 0) -> list[tuple[Path, EngineRecord]]:
    """Return all engines of an available backend that run on this machine, or its GPU. Raises BundleError."""
    return [(path, record) for path, record, differences in _engines(bundle, backend, device) if not differences]


def _engines(bundle: Bundle, backend: BackendName, device: int) -> list[tuple[Path, EngineRecord, list[str]]]:
    found = []
    for path, record in bundle.engine_directories().items():
        if record.key.backend != backend:
            continue
        differences = backend_on(backend, device).mismatches(bundle, record.key)
        if path.name != record.key.directory:
            raise BundleError(
                f"{path / ENGINE_RECORD} was built for something other than its directory's name says "
                f"({'; '.join(differences) or 'other shapes or options'}); delete {path} and run "
                f"`latentrt build {typed(bundle.root)} --backend {backend}`"
            )
        found.append((path, record, differences))
    return found


def fits(record: EngineRecord, shape: WorkspaceShape, bundle: Bundle) -> bool:
    """Tell whether a picture of this shape can be drawn with engines: with those that take any shape, always."""
    factor = bundle.manifest.latents.factor
    axes = {
        "pictures": shape.pictures,
        "frames": shape.frames,
        "tokens": shape.tokens,
        "width": shape.width,
        "height": shape.height,
        "latent_width": shape.width // factor,
        "latent_height": shape.height // factor,
    }
    return all(
        not spec.profiles
        or any(all(axes.get(axis, size) == size for axis, size in profile.items()) for profile in spec.profiles)
        for spec in record.specs.values()
    )


def _own_shape(bundle: Bundle) -> WorkspaceShape:
    width, height = bundle.manifest.default_size
    tokens = bundle.manifest.text_tokens(bundle.manifest.denoiser)
    return WorkspaceShape(pictures=1, tokens=tokens, width=width, height=height)


def _no_engines(bundle: Bundle, backend: BackendName, device: int) -> EngineError:
    fix = _build_command(bundle, backend, device)
    others = sorted((differences for _, _, differences in _engines(bundle, backend, device)), key=len)
    if not others:
        return EngineError(f"'{bundle.root}' holds no engines for the backend '{backend}'; {fix}")
    words = f"the engines in '{bundle.root}' are for another target ({'; '.join(others[0])}); {fix}"
    return WrongMachineError(words, differences=tuple(others[0]))


def _build_command(bundle: Bundle, backend: BackendName, device: int) -> str:
    """Return the command that builds engines for this machine, and what it lacks to run it."""
    lacking = cannot_build(backend, BuildOptions(), device=device)
    first = f" (first: {lacking})" if lacking is not None else ""
    return f"run `latentrt build {typed(bundle.root)} --backend {backend}{_asking(device)}` on this machine{first}"


def _asking(device: int) -> str:
    """Return the option that a command asks for a GPU by, nothing for the first."""
    return f" --device {device}" if device else ""


def _no_shape(
    bundle: Bundle, backend: BackendName, needs: WorkspaceShape, serving: list[tuple[Path, EngineRecord]]
) -> str:
    held = dict.fromkeys(shape for _, record in serving for shape in shapes_of(record))
    return (
        f"'{bundle.root}' holds no {backend} engines for {needs.width}x{needs.height} pictures {needs.pictures} "
        f"tokens {needs.tokens}, and shapes must match exactly; it holds {', '.join(held)}; run `latentrt build "
        f"{typed(bundle.root)} --backend {backend} --size {needs.width}x{needs.height} --batch {needs.pictures} "
        f"--tokens {needs.tokens}`"
    )


def shapes_of(record: EngineRecord) -> list[str]:
    """Return the shapes that engines were compiled for, `512x512 pictures 1 tokens 77`; empty for any shape."""
    return list(dict.fromkeys(re.sub(r" rows \d+", "", profile) for profile in record.key.profiles))
