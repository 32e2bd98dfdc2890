"""TensorRT-RTX builds real engines on a machine with no GPU; what the library refuses becomes one sentence."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from latentrt.engines.backends import BACKENDS, Opening
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle, record_file, write_manifest
from latentrt.engines.cli import build as build_command
from latentrt.engines.cuda import gpus
from latentrt.engines.cuda.gpus import Gpu, find_gpu
from latentrt.engines.errors import EngineError, NotInstalledError, RequestError
from latentrt.engines.find import choose
from latentrt.engines.open import open_engines
from latentrt.engines.progress import silent
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import compile as tensorrt_compile
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.logger import LogScope
from latentrt.engines.verify.verify import verify
from tests.conftest import MakeControlled
from tests.stand_in import bindings_of

ADA = BuildOptions(sizes=((32, 32),), batches=(1, 2), compute_capability="8.9", optimization_level=0)
GPU = Gpu(name="NVIDIA L4", compute_capability="8.9", sm_count=58, memory_bytes=24 << 30, driver_major=13)


@pytest.fixture(scope="module")
def library() -> Any:
    try:
        return trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def built(library: Any, sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of the tiny bundle with engines for compute capability 8.9. Tests read from it."""
    root = shutil.copytree(sd1_bundle, tmp_path_factory.mktemp("rtx") / "bundle")
    build_engines(Bundle.open(root), "tensorrt-rtx", options=ADA)
    return Bundle.open(root)


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(sd1_bundle, tmp_path / "bundle"))


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpus, "bindings", lambda: bindings_of([GPU]))
    yield


@pytest.fixture
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpus, "bindings", lambda: bindings_of([]))
    yield


def rtx_record(bundle: Bundle) -> tuple[Path, Any]:
    ((path, record),) = [
        (path, record) for path, record in bundle.engine_directories().items() if record.key.backend == "tensorrt-rtx"
    ]
    return path, record


def test_every_component_is_compiled(built: Bundle) -> None:
    directory, record = rtx_record(built)
    assert set(record.entries) == set(built.manifest.components)
    assert all(record.files[entry].bytes > 10_000 for entry in record.entries.values())
    assert sorted(path.name for path in directory.iterdir()) == sorted([*record.files, "engine.json"])


def test_the_demo_bundle_is_compiled(library: Any, demo_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    options = BuildOptions(compute_capability="8.9", optimization_level=0)
    record = build_engines(bundle, "tensorrt-rtx", options=options)
    assert record.key.profiles[0] == "128x128 pictures 1 rows 1 tokens 77"  # the bundle's own size
    assert record.files["unet.engine"].bytes > bundle.manifest.components["unet"].weights_bytes


# Kernels are chosen for whole operators: a decomposed one is slow, and nothing says so.
WHOLE = {
    "text_encoder": {"Attention": 2, "LayerNormalization": 6},
    "unet": {"Attention": 14, "GroupNormalization": 30, "LayerNormalization": 21, "Gelu": 7},
    "vae_decoder": {"Attention": 1, "GroupNormalization": 22},
    "vae_encoder": {"Attention": 1, "GroupNormalization": 14},
}
DECOMPOSED = {"Softmax", "InstanceNormalization", "ReduceMean", "Erf", "Tanh"}


@pytest.mark.parametrize("component", WHOLE)
def test_attention_norms_and_gelu_reach_the_compiler_whole(demo_bundle: Path, component: str) -> None:
    """The demo's UNet has 7 transformer blocks of two attentions, three norms and one GELU each."""
    graph = Bundle.open(demo_bundle).manifest.components[component].graph
    nodes = onnx.load(str(demo_bundle / graph), load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes)
    whole = {operator for operators in WHOLE.values() for operator in operators}
    assert {operator: counts[operator] for operator in whole if counts[operator]} == WHOLE[component]
    assert not DECOMPOSED & set(counts)


def test_the_denoiser_is_the_fused_stage_and_the_decoder_goes_from_state_to_pixels(built: Bundle) -> None:
    _, record = rtx_record(built)
    unet, decoder = record.specs["unet"], record.specs["vae_decoder"]
    assert [(t.name, t.dtype) for t in unet.inputs] == [
        ("state", "float32"),
        ("control", "float32"),
        ("noise", "float32"),
        ("guidance", "float32"),
        ("picture_of_row", "int64"),
        ("keep_mask", "float32"),
        ("known", "float32"),
        ("encoder_hidden_states", "float32"),
    ]
    assert [str(t) for t in unet.outputs] == [
        "next_state: float32[pictures, 6, 4, latent_height, latent_width]",
    ]
    assert [str(t) for t in decoder.inputs] == ["state: float32[pictures, 6, 4, latent_height, latent_width]"]
    assert [(t.name, t.dtype) for t in decoder.outputs] == [("pixels", "uint8"), ("squares", "float32")]
    text = record.specs["text_encoder"]
    assert [str(t) for t in text.inputs] == ["input_ids: int64[batch, 77]", "extra_embeddings: float32[64, 32]"]


def test_profiles_are_static_one_for_each_shape_a_component_sees(built: Bundle) -> None:
    _, record = rtx_record(built)
    latents = {"latent_height": 8, "latent_width": 8} if built.manifest.latents.factor == 4 else {}
    assert latents, "the tiny bundle's factor changed"
    assert record.specs["unet"].profiles == tuple(
        {"pictures": pictures, "rows": rows, "tokens": 77, **latents}
        for pictures, rows in ((1, 1), (1, 2), (2, 2), (2, 4))
    )
    assert record.specs["text_encoder"].profiles == ({"batch": 1}, {"batch": 2}, {"batch": 4})
    assert record.specs["vae_decoder"].profiles == ({"pictures": 1, **latents}, {"pictures": 2, **latents})
    assert record.specs["vae_encoder"].profiles[0] == {"batch": 1, "height": 32, "width": 32}


def test_the_key_names_the_target_the_shapes_and_the_options(built: Bundle, library: Any) -> None:
    _, record = rtx_record(built)
    key = record.key
    assert (key.backend, key.backend_version) == ("tensorrt-rtx", library.__version__)
    assert (key.device, key.compute_capability, key.sm_count) == ("compute capability 8.9", "8.9", None)
    assert key.profiles[1] == "32x32 pictures 1 rows 2 tokens 77" and len(key.profiles) == 4
    assert key.options == (f"recipe {trt_library.RECIPE}", "optimization level 0", "state rows 6")


def test_the_same_options_find_what_was_built(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "compile_graph", pytest.fail)
    assert build_engines(built, "tensorrt-rtx", options=ADA) == rtx_record(built)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": ((64, 32),)},
        {"batches": (1,)},
        {"tokens": (154,)},
        {"compute_capability": "12.0"},
        {"optimization_level": 1},
        {"aux_streams": 0},
        {"separate_skips": True},
        {"workspace_mb": 512},
        {"state_rows": 2},
        {"refit": True},
        {"version_compatible": True},
    ],
)
def test_each_option_makes_a_key_of_its_own(built: Bundle, change: dict[str, Any]) -> None:
    key = BACKENDS["tensorrt-rtx"].key
    assert key(built, replace(ADA, **change)).digest != key(built, ADA).digest


def spoil(bundle: Bundle, component: str, *, op: str | None = None, takes: str | None = None) -> Bundle:
    """Alter the first node of a graph, and record the altered file as if it had been exported so."""
    name = bundle.manifest.components[component].graph
    model = onnx.load(str(bundle.root / name), load_external_data=False)
    node = model.graph.node[0]
    node.name = "spoilt"
    node.op_type = op or node.op_type
    node.input[0] = takes or node.input[0]
    (bundle.root / name).write_bytes(model.SerializeToString())
    files = {**bundle.manifest.files, name: record_file(bundle.root, name)}
    write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, files=files))
    return Bundle.open(bundle.root)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"op": "Frobnicate"}, "Frobnicate spoilt: .+"),
        ({"takes": "nowhere"}, "Shape spoilt: .+"),
    ],
    ids=["unknown operator", "dangling input"],
)
def test_what_the_parser_refuses_is_said_in_its_words(
    library: Any, copy: Bundle, change: dict[str, str], told: str
) -> None:
    with pytest.raises(EngineError, match=f" text_encoder .*{told}"):
        build_engines(spoil(copy, "text_encoder", **change), "tensorrt-rtx", options=ADA)
    assert not list((copy.root / "engines").glob("*tensorrt*"))
    assert not list((copy.root / "engines").glob(".*"))


@pytest.mark.skipif(find_gpu() is not None, reason="a GPU answers here")
def test_what_the_compiler_refuses_is_said_in_the_loggers_words(
    library: Any, copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_compile, "_let_attention_decompose", lambda library, network: None)
    with pytest.raises(EngineError, match=r"^text_encoder .*\bAttention\b"):
        build_engines(copy, "tensorrt-rtx", options=ADA)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Make SIGINT raise, as on a terminal: a shell starts its background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_compiler_and_leaves_nothing(library: Any, copy: Bundle, interruptible: None) -> None:
    long = replace(ADA, sizes=((64, 64), (96, 96), (128, 128)), batches=(1, 2, 3, 4), optimization_level=5)
    timer = threading.Timer(2.0, signal.raise_signal, [signal.SIGINT])
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        build_engines(copy, "tensorrt-rtx", options=long)
    assert time.monotonic() - start < 20
    assert not [path for path in (copy.root / "engines").iterdir() if "tensorrt" in path.name]


def test_progress_is_told_from_the_first_step_to_the_last(library: Any, copy: Bundle) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def report(what: str, done: int, total: int) -> None:
        told.setdefault(what, []).append((done, total))

    build_engines(copy, "tensorrt-rtx", options=replace(ADA, batches=(1,)), report=report)
    components = copy.manifest.components
    assert list(told) == [
        *(f"build {component} (tensorrt-rtx)" for component in components),
        *(f"references of {component} (cpu)" for component in components),
    ]
    for steps in told.values():
        assert steps[0] == (0, 1) and steps[-1][0] == steps[-1][1]
        assert [done for done, total in steps if done == total] == [steps[-1][0]]  # the end is told once
    assert len(told["build unet (tensorrt-rtx)"]) > 3


def test_the_command_builds_for_a_fleet(library: Any, copy: Bundle) -> None:
    words = "--backend tensorrt-rtx --size 32x32 --batch 1 --compute-capability 12.0 --optimization-level 0 --json"
    result = CliRunner().invoke(build_command, [str(copy.root), *words.split()])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["key"]["compute_capability"] == "12.0"
    assert len(record["specs"]["unet"]["profiles"]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [("--size 32,x", " 512x512,768x512"), ("--batch two", " 1,2,4")],
)
def test_the_command_says_how_shapes_are_written(copy: Bundle, words: str, expected: str) -> None:
    result = CliRunner().invoke(build_command, [str(copy.root), *words.split()])
    assert result.exit_code == 2 and expected in result.output


def test_a_gpu_type_that_the_library_does_not_serve_is_refused(library: Any, copy: Bundle) -> None:
    with pytest.raises(EngineError, match=r" 9\.0\b.* 8\.9\b"):
        build_engines(copy, "tensorrt-rtx", options=replace(ADA, compute_capability="9.0"))


@pytest.mark.skipif(find_gpu() is not None, reason="a GPU answers here")
def test_a_plan_without_a_driver_is_an_error_and_no_crash(built: Bundle) -> None:
    with pytest.raises(EngineError, match=r" tensorrt-rtx .*NVIDIA"):
        open_engines(built, "tensorrt-rtx")
    directory, record = rtx_record(built)
    opening = Opening(bundle=built, directory=directory, record=record, components=("unet",))
    with pytest.raises(EngineError, match=r" tensorrt-rtx .*NVIDIA"):
        BACKENDS["tensorrt-rtx"].open(opening)


@pytest.mark.skipif(find_gpu() is not None, reason="a GPU answers here")
def test_neither_auto_nor_verify_offers_engines_that_cannot_run(built: Bundle) -> None:
    assert choose("auto", built).backend == "cpu"
    assert "tensorrt-rtx" not in {row.backend for row in verify(built)}


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_without_the_library_the_error_is_the_install_command(
    copy: Bundle, flavor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in trt_library.MODULES[flavor]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotInstalledError) as caught:
        build_engines(copy, flavor, options=ADA)
    assert caught.value.install == f"pip install 'latentrt[{flavor}]'"


def test_a_library_whose_shared_objects_are_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise FileNotFoundError("libnvinfer.so.11")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(NotInstalledError, match=r"\(libnvinfer\.so\.11\)"):
        trt_library.require("tensorrt")


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3.9.post1", "10.14.0.5"])
def test_a_library_that_is_too_old_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type("old", (), {"__version__": version}))
    with pytest.raises(NotInstalledError, match=rf"tensorrt {version} .* 10\.14\.1 "):
        trt_library.require("tensorrt")


def test_the_oldest_library_that_knows_attention_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type("oldest", (), {"__version__": "10.14.1.48.post1"}))
    assert trt_library.version_of(trt_library.require("tensorrt")) == "10.14.1.48"


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"compute_capability": None}, "--compute-capability 8.9"),
        ({"refit": True}, "--refit"),
        ({"version_compatible": True}, "--lean"),
    ],
)
def test_what_a_machine_without_gpu_cannot_build_is_refused(
    library: Any, no_gpu_here: None, change: dict[str, Any], option: str
) -> None:
    assert option in str(BACKENDS["tensorrt-rtx"].cannot_build(replace(ADA, **change)))


def test_tensorrt_builds_only_where_its_gpu_is(monkeypatch: pytest.MonkeyPatch, no_gpu_here: None) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type("new", (), {"__version__": "11.4.0.106"}))
    assert "--backend tensorrt-rtx" in str(BACKENDS["tensorrt"].cannot_build(BuildOptions()))


def test_tensorrts_key_names_the_gpu_and_its_driver(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, gpu_here: None
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type("new", (), {"__version__": "11.4.0.106"}))
    key = BACKENDS["tensorrt"].key(copy, BuildOptions())
    assert (key.device, key.compute_capability, key.sm_count, key.driver_major) == ("NVIDIA L4", "8.9", 58, 13)


def test_weights_that_change_and_the_lean_runtime_go_together_only_once_that_was_tried(
    monkeypatch: pytest.MonkeyPatch, gpu_here: None
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", type("new", (), {"__version__": "11.4.0.106"}))
    asked = [BuildOptions(refit=refit, version_compatible=lean) for refit in (False, True) for lean in (False, True)]
    refused = [BACKENDS["tensorrt"].cannot_build(options) is not None for options in asked]
    assert refused == [False, False, False, True]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tf32_is_for_what_an_fp16_bundle_keeps_in_float32_and_never_for_the_stage(
    precision: str, copy: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    allowed = {}

    def compile_graph(library: Any, graph: Path, spec: Any, options: Any, *, tf32: bool, **_: Any) -> bytes:
        allowed[spec.component] = tf32
        return b""

    monkeypatch.setattr(tensorrt, "compile_graph", compile_graph)
    monkeypatch.setattr(tensorrt, "require", lambda flavor: None)
    write_manifest(copy.root, msgspec.structs.replace(copy.manifest, precision=precision))
    tensorrt.build(Bundle.open(copy.root), tmp_path, "tensorrt-rtx", ADA, silent)
    assert allowed == {name: precision == "fp16" and name != "unet" for name in copy.manifest.components}


@pytest.mark.parametrize("tf32", [False, True])
def test_the_builder_is_told_whether_it_may_use_tf32(library: Any, tf32: bool) -> None:
    told = LogScope(library)
    config = tensorrt_compile._configure(library, library.Builder(told.logger), BuildOptions(), told, tf32=tf32)
    assert config.get_flag(library.BuilderFlag.TF32) is tf32


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (BuildOptions(sizes=((30, 32),)), "^--size: .* 30x32, .* 4$"),
        (BuildOptions(batches=(1, 0)), "^--batch: .* 0, .* 1 "),
        (BuildOptions(tokens=(-77,)), "^--tokens: .* -77, .* 1 "),
        (BuildOptions(tokens=(77, 100)), "^--tokens: .* 77, 100, .* 77"),
        (BuildOptions(optimization_level=6), "^--optimization-level: .* 6, .* 0 .* 5$"),
    ],
)
def test_options_that_make_no_sense_are_refused(copy: Bundle, options: BuildOptions, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        options.profiles(copy.manifest)


def test_the_cpu_takes_no_shapes(copy: Bundle) -> None:
    with pytest.raises(EngineError, match="'cpu'") as caught:
        build_engines(copy, "cpu", options=BuildOptions(batches=(2,)))
    assert caught.type is EngineError  # no library is missing


@pytest.mark.parametrize("component", ["controlnet_edges", "unet"])
def test_a_controlnet_is_compiled_and_the_unet_that_it_steers(
    library: Any, controlled: MakeControlled, component: str, tmp_path: Path
) -> None:
    bundle = Bundle.open(controlled("sdxl", "").bundle)
    options = replace(ADA, sizes=((40, 32),), batches=(1,))
    compiling = partial(tensorrt_compile.compile_graph, library, device=None)
    name, spec = tensorrt._build_one(compiling, bundle, component, tmp_path, "tensorrt-rtx", options, silent)
    assert (tmp_path / name).stat().st_size > bundle.manifest.components[component].weights_bytes
    assert [profile["rows"] for profile in spec.profiles] == [1, 2]
    assert spec.profiles[0]["latent_height_2"] == 4 and spec.profiles[0]["latent_width_2"] == 5
