"""Components as TensorRT-RTX compiles them, which needs no GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.progress import silent
from latentrt.engines.spec import EngineSpec
from latentrt.engines.tensorrt import build as builder
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.engines.tensorrt.library import require


def compile_alone(root: Path, component: str, folder: Path, *, size: tuple[int, int]) -> tuple[Path, EngineSpec]:
    """Compile one component of a bundle for a kind of GPU. Skips the test where the library is missing.

    size: of the picture, in pixels
    """
    try:
        library = require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    options = BuildOptions(sizes=(size,), compute_capability="8.9", optimization_level=0)
    compiling = partial(compile_graph, library, device=None)
    file, spec = builder._build_one(compiling, Bundle.open(root), component, folder, "tensorrt-rtx", options, silent)
    return folder / file, spec
