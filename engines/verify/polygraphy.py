"""Golden pairs as NVIDIA's Polygraphy reads them, and the commands that replay them there."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

import msgspec

from latentrt.engines.bundle.files import Bundle, disk_errors
from latentrt.engines.compare import largest
from latentrt.engines.errors import NotInstalledError
from latentrt.engines.verify.references import Arrays, read_golden
from latentrt.engines.verify.tolerances import tolerance

RECORDED = "float32 PyTorch"  # what Polygraphy calls the outputs' maker in its log
# Every tensor of the graph is an output of both: Polygraphy names the first one that differs.
LAYER_BY_LAYER = ("--onnx-outputs", "mark", "all", "--trt-outputs", "mark", "all", "--fail-fast")
# A bundle's graphs say themselves where they compute in float16, and attention needs leave to be computed in parts.
TYPED = ("--strongly-typed", "--decomposable-attentions")


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """What was written of one component.

    inputs: a list of one feed, for `--load-inputs`
    outputs: `RunResults` of one runner, for `--load-outputs`
    commands: what to type, by what it shows: `inspect`, `run`, and `layers`, which needs a GPU
    """

    component: str
    inputs: Path
    outputs: Path
    commands: dict[str, str]


def require(module: str = "polygraphy.comparator") -> Any:
    """Import a part of Polygraphy, or say how to install it. Raises NotInstalledError."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotInstalledError("polygraphy is not installed", install="pip install 'latentrt[polygraphy]'") from None


def write_golden(bundle: Bundle, directory: Path) -> tuple[Exchange, ...]:
    """Write the golden pair of each component into a directory. Raises NotInstalledError and BundleError."""
    require()
    logger = require("polygraphy.logger").G_LOGGER
    with disk_errors(directory), logger.verbosity(logger.CRITICAL):
        directory.mkdir(parents=True, exist_ok=True)
        return tuple(_write_one(bundle, name, directory) for name in bundle.manifest.components)


def _write_one(bundle: Bundle, component: str, directory: Path) -> Exchange:
    inputs, outputs = read_golden(bundle, component)
    given, expected = (directory / f"{component}.{side}.json" for side in ("inputs", "outputs"))
    require("polygraphy.json").save_json([inputs], str(given), "input data")
    results = require().RunResults()
    results.add([outputs], runner_name=RECORDED)
    results.save(str(expected))
    spec = bundle.manifest.components[component]
    graph, limit = bundle.path(spec.graph), tolerance(spec, bundle.manifest.precision)
    return Exchange(
        component=component,
        inputs=given,
        outputs=expected,
        commands=_commands(graph, (inputs, outputs), given, expected, limit=limit),
    )


def _commands(graph: Path, pair: tuple[Arrays, Arrays], given: Path, expected: Path, *, limit: float) -> dict[str, str]:
    """Return the commands. limit: of the largest difference, as a part of each output's largest magnitude"""
    inputs, outputs = pair
    allowed = [f"{name}:{limit * largest(array):.3g}" for name, array in outputs.items()]
    shapes = [f"{name}:{list(array.shape)}".replace(" ", "") for name, array in inputs.items()]
    feed = ("--load-inputs", str(given))
    compare = (*feed, "--load-outputs", str(expected), "--atol", *allowed, "--rtol", "0")
    sized = ("--input-shapes", *shapes, "--atol", f"{limit:g}", "--rtol", f"{limit:g}")
    return {
        "inspect": shlex.join(["polygraphy", "inspect", "model", str(graph)]),
        "run": shlex.join(["polygraphy", "run", str(graph), "--onnxrt", *compare]),
        "layers": shlex.join(
            ["polygraphy", "run", str(graph), "--onnxrt", "--trt", *TYPED, *LAYER_BY_LAYER, *feed, *sized]
        ),
    }
