"""Graphs that another tool exported, their weights in files of any name: the graph says where, and no name does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.build import build_engines
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, CheckpointError, printable
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.graphs.widen import widen
from latentrt.engines.verify.verify import verify
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.external_data import data_files
from latentrt.export.graphs.optimum import take_long_ids
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.sources import hub
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Lora
from tests.hub_cache import in_hub_cache
from tests.lora_files import kohya, make_factors, save

GRAPHS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
# What exporters call the file: diffusers' script, optimum, onnx's own default, and one that sorts before the graph.
NAMES = dict(zip(GRAPHS, ("weights.pb", "model.onnx_data", "model.onnx.data", "a-part/all.bin"), strict=True))
CALL: dict[str, Any] = {"prompt": "a red circle", "steps": 3, "seed": 3, "guidance": 3.0, "sampler": "euler"}


def save_outside(model: onnx.ModelProto, path: Path, name: str) -> None:
    (path.parent / name).parent.mkdir(exist_ok=True)
    onnx.save(model, str(path), save_as_external_data=True, location=name, size_threshold=1024)


@pytest.fixture(scope="module")
def optimum(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in optimum's layout, whose weights lie outside its graphs."""
    root = Path(shutil.copytree(sd1_bundle / "onnx", tmp_path_factory.mktemp("optimum") / "model"))
    for component, name in NAMES.items():
        path = root / component / "model.onnx"
        save_outside(onnx.load(str(path)), path, name)
    return root


@pytest.fixture(scope="module")
def adopted(optimum: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that directory, read from the hub's cache, and put into it."""
    work = tmp_path_factory.mktemp("adopted")
    snapshot = in_hub_cache(optimum, work / "cache", repository="models--user--optimum")
    export_checkpoint(str(snapshot), work / "bundle")
    return in_hub_cache(work / "bundle", work / "cache", repository="models--user--bundle")


def picture(bundle: Path, **more: Any) -> Any:
    with Pipeline.load(bundle) as pipe:
        return np.asarray(pipe(**CALL, **more).images[0])


def test_every_file_of_a_graph_is_found_and_hashed(optimum: Path) -> None:
    files = set(open_checkpoint(str(optimum)).files)
    assert {f"{component}/{name}" for component, name in NAMES.items()} <= files
    told = {network.name: network for network in inspect_checkpoint(str(optimum)).networks}
    sizes = [(optimum / "unet" / name).stat().st_size for name in ("model.onnx", NAMES["unet"])]
    assert told["unet"].bytes == sum(sizes)


def test_a_bundle_of_such_graphs_is_opened_from_the_hubs_cache_and_draws_the_same(
    adopted: Path, sd1_bundle: Path
) -> None:
    """Its graphs, their external data, its engines and theirs are all links to blobs."""
    links = {path.name for path in adopted.rglob("*") if path.is_symlink()}
    assert {"model.onnx", "model.onnx_data", "unet.onnx", "unet.onnx.data", "engine.json", "manifest.json"} <= links
    np.testing.assert_array_equal(picture(adopted), picture(sd1_bundle))
    rows = list(verify(Bundle.open(adopted)))
    assert rows and all(row.ok for row in rows)


def test_engines_are_built_of_graphs_that_are_links(adopted: Path, sd1_bundle: Path) -> None:
    """And written beside the links, where the directory may be written to."""
    record = build_engines(Bundle.open(adopted), "cpu", force=True)
    assert not (adopted / "engines" / record.key.directory / "unet.onnx.data").is_symlink()
    np.testing.assert_array_equal(picture(adopted), picture(sd1_bundle))


def test_loras_are_added_to_engines_that_are_links(sd1_bundle: Path, sd1_checkpoint: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", kohya(make_factors(sd1_checkpoint, seed=1)))
    cached = in_hub_cache(sd1_bundle, tmp_path / "cache")
    linked = in_hub_cache(file, tmp_path / "cache", repository="models--user--style")
    found = picture(cached, loras=[Lora(file=linked)])
    np.testing.assert_array_equal(found, picture(sd1_bundle, loras=[Lora(file=file)]))
    assert not np.array_equal(found, picture(cached))


def small() -> onnx.ModelProto:
    """A graph with one weight of its own and one inside a constant inside a branch."""
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(512, np.float32), "c"))],
        "inner",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [512])],
    )
    nodes = [
        helper.make_node("If", ["on"], ["b"], then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["w", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "outer",
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])],
        [numpy_helper.from_array(np.ones(512, np.float32), "w")],
    )
    return helper.make_model(graph)


def relocate(model: onnx.ModelProto, **said: object) -> onnx.ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in said.items():
        tensor.external_data.add(key=key, value=str(value))
    return model


def test_weights_inside_branches_and_constants_are_found_too(tmp_path: Path) -> None:
    model = small()
    for node in model.graph.node[0].attribute[0].g.node:
        node.attribute[0].t.data_location = TensorProto.EXTERNAL
        node.attribute[0].t.external_data.add(key="location", value="inner.bin")
        node.attribute[0].t.ClearField("raw_data")
    onnx.save(relocate(model, location="outer.bin"), str(tmp_path / "model.onnx"))
    for name in ("inner.bin", "outer.bin", "stranger_data"):
        (tmp_path / name).write_bytes(bytes(2048))
    assert data_files(tmp_path / "model.onnx") == {name: tmp_path / name for name in ("inner.bin", "outer.bin")}


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret", "a/../../secret", "..\\secret", "", ".", "..", "a\0b", "C:\\secret"],
)
def test_data_outside_the_graphs_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "unet" / "a").mkdir(parents=True)
    onnx.save(relocate(small(), location=location), str(tmp_path / "unet" / "model.onnx"))
    with pytest.raises(CheckpointError) as caught:
        data_files(tmp_path / "unet" / "model.onnx")
    assert printable(repr(location)) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"location": "absent"}, "/absent "),
        ({"location": "data", "offset": 4000}, r"/data\D+4096\D"),
        ({"location": "data", "length": 10**18}, r"/data\D+4096\D"),
        ({"location": "data", "offset": "x"}, r"model\.onnx .*'data'"),
        ({"location": "data", "offset": -4000}, r"model\.onnx .*'data'"),
        ({"offset": 0}, r"model\.onnx .*''"),
    ],
)
def test_data_that_is_not_there_is_refused(tmp_path: Path, said: dict[str, object], told: str) -> None:
    (tmp_path / "data").write_bytes(bytes(4096))
    onnx.save(relocate(small(), **said), str(tmp_path / "model.onnx"))
    with pytest.raises(CheckpointError, match=told):
        data_files(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a", bytes(100)])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"/model\.onnx .*ONNX"):
        data_files(tmp_path / "model.onnx")


Spoil = Callable[[Path], object]


def without_configs(root: Path) -> None:
    """The layout that diffusers' own script wrote: graphs alone, and no config of a network."""
    for component in GRAPHS:
        (root / component / "config.json").unlink()
    index = json.loads((root / "model_index.json").read_text())
    index |= {"_class_name": "OnnxStableDiffusionPipeline", "safety_checker": ["diffusers", "OnnxRuntimeModel"]}
    index |= {name: ["diffusers", "OnnxRuntimeModel"] for name in GRAPHS}
    (root / "model_index.json").write_text(json.dumps(index))


def for_openvino(root: Path) -> None:
    for component in GRAPHS:
        (root / component / "model.onnx").rename(root / component / "openvino_model.xml")
        (root / component / "openvino_model.bin").write_bytes(bytes(8))


def for_flax(root: Path) -> None:
    (root / "unet" / "model.onnx").rename(root / "unet" / "diffusion_flax_model.msgpack")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(without_configs, "OnnxStableDiffusionPipeline"), (for_openvino, "OpenVINO"), (for_flax, "Flax")],
    ids=["old ONNX", "OpenVINO", "Flax"],
)
def test_other_forms_of_the_same_networks_are_named(optimum: Path, tmp_path: Path, spoil: Spoil, words: str) -> None:
    root = Path(shutil.copytree(optimum, tmp_path / "model"))
    spoil(root)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(root))
    assert words in str(inspect_checkpoint(str(root)).problem)
    listed = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    with pytest.raises(CheckpointError, match=words):
        hub.choose_files(listed, "user/model")


def test_old_graphs_with_configs_are_read_whatever_their_pipeline_is_called(optimum: Path, tmp_path: Path) -> None:
    """optimum's first versions named diffusers' pipeline in their index."""
    root = Path(shutil.copytree(optimum, tmp_path / "model"))
    index = json.loads((root / "model_index.json").read_text())
    index |= {"_class_name": "OnnxStableDiffusionPipeline"}
    index |= {name: ["diffusers", "OnnxRuntimeModel"] for name in GRAPHS}
    (root / "model_index.json").write_text(json.dumps(index))
    assert open_checkpoint(str(root)).source == "onnx"


def test_weights_are_preferred_to_graphs_of_the_same(optimum: Path, sd1_checkpoint: Path, tmp_path: Path) -> None:
    """As in the repository of SDXL, where both are: of weights anything can be made."""
    root = Path(shutil.copytree(sd1_checkpoint, tmp_path / "model"))
    for component in GRAPHS:
        shutil.copytree(optimum / component, root / component, dirs_exist_ok=True)
    assert open_checkpoint(str(root)).source == "torch"
    listed = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    assert not any(".onnx" in name for name in hub.choose_files(listed))


def test_the_hub_serves_graphs_and_then_what_they_name(optimum: Path) -> None:
    listed = [path.relative_to(optimum).as_posix() for path in optimum.rglob("*") if path.is_file()]
    wanted = hub.choose_files([*listed, "unet/model_quantized.onnx", "unet/stranger.onnx_data"])
    assert {name for name in wanted if ".onnx" in name} == {f"{component}/model.onnx" for component in GRAPHS}
    data = hub.graph_data(optimum, wanted)
    assert set(data) == {f"{component}/{name}" for component, name in NAMES.items()}
    assert set(wanted) | set(data) == set(listed)


def test_data_in_a_bundle_outside_the_graphs_folder_is_refused(adopted: Path) -> None:
    model = load_graph(adopted / "onnx" / "unet" / "model.onnx")
    for tensor in model.graph.initializer:
        tensor.data_type = TensorProto.FLOAT16
        for entry in tensor.external_data:
            entry.value = "../../secret" if entry.key == "location" else entry.value
    with pytest.raises(BundleError, match=r"'\.\./\.\./secret'"):
        widen(model, adopted / "onnx" / "unet", None)


def test_tokens_of_32_bits_are_taken_as_64() -> None:
    """As the text encoders of older exports have them, where every request has 64."""
    table = numpy_helper.from_array(np.arange(20, dtype=np.float32).reshape(10, 2), "table")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("Add", ["input_ids", "input_ids"], ["twice"]),  # which takes two of one type
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["batch", "tokens"])],
        [
            helper.make_tensor_value_info("states", TensorProto.FLOAT, ["batch", "tokens", 2]),
            helper.make_tensor_value_info("twice", TensorProto.INT32, ["batch", "tokens"]),
        ],
        [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    take_long_ids(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    states, twice = session.run(None, {"input_ids": np.array([[3, 9]], dtype=np.int64)})
    np.testing.assert_array_equal(states, [[[6, 7], [18, 19]]])
    np.testing.assert_array_equal(twice, [[6, 18]])
