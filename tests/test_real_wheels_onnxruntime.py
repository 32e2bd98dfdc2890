"""ONNX Runtime's own CUDA provider, opened on stub libraries: what it says of our graphs, with no GPU.

It needs the wheel beside the CPU's, once:

    pip install --no-deps --target .cache/onnxruntime-gpu 'onnxruntime-gpu>=1.25'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import CONTROL_ROLES
from latentrt.engines.graphs.cuda_rewrites import use_cuda_kernels
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions
from tests import stub_cuda
from tests.conftest import Controlled, Make, MakeControlled
from tests.test_cuda_rewrites import network

SITE = Path(__file__).parent.parent / ".cache" / "onnxruntime-gpu"
PROVIDER = SITE / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
OPENED = """
import json, sys
import numpy as np
from pathlib import Path
from latentrt.engines.onnxruntime import assignment, session
asked = json.load(sys.stdin)
options = session.session_options(threads=1)
options.optimized_model_filepath = asked["optimised"]
assignment.record_assignment(options)
changed = {name: np.zeros(shape, np.float16) for name, shape in asked["changed"].items()}
session._change(options, changed, "cuda")
opened = session.open_session(Path(asked["graph"]), options, "cuda", asked["settings"])
print(json.dumps(assignment.elsewhere(opened, "cuda")))
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PROVIDER.is_file() or not stub_cuda.available():
        pytest.skip(f"{SITE} holds no onnxruntime-gpu, or there is no C compiler")
    folder = tmp_path_factory.mktemp("stubs")
    stub_cuda.make_stubs(PROVIDER, folder)
    return folder


LOADED = """
import sys
from pathlib import Path
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions, load
from latentrt.engines.spec import EngineSpec, TensorSpec
spec = EngineSpec(component="unet", inputs=(TensorSpec(name="timestep", dtype="float16", shape=()),), outputs=())
load(Path(sys.argv[1]), spec, "cuda", OnnxRuntimeOptions(cuda_graph=True))
"""


BUILT = """
import sys
from pathlib import Path
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.onnxruntime.build import build
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions, load
bundle, folder = Bundle.open(sys.argv[1]), Path(sys.argv[2])
for name, (file, spec) in build(bundle, folder, "cuda", lambda *_: None).items():
    if {tensor.name for tensor in spec.inputs} & {"timestep", "control"}:
        load(folder / file, spec, "cuda", OnnxRuntimeOptions(cuda_graph=True))
        print(name)
"""


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes in float16."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


def opened(
    model: onnx.ModelProto, folder: Path, stubs: Path, *, changed: dict[str, list[int]] | None = None, **settings: str
) -> tuple[Any, onnx.ModelProto]:
    """Open a graph on the CUDA provider. Returns the nodes that it leaves to the CPU, and what it made of the graph."""
    graph, optimised = folder / "graph.onnx", folder / "optimised.onnx"
    (folder / "data").unlink(missing_ok=True)
    onnx.save(model, graph, save_as_external_data=True, location="data", size_threshold=128)
    asked = {"graph": str(graph), "optimised": str(optimised), "changed": changed or {}, "settings": settings}
    told = run(OPENED, stubs, told=json.dumps(asked))
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1]), onnx.load(optimised, load_external_data=False)


def run(program: str, stubs: Path, *arguments: str, told: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in a Python that has ONNX Runtime's wheel for GPUs, and the stubs."""
    paths = os.pathsep.join([str(SITE), *sys.path])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": paths}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, input=told, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("recorded", ["0", "1"])
def test_the_provider_takes_every_operator_of_a_rewritten_graph(stubs: Path, tmp_path: Path, recorded: str) -> None:
    """CUDA graphs too, which it refuses where anything but a shape is computed on the CPU."""
    model = half(network())
    use_cuda_kernels(model)
    elsewhere, made = opened(model, tmp_path, stubs, enable_cuda_graph=recorded)
    assert elsewhere == {}
    counts = Counter(node.op_type for node in made.graph.node)
    assert (counts["NhwcConv"], counts["GroupNorm"], counts["SkipGroupNorm"]) == (6, 2, 1)
    assert counts["Transpose"] == 2  # those of weights are folded


def with_host_kernel() -> onnx.ModelProto:
    """Return a graph with an operator that CUDA has no kernel of, of opset 23."""
    model = network()
    ones = numpy_helper.from_array(np.ones(4, np.float32), "ones")
    model.graph.initializer.append(ones)
    model.graph.node.append(onnx.helper.make_node("InstanceNormalization", ["y", "ones", "ones"], ["z"], "the norm"))
    model.graph.output[0].name = "z"
    return half(model)


def test_what_cannot_be_recorded_is_refused_with_the_node_that_prevents_it(stubs: Path, tmp_path: Path) -> None:
    model = with_host_kernel()
    use_cuda_kernels(model)
    opened(model, tmp_path, stubs)
    told = run(LOADED, stubs, str(tmp_path / "optimised.onnx"))
    assert told.returncode == 1
    assert re.search("EngineError: unet.*InstanceNormalization 'the norm'", told.stderr.splitlines()[-1])


def test_what_has_no_kernel_is_named(stubs: Path, tmp_path: Path) -> None:
    elsewhere, made = opened(with_host_kernel(), tmp_path, stubs)
    assert elsewhere == {"the norm": "InstanceNormalization"}
    counts = Counter(node.op_type for node in made.graph.node)
    assert counts["GroupNormalization"] == 0 and counts["ReduceMean"] == 6  # there is none: taken apart


def test_the_provider_takes_weights_in_the_place_of_a_graphs_own(stubs: Path, tmp_path: Path) -> None:
    opened(half(network()), tmp_path, stubs, changed={"down.w": [16, 16, 3, 3]})
    with pytest.raises(AssertionError, match="Trying to replace non-external initializer"):
        opened(half(network()), tmp_path, stubs, changed={"first.b": [16]})


@pytest.fixture(scope="module")
def bundles(
    workshop: Path,
    made: Make,
    controlled: MakeControlled,
    motion: Controlled,
    shown: Callable[[str], Controlled],
    svd: tuple[Path, Path],
) -> Callable[[str], Path]:
    """Return bundles by their kinds."""

    def skipping() -> Path:
        checkpoint, _ = made("sd3", "dual t5")
        options = CheckpointOptions(skip_layers=(0, 1))
        export_checkpoint(str(checkpoint), workshop / "sd3-dual-t5-skipping", precision="fp32", options=options)
        return workshop / "sd3-dual-t5-skipping"

    kinds: dict[str, Callable[[], Path]] = {
        "controlnets": lambda: controlled("sd1", "lcm").bundle,
        "inpainting": lambda: made("sd1", "inpainting")[1],
        "sd2": lambda: made("sd2", "")[1],
        "refiner": lambda: made("sdxl", "refined")[1],
        "image prompts": lambda: shown("sdxl").bundle,
        "skipped layers": skipping,
        "video": lambda: motion.bundle,
        "moving image": lambda: svd[1],
    }
    return lambda kind: kinds[kind]()


@pytest.mark.parametrize(
    "kind", ["controlnets", "inpainting", "sd2", "refiner", "image prompts", "skipped layers", "video", "moving image"]
)
def test_every_kind_of_stage_can_be_recorded_as_a_cuda_graph(
    stubs: Path, bundles: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    bundle = bundles(kind)
    told = run(BUILT, stubs, str(bundle), str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert set(told.stdout.split()) >= set(Bundle.open(bundle).manifest.of_role("denoiser", *CONTROL_ROLES))
