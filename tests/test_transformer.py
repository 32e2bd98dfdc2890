"""The MMDiT of SD 3 and 3.5 as a graph: at other sizes than the traced ones it computes what diffusers does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import nn

from latentrt.engines.compare import relative_error
from latentrt.engines.spec import Array, TensorSpec
from latentrt.engines.tensor_names import BLOCK, COND, NEXT, SCALE, SKIP_LAYERS, level_axes
from latentrt.export.graphs.trace import trace_graph
from latentrt.export.networks.streamed_weights import StoredWeights
from latentrt.export.networks.transformer import wrap_transformer, wrap_transformer_controlnet
from tests.studio import session_of

CONFIG: Mapping[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 48,
    "pos_embed_max_size": 24,
}
MEDIUM = {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}


class Kind(NamedTuple):
    """A tiny transformer: its config beside CONFIG, its blocks that may be skipped, and how many residuals it takes."""

    config: Mapping[str, Any]
    skip_layers: tuple[int, ...] = ()
    residuals: int = 0
    separable: bool = True


KINDS = {
    "sd 3": Kind({"num_layers": 2}),
    "3.5 medium": Kind(MEDIUM),
    "3.5 large": Kind({"num_layers": 2, "qk_norm": "rms_norm"}),
    "a table that is not separable": Kind({"num_layers": 2, "qk_norm": "rms_norm"}, separable=False),
    "skip layers": Kind(MEDIUM, skip_layers=(1, 2)),
    "followed": Kind({"num_layers": 4}, residuals=2),
    "followed and skipped": Kind({**MEDIUM, "num_layers": 5}, skip_layers=(1, 3), residuals=3),
}
TRACED = {"batch": 2, "steps": 1, "latent_height": 8, "latent_width": 12, "tokens": 93}
CHECKED: Sequence[Mapping[str, int]] = (
    TRACED,
    {"batch": 3, "steps": 3, "latent_height": 4, "latent_width": 2, "tokens": 20},
    {"batch": 1, "steps": 1, "latent_height": 48, "latent_width": 46, "tokens": 333},  # as far as the table goes
    {"batch": 1, "steps": 1, "latent_height": 2, "latent_width": 2, "tokens": 1},
)


def made(kind: Kind) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{**CONFIG, **kind.config})
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    if not kind.separable:
        nn.init.normal_(model.pos_embed.pos_embed)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def inputs_of(kind: Kind) -> list[TensorSpec]:
    rows: list[tuple[str, tuple[int | str, ...]]] = [
        ("sample", ("batch", 16, "latent_height", "latent_width")),
        ("timestep", ("steps",)),
        ("encoder_hidden_states", ("batch", "tokens", 64)),
        ("pooled_projections", ("batch", 48)),
        *([(SKIP_LAYERS, ("batch",))] if kind.skip_layers else []),
        *((f"{BLOCK}{number}", ("batch", "latent_height_2", "latent_width_2", 32)) for number in range(kind.residuals)),
    ]
    return [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in rows]


def drawn(takes: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Array]:
    random = np.random.default_rng(0)
    every = {**sizes, **level_axes(sizes["latent_height"], sizes["latent_width"])}
    shapes = {spec.name: [every[axis] if isinstance(axis, str) else axis for axis in spec.shape] for spec in takes}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["timestep"] = np.linspace(999, 1.5, sizes["steps"] + 2, dtype=np.float32)[1:-1]
    return arrays | ({SKIP_LAYERS: np.arange(sizes["batch"], dtype=np.float32) % 2} if SKIP_LAYERS in arrays else {})


def diffusers_own(model: Any, kind: Kind, arrays: Mapping[str, Array]) -> Array:
    """Run diffusers' network: on each row alone, which skips its layers or does not."""
    rows = []
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for row in range(len(arrays["sample"])):
        one = {name: tensor[row : row + 1] if len(tensor) > 1 else tensor for name, tensor in given.items()}
        skips = SKIP_LAYERS in one and bool(one[SKIP_LAYERS] > 0)
        rows.append(
            model(
                hidden_states=one["sample"],
                timestep=one["timestep"],
                encoder_hidden_states=one["encoder_hidden_states"],
                pooled_projections=one["pooled_projections"],
                block_controlnet_hidden_states=[one[f"{BLOCK}{n}"].flatten(1, 2) for n in range(kind.residuals)]
                or None,
                skip_layers=list(kind.skip_layers) if skips else None,
                return_dict=False,
            )[0].numpy()
        )
    return np.concatenate(rows)


# Tracing is what takes the time, and these three have all of the others' parts.
QUICK = ("sd 3", "a table that is not separable", "followed and skipped")


def traced(module: nn.Module, takes: Sequence[TensorSpec], gives: Sequence[TensorSpec]) -> Any:
    """Return a session of a network's graph."""
    weights = StoredWeights(module)
    axes = {"latent_height": (4, 2), "latent_width": (4, 2), **dict.fromkeys(level_axes(1, 1))}
    with weights.withheld() as stand_ins:
        tensors = {name: torch.from_numpy(array) for name, array in drawn(takes, TRACED).items()}
        graph = trace_graph(module, tensors, takes, gives, axes=axes)
        places = stand_ins.places(graph)
    weights.fill(graph, places)
    return session_of(ir.to_proto(graph))


@pytest.mark.parametrize("name", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in KINDS])
def test_a_traced_transformer_computes_what_diffusers_does(name: str) -> None:
    """With weights that stand in for its own while it is traced, as an export traces it."""
    kind = KINDS[name]
    takes = inputs_of(kind)
    module = wrap_transformer(made(kind), [spec.name for spec in takes], skip_layers=kind.skip_layers)
    gives = [TensorSpec(name="out_sample", dtype="float32", shape=takes[0].shape)]
    session, theirs = traced(module, takes, gives), made(kind)
    for sizes in CHECKED:
        arrays = drawn(takes, sizes)
        (found,) = session.run(None, arrays)
        assert relative_error(found, diffusers_own(theirs, kind, arrays)) < 1e-5, sizes


def test_published_tables_of_positions_shrink_to_two_of_one_axis() -> None:
    whole, slim = (wrap_transformer(made(KINDS[name]), ()) for name in ("a table that is not separable", "sd 3"))
    numbers = [
        sum(buffer.numel() for name, buffer in module.named_buffers() if "pos_embed" in name)
        for module in (whole, slim)
    ]
    assert numbers == [24 * 24 * 32, 2 * 24 * 16]


def test_every_weight_keeps_its_name() -> None:
    """LoRAs find the layers by the names of the checkpoint."""
    model = made(KINDS["skip layers"])
    names = set(dict(model.named_parameters()))
    module = wrap_transformer(model, (), skip_layers=(1,))
    assert {name.removeprefix("model.") for name, _ in module.named_parameters()} == names


SHIFT = 0.25  # of latents, times their scale
LARGE = {"joint_attention_dim": None, "pos_embed_type": None}
CONTROLNETS: Mapping[str, tuple[dict[str, Any], str | None]] = {  # a config, and the input that its graph is without
    "pooled as zeros": ({}, "pooled_projections"),
    "without text, and without positions": (LARGE, "encoder_hidden_states"),
    "everything": ({}, None),
}


@pytest.mark.parametrize("name", [pytest.param("everything", marks=pytest.mark.slow), *list(CONTROLNETS)[:2]])
def test_a_traced_controlnet_computes_what_diffusers_does(name: str) -> None:
    """Its residuals, of which each block gives two, times the scale of each row, are added to those before it."""
    torch.manual_seed(0)
    config, absent = CONTROLNETS[name]
    model = SD3ControlNetModel(**CONFIG | config, num_layers=2)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    theirs = copy.deepcopy(model).eval()
    before = [
        TensorSpec(name=f"{BLOCK}{n}", dtype="float32", shape=("batch", "latent_height_2", "latent_width_2", 32))
        for n in range(4)
    ]
    follows = TensorSpec(name=COND, dtype="float32", shape=("batch", 16, "latent_height", "latent_width"))
    scales = TensorSpec(name=SCALE, dtype="float32", shape=("batch",))
    takes = [*(spec for spec in inputs_of(Kind({})) if spec.name != absent), follows, scales, *before]
    gives = [TensorSpec(name=NEXT + spec.name, dtype="float32", shape=spec.shape) for spec in before]
    module = wrap_transformer_controlnet(model, [spec.name for spec in takes], shift=SHIFT).eval()
    session = traced(module.requires_grad_(False), takes, gives)
    for sizes in CHECKED:
        arrays = drawn(takes, sizes)
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        rows = len(given["sample"])
        with torch.no_grad():
            own = theirs(
                hidden_states=given["sample"],
                controlnet_cond=given[COND] + (SHIFT if absent == "pooled_projections" else 0),
                encoder_hidden_states=given.get("encoder_hidden_states"),
                pooled_projections=given.get("pooled_projections", torch.zeros(rows, 48)),
                timestep=given["timestep"].expand(rows),
                return_dict=False,
            )[0]
        for place, (spec, found) in enumerate(zip(before, session.run(None, arrays), strict=True)):
            added = own[place // 2].numpy().reshape(found.shape) * arrays[SCALE][:, None, None, None]
            assert relative_error(found, arrays[spec.name] + added) < 1e-5, sizes
