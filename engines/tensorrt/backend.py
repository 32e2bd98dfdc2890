"""TensorRT's rows in the table of backends: the functions of `Backend`, each of a flavor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentrt.engines.backends import Opened, Opening
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineKey, EngineSpec
from latentrt.engines.tensorrt import build as builder
from latentrt.engines.tensorrt import library
from latentrt.engines.tensorrt.engines import open_engines
from latentrt.engines.tensorrt.library import Flavor

unavailable = library.cannot_run
cannot_build = library.cannot_build


def key(flavor: Flavor, bundle: Bundle, options: BuildOptions, *, device: int) -> EngineKey:
    """Name what would be built for a GPU. Raises EngineError."""
    return library.key(bundle, flavor, options, device=device)


def mismatches(flavor: Flavor, bundle: Bundle, there: EngineKey, *, device: int) -> list[str]:
    """Name what keeps engines of a key from running on a GPU; empty where nothing does."""
    return library.mismatches(bundle, flavor, there, device=device)


def build(
    flavor: Flavor, bundle: Bundle, directory: Path, options: BuildOptions, report: Report, *, device: int
) -> Mapping[str, tuple[str, EngineSpec]]:
    """Compile every component into a directory: {component: (main file, spec)}."""
    return builder.build(bundle, directory, flavor, options, report, device=device)


def open(flavor: Flavor, opening: Opening, *, device: int) -> Opened:
    """Open components of one directory."""
    return open_engines(
        opening.bundle,
        opening.directory,
        opening.record,
        opening.components,
        flavor,
        device=device,
        graphs=opening.cuda_graphs is not False,
    )
