"""Values beyond float16 that are held at a fraction: the float32 graph is the same, and the float16 one is whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from latentrt.engines.bundle.files import Bundle
from latentrt.export.graphs import golden
from latentrt.export.graphs.external_data import save_graph
from latentrt.export.graphs.ranges import LARGEST, LIMIT, Ranges, record_ranges
from latentrt.export.graphs.rescale import Rescaled, rescale
from latentrt.export.graphs.run import run_in_pieces
from latentrt.export.graphs.types import FLOAT, HALF, load_typed
from latentrt.export.networks.modules import Decoder, Encoder
from tests.test_precision import CLOSE, Model, tokens

SAME = 1e-6  # of the output's range: powers of two round nothing, and the order of sums is the same
# From the vae/config.json of stabilityai/stable-diffusion-xl-base-1.0, and the same at a sixteenth of its width.
FULL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
TINY = {**FULL, "block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4}
WIDTHS = [
    pytest.param(TINY, id="tiny"),
    pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]
# What writes to the residual stream, the stream's own convolutions excepted, which have it as their input.
WRITERS = ("conv_in", "conv2", "to_out.0")


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def loud_vae(config: dict[str, Any], loudness: float = 3e5) -> Any:
    """Return a VAE whose residual streams are so loud, as SDXL's is, and whose pictures and latents are not."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**config)
    with torch.no_grad():
        for name, layer in vae.named_modules():
            if name.endswith(WRITERS):
                layer.weight *= loudness
                layer.bias *= loudness
    return vae


def vae_model(part: str, config: dict[str, Any], folder: Path) -> Model:
    if part == "decoder":
        latents = (tokens(1, 4, 6, 10) / config["scaling_factor"]).half().float()
        return Model(folder, Decoder(loud_vae(config)), x=latents)
    return Model(folder, Encoder(loud_vae(config)), x=tokens(1, 3, 48, 80).clamp(-1, 1))


def measured(model: Model) -> Ranges:
    return record_ranges(model.path, model.pairs, component="toy")[0]


def rescaled(path: Path, ranges: Ranges, target: Path) -> Rescaled:
    """Write the float32 graph that is held at what the ranges ask for."""
    model = load_typed(path)
    found = rescale(model, ranges)
    save_graph(model, target)
    return found


def difference(a: Path, b: Path, inputs: dict[str, Any]) -> float:
    """Return the largest difference of two graphs' outputs over the outputs' range."""
    (one,), (other,) = (list(run_in_pieces(path, [golden.widen(inputs)])) for path in (a, b))
    return max(float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in one)


@pytest.mark.parametrize("config", WIDTHS)
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_vae_that_overflows_is_float16_as_a_whole(part: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = vae_model(part, config, tmp_path)
    assert model.narrow_all() == float("inf")  # as `vae.half()` would be: not finite
    narrowed = model.narrow()
    assert narrowed.largest > 2 * LARGEST
    assert narrowed.float32_layers == ()
    assert narrowed.error < CLOSE
    graph = model.graph().graph
    assert "Cast" not in {node.op_type for node in graph}
    used = {value.dtype for node in graph if node.op_type != "Resize" for value in node.inputs if value is not None}
    assert FLOAT not in used and HALF in used


@pytest.mark.parametrize("config", WIDTHS)
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_its_float32_graph_is_the_same_at_any_exponents(part: str, config: dict[str, Any], tmp_path: Path) -> None:
    model, target = vae_model(part, config, tmp_path), tmp_path / "held" / "model.onnx"
    ranges = measured(model)
    found = rescaled(model.path, ranges, target)
    assert max(found.weights.values()) > 4
    assert found.ranges.largest <= LIMIT < ranges.largest
    assert difference(model.path, target, dict(model.pairs[0][0])) <= SAME
    held, _ = record_ranges(target, model.pairs, component="toy")
    assert held.values == pytest.approx(found.ranges.values, rel=1e-3)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("seed", range(3))
def test_any_ranges_leave_a_float32_graph_what_it_was(
    component: str, seed: int, sd1_bundle: Path, tmp_path: Path
) -> None:
    spec = Bundle.open(sd1_bundle).manifest.components[component]
    path, target = sd1_bundle / spec.graph, tmp_path / "model.onnx"
    drawn = random.Random(seed)
    values = {str(value.name): 10 ** drawn.uniform(3, 8) for node in load_typed(path).graph for value in node.outputs}
    found = rescaled(path, Ranges(values=values, logits={}), target)
    assert len(found.weights) > 20
    inputs, _ = golden.load_golden(sd1_bundle / spec.golden)
    assert difference(path, target, dict(inputs)) <= SAME


def test_a_graph_in_range_is_not_touched(sd1_bundle: Path) -> None:
    spec = Bundle.open(sd1_bundle).manifest.components["vae_decoder"]
    model = load_typed(sd1_bundle / spec.graph)
    before = dict(model.graph.initializers)
    names = [str(value.name) for node in model.graph for value in node.outputs]
    ranges = Ranges(values=dict.fromkeys(names, LIMIT), logits={})
    assert rescale(model, ranges) == Rescaled(ranges=ranges, weights={})
    assert dict(model.graph.initializers) == before


class Faint(nn.Module):
    """A norm of values that are smaller than the root of its epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.LayerNorm(16, eps=1e-3)
        with torch.no_grad():
            self.first.weight *= 1e-2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.first(x))
        return result


def test_epsilon_is_divided_by_the_square(tmp_path: Path) -> None:
    model, target = Model(tmp_path, Faint(), x=tokens(4, 16)), tmp_path / "held" / "model.onnx"
    names = measured(model).values
    found = rescaled(model.path, Ranges(values=dict.fromkeys(names, 1e6), logits={}), target)
    (exponent,) = set(found.weights.values())
    (norm,) = (node for node in ir.load(target).graph if node.op_type == "LayerNormalization")
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-3 / 4**exponent)
    assert difference(model.path, target, dict(model.pairs[0][0])) <= SAME


class Gated(nn.Module):
    """A feed-forward whose gate needs its numbers, and whose other factor and product are loud, as T5's are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.loud, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            self.loud.weight *= 1e5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.gelu(self.gate(x)) * self.loud(x)
        result: torch.Tensor = self.norm(self.first(x) + self.out(product))
        return result


def test_a_loud_factor_makes_a_loud_product(tmp_path: Path) -> None:
    model = Model(tmp_path, Gated(), x=tokens(4, 16))
    assert model.narrow_all() == float("inf")
    narrowed = model.narrow()
    assert narrowed.float32_layers == ()
    assert narrowed.error < CLOSE


def test_a_weight_that_two_layers_share_is_held_twice(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(16, 16, bias=False), nn.LayerNorm(16)
            with torch.no_grad():
                self.layer.weight *= 3e5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.layer(x)) + self.norm(self.layer(1e-3 * torch.sin(x)))
            return result

    model, target = Model(tmp_path, Shared(), x=tokens(4, 16)), tmp_path / "held" / "model.onnx"
    found = rescaled(model.path, measured(model), target)
    held = [str(node.inputs[1].name) for node in ir.load(target).graph if node.op_type == "Gemm" and node.inputs[1]]
    assert len(held) == 2 and set(held) - set(found.weights) == {"layer.weight"}
    assert difference(model.path, target, dict(model.pairs[0][0])) <= SAME
