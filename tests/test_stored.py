"""Weights that stay in their files while a network is exported, and graphs that run a piece at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.spec import TensorSpec
from latentrt.export.graphs import golden
from latentrt.export.graphs import run as sessions
from latentrt.export.graphs import trace as graphs
from latentrt.export.networks import loading, modules
from latentrt.export.networks.streamed_weights import LARGE, StoredWeights, stored_dtype, windows
from latentrt.export.sources.weight_files import find_weights

FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mapped_tensor_is_found_in_its_file_and_a_copy_is_not(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = {"a": torch.randn(7, 5).to(dtype), "b": torch.randn(300).to(dtype), "none": torch.zeros(0, dtype=dtype)}
    save_file(numbers, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")
    assert stored_dtype(find_weights(tmp_path)) == dtype
    found = windows({**mapped, "copied": mapped["a"].clone(), "turned": mapped["a"].T, "half": mapped["b"][100:]})
    assert set(found) == {"a", "b", "half"}
    assert torch.equal(found["a"].read(), numbers["a"]) and torch.equal(found["half"].read(), numbers["b"][100:])


def test_files_of_several_types_are_loaded_in_float32(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2).half(), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert stored_dtype(find_weights(tmp_path)) == torch.float32


@pytest.fixture
def half_checkpoint(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint in float16, as published ones are."""
    for folder in set(FOLDERS.values()):
        (file,) = (sd1_checkpoint / folder).glob("*.safetensors")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((sd1_checkpoint / folder / "config.json").read_bytes())
        save_file(
            {name: t.half() for name, t in load_file(file).items()}, tmp_path / folder / file.name, {"format": "pt"}
        )
    return tmp_path


@pytest.mark.parametrize("component", FOLDERS)
@pytest.mark.parametrize("half", [False, True])
def test_a_network_computes_the_same_with_its_weights_in_their_files(
    component: str, half: bool, sd1_checkpoint: Path, half_checkpoint: Path, sd1_bundle: Path
) -> None:
    folder = (half_checkpoint if half else sd1_checkpoint) / FOLDERS[component]
    spec = Bundle.open(sd1_bundle).manifest.components[component]
    recorded, _ = golden.load_golden(sd1_bundle / spec.golden)
    inputs = {each.name: recorded[each.name] for each in spec.inputs}
    names = [output.name for output in spec.outputs]
    expected = modules.run(loading.load(component, folder), inputs, names)
    module = loading.load(component, folder, dtype=None)
    weights = StoredWeights(module)
    assert all(weight.is_meta for weight in module.parameters())
    for _ in range(2):
        with weights.lent():
            found = modules.run(module, inputs, names)
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in expected.items()
        }
    assert all(weight.is_meta for weight in module.parameters())
    with pytest.raises((RuntimeError, TypeError), match="meta"):
        modules.run(module, inputs, names)


class Layers(nn.Module):
    """Linear layers on two and three axes and a convolution; `same` and `first` are one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.small = nn.Linear(width, width), nn.Linear(width, 4)
        self.apart = nn.Linear(width, width)
        self.folded, self.same = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, width, bias=False)
        self.same.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.small(self.first(x[0])) + self.small(self.apart(self.same(self.first(x)))).mean()
        result: torch.Tensor = rows.sum() * self.folded(x[:, None])
        return result


def traced(module: nn.Module, x: torch.Tensor) -> ir.Model:
    takes = [TensorSpec(name="x", dtype="float32", shape=tuple(x.shape))]
    return graphs.trace_graph(module, {"x": x}, takes, [TensorSpec(name="y", dtype="float32", shape=())], axes={})


def test_a_graph_is_filled_with_the_weights_that_the_tracer_never_saw(tmp_path: Path) -> None:
    width = int(LARGE**0.5) + 3
    torch.manual_seed(0)
    whole = Layers(width).eval().requires_grad_(False)
    save_file(dict(whole.named_parameters()), tmp_path / "model.safetensors")
    stored = Layers(width).eval()
    stored.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False, assign=True)
    stored.same.weight = stored.first.weight
    x = torch.randn(2, 3, width)
    expected = traced(whole, x).graph.initializers
    weights = StoredWeights(stored.requires_grad_(False))
    with weights.withheld() as stand_ins:
        model = traced(stored, x)
        places = stand_ins.places(model)
    weights.fill(model, places)
    found = model.graph.initializers
    assert set(found) == set(expected)
    lazy = {name for name, value in found.items() if isinstance(value.const_value, ir.LazyTensor)}
    assert len(lazy) >= 2
    assert any(name.startswith("val_") for name in lazy)  # one that the tracer has transposed
    for name, value in found.items():
        reference = expected[name].const_value
        assert value.const_value is not None and reference is not None
        assert value.const_value.numpy().tobytes() == reference.numpy().tobytes(), name


@pytest.mark.parametrize("piece", [1, 20_000, 1 << 30])
def test_pieces_compute_what_the_whole_graph_computes(
    piece: int, sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    original = sessions._session
    monkeypatch.setattr(sessions, "PIECE_BYTES", piece)
    monkeypatch.setattr(sessions, "_session", lambda *args: opened.append(args) or original(*args))
    bundle = Bundle.open(sd1_bundle)
    for spec in bundle.manifest.components.values():
        inputs, _ = golden.load_golden(sd1_bundle / spec.golden)
        turned = {name: array[::-1].copy() for name, array in inputs.items()}
        whole = sessions.open_session(sd1_bundle / spec.graph)
        opened.clear()
        found = sessions.run_in_pieces(sd1_bundle / spec.graph, [inputs, turned])
        assert (len(opened) == 1) == (piece == 1 << 30)
        for case, outputs in zip((inputs, turned), found, strict=True):
            expected = sessions.run_session(whole, case)
            assert list(outputs) == list(expected)
            assert golden.compare("a piece", outputs, expected) < 1e-5
