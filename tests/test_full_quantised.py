"""Full-size denoisers in fp8 become TensorRT-RTX engines on a machine with no GPU.

    pytest -m slow -s tests/test_full_quantised.py -k sdxl

Weights and ranges are random: all that may be in 8 bits is, as where nothing loses too much.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path

import pytest

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Quantised
from latentrt.engines.tensorrt import library as trt_library
from latentrt.export.graphs.external_data import save_graph, weights_bytes
from latentrt.export.graphs.types import load_typed
from latentrt.export.quantisation.levels import find_levels, operands
from latentrt.export.quantisation.scales import SCHEMES, find_scales, insert_scales
from latentrt.runtime.bench.machine import describe
from tests.test_full_builds import MODELS, compile_denoiser, write_graph

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NODES = {"sdxl": 900, "sd35-medium": 300}  # at least so many of each


def put_into_8_bits(graph: Path, kind: Quantised, least: int) -> int:
    """Write a graph again with all that may be in 8 bits; return how many bytes its weights are."""
    model, scheme = load_typed(graph), SCHEMES[kind]
    names = {node for level in find_levels(model) for node in level.nodes}
    assert len(names) > least
    largest = {str(value.name): 8.0 for node in model.graph if node.name in names for value in operands(node)}
    insert_scales(model, names, find_scales(model, names, largest, scheme), scheme, stored=True)
    weights = weights_bytes(model)
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        written = save_graph(model, Path(folder) / graph.name)
        graph.with_suffix(".data").unlink()
        for file in written:
            file.replace(graph.with_name(file.name))
    return weights


@pytest.mark.parametrize("name", NODES)
def test_a_full_size_denoiser_in_fp8_is_compiled_without_a_gpu(name: str, tmp_path: Path) -> None:
    try:
        trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    graph, model = tmp_path / "model.onnx", MODELS[name]
    half = write_graph(model, graph)
    weights = put_into_8_bits(graph, "fp8", NODES[name])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        figures = pool.apply(compile_denoiser, (graph, model.side, model.tokens))
    result = {"machine": describe(), "model": f"{name} fp8", "weights_bytes": weights, **figures}
    print(json.dumps(result, indent=1))
    assert 0.5 < weights / half < 0.6
    assert figures["engine_bytes"] > 0.99 * weights
