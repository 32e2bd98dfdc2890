"""ONNX Runtime's rows in the table of backends: the functions of `Backend`, each of a provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentrt.engines.backends import Opened, Opening
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime import keys, library
from latentrt.engines.onnxruntime.engines import Sessions
from latentrt.engines.onnxruntime.library import Provider
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineKey, EngineSpec

unavailable = library.unavailable


def cannot_build(provider: Provider, options: BuildOptions, *, device: int) -> EngineError | None:
    """Return the error that says why building cannot be done here, or with these options; None where it can."""
    from latentrt.engines.graphs import edits as graphs  # which what only runs never needs

    return _shapeless(provider, options) or library.unavailable(provider, device=device) or graphs.unavailable()


def _shapeless(provider: Provider, options: BuildOptions) -> EngineError | None:
    taken = BuildOptions(recipe=options.recipe, tf32=options.tf32) if provider == "cuda" else BuildOptions()
    if options == taken:
        return None
    named = "omit all build options but --recipe and --tf32" if provider == "cuda" else "omit the build options"
    return EngineError(f"{provider} engines take any shape: {named}")


def key(provider: Provider, bundle: Bundle, options: BuildOptions, *, device: int) -> EngineKey:
    """Name what would be built. Raises EngineError on options that mean nothing here."""
    if error := _shapeless(provider, options):
        raise error
    return keys.key(bundle, provider, options, device=device)


def mismatches(provider: Provider, bundle: Bundle, there: EngineKey, *, device: int) -> list[str]:
    """Name what keeps engines of a key from running here; empty where nothing does."""
    return keys.mismatches(bundle, provider, there, device=device)


def build(
    provider: Provider, bundle: Bundle, directory: Path, options: BuildOptions, report: Report, *, device: int
) -> Mapping[str, tuple[str, EngineSpec]]:
    """Compile every component into a directory: {component: (main file, spec)}."""
    from latentrt.engines.onnxruntime import build as builder  # which what only runs never needs

    return builder.build(bundle, directory, provider, report, options, device=device)


def open(provider: Provider, opening: Opening, *, device: int) -> Opened:
    """Open components of one directory."""
    return Sessions(
        opening.bundle,
        opening.directory,
        opening.record,
        opening.components,
        provider,
        options=OnnxRuntimeOptions(
            threads=opening.threads,
            cuda_graph=provider == "cuda" and opening.cuda_graphs is not False,
            tf32=keys.tf32_of(opening.record.key),
            device=device,
        ),
        on_open=opening.on_open,
    )
