"""ControlNets on their way into a bundle: what is read, what is refused, and what `inspect` and the options say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError
from latentrt.engines.verify.verify import verify
from latentrt.export.additions.controlnets import add_controlnets
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.residuals import residual_dimensions
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.networks import conversion
from latentrt.export.networks.components import COMPONENTS, input_specs
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.export.sources.diffusers_folder import open_folder
from latentrt.export.sources.parts import WeightSource
from latentrt.runtime.cli_options import Followed
from latentrt.runtime.request import Control
from tests.conftest import Make, MakeControlled
from tests.single_files import unet_key
from tests.tiny import save_controlnet


def options(*texts: str) -> CheckpointOptions:
    return CheckpointOptions(controlnets=tuple(map(ControlNetOption.parse, texts)))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_controlnet_is_a_component_that_verify_checks(controlled: MakeControlled, family: str) -> None:
    bundle = Bundle.open(controlled(family, "").bundle)
    assert {"controlnet_edges", "controlnet_depth"} <= set(bundle.manifest.components)
    rows = {row.what: row for row in verify(bundle, backend="cpu")}
    assert rows["controlnet_edges"].ok and rows["controlnet_depth"].ok and rows["unet"].ok
    assert rows["controlnet_edges"].error is not None


def test_the_residuals_are_those_that_diffusers_gives(controlled: MakeControlled) -> None:
    """The table of shapes, against a run of diffusers' own ControlNet, at sides that are no power of two."""
    from diffusers import ControlNetModel

    for family, channels, text in (("sd1", 4, 32), ("sd2", 6, 48)):
        made = controlled(family, "")
        network = ControlNetModel.from_pretrained(made.networks["edges"])
        factor = Bundle.open(made.bundle).manifest.latents.factor
        cond = torch.zeros(1, 3, 7 * factor, 9 * factor)
        down, mid = network(torch.zeros(1, channels, 7, 9), 1, torch.zeros(1, 5, text), cond, return_dict=False)
        dimensions = open_checkpoint(
            str(made.checkpoint), options=options(f"edges={made.networks['edges']}")
        ).dimensions
        specs = {s.name: s for s in input_specs(COMPONENTS["controlnet"], dimensions, "fp32")}
        found = [specs[f"down_residual_{n}"].shape for n in range(len(down))] + [specs["mid_residual"].shape]
        for shape, tensor in zip(found, (*down, mid), strict=True):
            divisor = int(str(shape[2]).removeprefix("latent_height_"))
            assert tensor.shape == (1, shape[1], -(-7 // divisor), -(-9 // divisor))
        assert f"down_residual_{len(down)}" not in specs


def test_the_residuals_of_published_sizes() -> None:
    assert residual_dimensions((320, 640, 1280, 1280), (2, 2, 2, 2))["down_residuals"] == 12
    assert residual_dimensions((320, 640, 1280), (2, 2, 2))["down_residuals"] == 9


def test_a_single_file_in_the_original_layout(made: Make, tmp_path: Path) -> None:
    """The tensors come out as diffusers named them, and the config is the UNet's."""
    checkpoint, _ = made("sd1", "")
    folder = save_controlnet(tmp_path / "network", family="sd1", reads=(16, 32, 96, 256))
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({original_key(key): tensor for key, tensor in tensors.items()}, tmp_path / "edges.safetensors")
    parts = open_folder(checkpoint)
    levels = {**parts.configs["vae_decoder"], "block_out_channels": [8, 8, 8, 8]}  # eight pixels a latent
    parts = replace(parts, configs={**parts.configs, "vae_decoder": levels})
    option = ControlNetOption(name="edges", path=str(tmp_path / "edges.safetensors"))
    weight_source = add_controlnets(parts, [option], allow_pickle=False).networks["controlnet_edges"]
    assert isinstance(weight_source, WeightSource) and weight_source.layout == "original"
    found = conversion.read_tensors(weight_source)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    written, published = json.loads(weight_source.config), json.loads((folder / "config.json").read_text())
    assert {key: published[key] for key in written} == json.loads(weight_source.config)


def original_key(key: str) -> str:
    """Return the name that the first ControlNets gave a weight of diffusers'."""
    stem, _, rest = key.partition(".")
    if stem == "controlnet_down_blocks":
        number, kind = rest.split(".")
        return f"control_model.zero_convs.{number}.0.{kind}"
    if stem == "controlnet_mid_block":
        return f"control_model.middle_block_out.0.{rest}"
    if stem == "controlnet_cond_embedding":
        *place, kind = rest.split(".")
        number = {"conv_in": 0, "conv_out": 14}.get(place[0], 2 * (int(place[-1]) + 1) if len(place) > 1 else 0)
        return f"control_model.input_hint_block.{number}.{kind}"
    return f"control_model.{unet_key(key, layers=1, attended=[])}"


def test_a_single_file_with_the_names_of_diffusers(controlled: MakeControlled, tmp_path: Path) -> None:
    made = controlled("sd1", "")
    (weights,) = made.networks["edges"].glob("*.safetensors")
    checkpoint = open_checkpoint(str(made.checkpoint), options=options(f"edges={weights}"))
    weight_source = checkpoint.networks["controlnet_edges"]
    assert isinstance(weight_source, WeightSource) and weight_source.layout == "diffusers"
    assert json.loads(weight_source.config)["conditioning_embedding_out_channels"] == [8, 16, 16]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cross_attention_dim": 77}, r"\bcross_attention_dim .* 77 .* 32\b"),
        ({"block_out_channels": [16, 64]}, r"\bblock_out_channels .* \[16, 64\]"),
        ({"in_channels": 9}, r"\bin_channels .* 9 .* 4\b"),
        ({"conditioning_embedding_out_channels": [8, 16]}, r" 2 .* 4\b"),
        ({"global_pool_conditions": True}, "global_pool_conditions: True"),
        ({"conditioning_channels": 1}, "conditioning_channels: 1"),
        ({"_class_name": "ControlNetUnionModel"}, "ControlNetUnionModel"),
    ],
)  # fmt: skip
def test_another_checkpoints_controlnet_is_refused(
    controlled: MakeControlled, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    made = controlled("sd1", "")
    config = json.loads((made.networks["edges"] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (weights,) = made.networks["edges"].glob("*.safetensors")
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(str(made.checkpoint), options=options(f"edges={tmp_path}"))


def test_what_is_no_controlnet_is_refused(controlled: MakeControlled, tmp_path: Path) -> None:
    made = controlled("sd1", "")
    path, network = str(made.checkpoint), made.networks["edges"]
    with pytest.raises(CheckpointError, match="--controlnet edges='nowhere'"):
        open_checkpoint(path, options=options("edges=nowhere"))
    (other,) = (made.checkpoint / "vae").glob("*.safetensors")
    with pytest.raises(CheckpointError, match="--vae"):
        open_checkpoint(path, options=options(f"edges={other}"))
    with pytest.raises(CheckpointError, match=r"^--controlnet: .*'edges'"):
        open_checkpoint(path, options=options(f"edges={network}", f"edges={network}"))
    for text in ("edges", "edges=", "a/b=x", "=x"):
        with pytest.raises(CheckpointError, match=f"^--controlnet '{text}': "):
            ControlNetOption.parse(text)


def test_inspect_names_a_controlnet_and_says_what_to_do(controlled: MakeControlled) -> None:
    network = controlled("sd1", "").networks["edges"]
    inspection = inspect_checkpoint(str(network))
    assert inspection.model == "ControlNetModel" and inspection.networks[0].parameters
    assert f"--controlnet NAME={network}" in (inspection.problem or "")
    (weights,) = network.glob("*.safetensors")
    inspection = inspect_checkpoint(str(weights))
    assert inspection.model == "ControlNet"
    assert f"--controlnet NAME={weights}" in (inspection.problem or "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("edges=a.png", Control(name="edges", image="a.png")),
        ("edges=a.png:0.8", Control(name="edges", image="a.png", scale=0.8)),
        ("edges=./a b.png:-1:0.2:0.9", Control(name="edges", image="./a b.png", scale=-1.0, start=0.2, stop=0.9)),
    ],
)
def test_the_command_line_reads_a_control(text: str, expected: Control) -> None:
    assert Followed().convert(text, None, None) == expected


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a:b.png"
    path.touch()
    assert Followed().convert(f"edges={path}:2", None, None) == Control(name="edges", image=str(path), scale=2.0)


@pytest.mark.parametrize("text", ["edges", "=a.png", "edges=a.png:strong", "edges=a.png:1:0.2", "edges=a.png:1.2.3"])
def test_a_control_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"(edges=edges\.png:)?0\.8:0\.2:0\.9"):
        Followed().convert(text, None, None)
