"""Exporting: what is in a bundle, that its graphs compute what the checkpoint computes, and at which sizes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.compare import relative_error
from latentrt.engines.errors import CheckpointError
from latentrt.export.graphs import golden
from latentrt.export.graphs import run as sessions
from tests.tiny import NETWORKS

FAMILIES = ("sd1", "sd2")
# Over the output's range: float32 in another order of operations, through a network of a dozen layers.
CLOSE = 1e-5


@pytest.fixture(params=FAMILIES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(request.getfixturevalue(f"{request.param}_bundle"))


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, bundle: Bundle) -> Path:
    return Path(request.getfixturevalue(f"{bundle.manifest.family}_checkpoint"))


def session(bundle: Bundle, component: str) -> Any:
    return sessions.open_session(bundle.root / bundle.manifest.components[component].graph)


def graph(bundle: Bundle, component: str) -> onnx.ModelProto:
    return onnx.load(str(bundle.root / bundle.manifest.components[component].graph))


def reference(checkpoint: Path, component: str, inputs: dict[str, Any]) -> list[Any]:
    """Run diffusers' and transformers' own modules."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    tensors = [torch.from_numpy(array) for array in inputs.values()]
    with torch.no_grad():
        if component == "text_encoder":
            model = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
            text = model(*tensors, output_hidden_states=True)
            layers = model.config.num_hidden_layers
            skipped = [model.final_layer_norm(text.hidden_states[-(skip + 1)]) for skip in range(1, layers)]
            outputs = [text.last_hidden_state, text.pooler_output, torch.stack(skipped, dim=1)]
        elif component == "unet":
            outputs = [UNet2DConditionModel.from_pretrained(checkpoint / "unet")(*tensors).sample]
        elif component == "vae_decoder":
            outputs = [AutoencoderKL.from_pretrained(checkpoint / "vae").decode(*tensors).sample]
        else:
            outputs = [AutoencoderKL.from_pretrained(checkpoint / "vae").encode(*tensors).latent_dist.parameters]
    return [output.numpy() for output in outputs]


def test_the_manifest_names_every_file_but_the_engines(bundle: Bundle) -> None:
    files = {path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*") if path.is_file()}
    ours = {name for name in files if not name.startswith("engines/")} - {"manifest.json"}
    assert set(bundle.manifest.files) == ours
    for name in ours:
        bundle.path(name, check="hash")


def test_the_manifest_says_what_the_checkpoint_is(bundle: Bundle, checkpoint: Path) -> None:
    manifest = bundle.manifest
    assert set(manifest.components) == set(NETWORKS)
    assert set(manifest.provenance.files) == {
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    }
    assert {"torch", "diffusers", "onnx"} <= set(manifest.provenance.tools)
    weights = sum(path.stat().st_size for path in checkpoint.rglob("unet/*.safetensors"))
    assert manifest.components["unet"].weights_bytes == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize("component", NETWORKS)
def test_graphs_have_the_tensors_of_the_manifest(bundle: Bundle, component: str) -> None:
    spec = bundle.manifest.components[component]
    model = graph(bundle, component).graph
    for values, specs in ((model.input, spec.inputs), (model.output, spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in specs]
        for value, tensor in zip(values, specs, strict=True):
            kind = value.type.tensor_type
            assert tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim) == tensor.shape
            assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) == np.dtype(tensor.dtype)


def test_tensors_have_the_names_of_the_ecosystem(sd1_bundle: Path) -> None:
    unet = Bundle.open(sd1_bundle).manifest.components["unet"]
    assert [str(tensor) for tensor in (*unet.inputs, *unet.outputs)] == [
        "sample: float32[batch, 4, latent_height, latent_width]",
        "timestep: float32[steps]",
        "encoder_hidden_states: float32[batch, tokens, 32]",
        "out_sample: float32[batch, 4, latent_height, latent_width]",
    ]
    decoder = Bundle.open(sd1_bundle).manifest.components["vae_decoder"]
    assert str(decoder.outputs[0]) == "sample: float32[batch, 3, 4 * latent_height, 4 * latent_width]"


@pytest.mark.parametrize("component", NETWORKS)
def test_golden_outputs_are_those_of_diffusers(bundle: Bundle, checkpoint: Path, component: str) -> None:
    arrays = load_file(bundle.root / bundle.manifest.components[component].golden)
    spec = bundle.manifest.components[component]
    inputs = {tensor.name: arrays[f"input.{tensor.name}"] for tensor in spec.inputs}
    for tensor, expected in zip(spec.outputs, reference(checkpoint, component, inputs), strict=True):
        assert relative_error(arrays[f"output.{tensor.name}"], expected) < CLOSE


SIZES: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "text_encoder": [{"batch": (1,)}, {"batch": (4,)}],
    "unet": [{"batch": (3,), "side": (7, 9), "tokens": (12,)}, {"batch": (1,), "side": (16, 5), "tokens": (154,)}],
    "vae_decoder": [{"batch": (3,), "side": (3, 7)}],
    "vae_encoder": [{"batch": (3,), "side": (24, 20)}],
}


@pytest.mark.parametrize(("component", "sizes"), [(name, row) for name, rows in SIZES.items() for row in rows])
def test_graphs_agree_at_sizes_they_were_not_traced_at(
    bundle: Bundle, checkpoint: Path, component: str, sizes: dict[str, tuple[int, ...]]
) -> None:
    generator = np.random.default_rng(3)
    (batch,) = sizes["batch"]
    width = {"sd1": 32, "sd2": 48}[bundle.manifest.family]
    made: dict[str, Any] = {
        "input_ids": generator.integers(0, 500, (batch, 77)),
        "timestep": np.linspace(3.25, 990.5, batch, dtype=np.float32),
        "encoder_hidden_states": generator.standard_normal((batch, *sizes.get("tokens", (1,)), width)),
    }
    inputs = {}
    for tensor in bundle.manifest.components[component].inputs:
        shape = (batch, int((*tensor.shape, 1)[1]) if tensor.name not in made else 1, *sizes.get("side", ()))
        values = made[tensor.name] if tensor.name in made else generator.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype)
    found = sessions.run_session(session(bundle, component), inputs)
    for ours, theirs in zip(found.values(), reference(checkpoint, component, inputs), strict=True):
        assert relative_error(ours, theirs) < CLOSE


def test_one_timestep_serves_every_row_or_each_row_has_its_own(bundle: Bundle) -> None:
    arrays = load_file(bundle.root / bundle.manifest.components["unet"].golden)
    inputs = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
    unet = session(bundle, "unet")
    one = np.array([412.5], dtype=np.float32)
    shared = sessions.run_session(unet, {**inputs, "timestep": one})["out_sample"]
    own = sessions.run_session(unet, {**inputs, "timestep": np.repeat(one, 2)})["out_sample"]
    np.testing.assert_array_equal(shared, own)
    mixed = sessions.run_session(unet, {**inputs, "timestep": np.array([412.5, 7.75], dtype=np.float32)})["out_sample"]
    np.testing.assert_allclose(mixed[0], shared[0], atol=1e-6)
    assert np.abs(mixed[1] - shared[1]).max() > 1e-4


def test_attention_and_normalisation_are_single_nodes(sd1_bundle: Path) -> None:
    nodes = Counter(node.op_type for node in graph(Bundle.open(sd1_bundle), "unet").graph.node)
    assert nodes["Attention"] == 8  # itself and the text, in each of 4 transformer blocks
    assert nodes["GroupNormalization"] > 0
    assert nodes["LayerNormalization"] == 12
    assert not {"InstanceNormalization", "ReduceMean", "Softmax", "Erf"} & set(nodes)


def test_graphs_hold_nothing_of_the_machine_that_made_them(bundle: Bundle) -> None:
    for component in NETWORKS:
        data = (bundle.root / bundle.manifest.components[component].graph).read_bytes()
        assert not any(word in data for word in (b"site-packages", b"File \\", b"forward", str(Path.cwd()).encode()))


def test_half_precision_graphs_keep_timesteps_in_float32(demo_half_bundle: Path) -> None:
    bundle = Bundle.open(demo_half_bundle)
    dtypes = {t.name: t.dtype for c in bundle.manifest.components.values() for t in (*c.inputs, *c.outputs)}
    assert dtypes.pop("timestep") == "float32"
    assert dtypes.pop("input_ids") == "int64"
    assert set(dtypes.values()) == {"float16"}
    model = onnx.shape_inference.infer_shapes(graph(bundle, "unet"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    waves = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    assert waves
    assert all(types[node.input[0]] == onnx.TensorProto.FLOAT for node in waves)


def test_large_weights_lie_beside_the_graph(sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    from latentrt.export.graphs import external_data as graphs

    monkeypatch.setattr(graphs, "EXTERNAL_BYTES", 0)
    bundle = Bundle.open(sd1_bundle)
    path = bundle.root / bundle.manifest.components["text_encoder"].graph
    files = graphs.save_graph(onnx_ir.load(path), tmp_path / "model.onnx")
    assert [file.name for file in files] == ["model.onnx", "model.onnx_data"]
    assert files[0].stat().st_size < path.stat().st_size / 2
    ids = {"input_ids": np.zeros((1, 77), dtype=np.int64)}
    ours = sessions.run_session(sessions.open_session(tmp_path / "model.onnx"), ids)
    theirs = sessions.run_session(session(bundle, "text_encoder"), ids)
    np.testing.assert_array_equal(ours["pooler_output"], theirs["pooler_output"])


@pytest.mark.parametrize("damage", [1.0, np.nan])
def test_a_graph_that_differs_is_refused(sd1_bundle: Path, damage: float) -> None:
    bundle = Bundle.open(sd1_bundle)
    spec = bundle.manifest.components["vae_decoder"]
    arrays = load_file(bundle.root / spec.golden)
    inputs, outputs = {"latent_sample": arrays["input.latent_sample"]}, {"sample": arrays["output.sample"]}
    graph_file = bundle.root / spec.graph
    assert golden.check_graph("vae_decoder", graph_file, [(inputs, outputs)], precision="fp32") < CLOSE
    outputs["sample"][0, 0, 0, 0] += damage
    with pytest.raises(CheckpointError, match=r"^vae_decoder: "):
        golden.check_graph("vae_decoder", graph_file, [(inputs, outputs)], precision="fp32")


@pytest.mark.parametrize(("folder", "component"), [("unet", "unet"), ("text_encoder", "text_encoder")])
def test_weights_that_do_not_fit_the_config_are_refused(
    sd1_checkpoint: Path, tmp_path: Path, folder: str, component: str
) -> None:
    """diffusers and transformers would fill them with random numbers and a warning."""
    import shutil

    from safetensors.numpy import save_file

    from latentrt.export.networks import loading

    shutil.copytree(sd1_checkpoint / folder, tmp_path / folder)
    weights = next((tmp_path / folder).glob("*.safetensors"))
    arrays = load_file(weights)
    arrays.pop(sorted(arrays)[0])
    save_file(arrays, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"/{folder}: "):
        loading.load(component, tmp_path / folder)


def test_the_folder_of_graphs_is_one_that_optimum_reads(bundle: Bundle) -> None:
    """tests/test_optimum.py opens it with optimum itself."""
    root = bundle.root / "onnx"
    index = json.loads((root / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for name in ("unet", "text_encoder", "vae_decoder", "vae_encoder"):
        assert index[name][0] is not None
        assert (root / name / "model.onnx").is_file()
        assert (root / name / "config.json").is_file()
    assert json.loads((root / "vae_decoder" / "config.json").read_text())["scaling_factor"]
    assert (root / "scheduler" / "scheduler_config.json").is_file()
    assert {path.name for path in (root / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
