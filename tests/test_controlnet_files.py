"""ControlNets in one file: what their keys tell, differences to the checkpoint's UNet, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.safetensors_header import read_header
from latentrt.engines.errors import CheckpointError
from latentrt.export.additions.controlnet_files import read_controlnet
from latentrt.export.checkpoint import DEMO, open_checkpoint
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions, ControlNetOption, LoraOption
from latentrt.export.sources.diffusers_folder import open_folder
from latentrt.export.sources.parts import WeightSource
from tests.lora_files import every_layer, kohya, save
from tests.single_files import save_header
from tests.test_controlnet_export import original_key
from tests.test_inspection import TWO, XL, published
from tests.tiny import save_controlnet, save_tiny

FULL = {key: value for key, value in XL.items() if key != "up_block_types"} | {"attention_head_dim": [5, 10, 20]}
# As in diffusers/controlnet-canny-sdxl-1.0, -mid and -small: diffusers tells them by the same keys.
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "mid": {"transformer_layers_per_block": [0, 0, 1]},
    "small": {
        "transformer_layers_per_block": [0, 0, 0],
        "down_block_types": ("DownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
    },
}


def network(config: Mapping[str, Any]) -> Any:
    from diffusers import ControlNetModel

    with torch.device("meta"):
        return ControlNetModel.from_config(dict(config))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL at full size, without data."""
    return save_header(tmp_path_factory.mktemp("xl") / "xl.safetensors", published(XL, TWO))


def opened(checkpoint: Path, network: Path, **options: Any) -> WeightSource:
    given = CheckpointOptions(controlnets=(ControlNetOption(name="edges", path=str(network)),), **options)
    weight_source = open_checkpoint(str(checkpoint), options=given).networks["controlnet_edges"]
    assert isinstance(weight_source, WeightSource)
    return weight_source


def refusal(checkpoint: Path, network: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(checkpoint, network, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", SIZES)
def test_small_ones_for_sdxl_need_no_config(xl: Path, tmp_path: Path, size: str) -> None:
    tensors = network({**FULL, **SIZES[size]}).state_dict()
    weight_source = opened(xl, save_header(tmp_path / "edges.safetensors", tensors), tokenizer=str(DEMO))
    config = json.loads(weight_source.config)
    found = network(config).state_dict()
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in tensors.items()}
    assert config["attention_head_dim"] == [5, 10, 20]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint and a ControlNet for it, which reads pictures as the published ones do."""
    root = tmp_path_factory.mktemp("made")
    return save_tiny(root / "checkpoint", family="sd1"), save_controlnet(root / "edges", family="sd1")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def differences(checkpoint: Path, network: Path) -> dict[str, torch.Tensor]:
    """A ControlNet as the difference to a checkpoint's UNet: where that has a weight of the same name."""
    unet, whole = tensors_of(checkpoint / "unet"), tensors_of(network)
    assert len(whole.keys() & unet.keys()) > 20 and whole.keys() - unet.keys()
    return {key: tensor - unet[key] if key in unet else tensor for key, tensor in whole.items()}


@pytest.mark.parametrize("original", [False, True])
def test_differences_are_added_to_the_checkpoints_unet(made: tuple[Path, Path], tmp_path: Path, original: bool) -> None:
    checkpoint, edges = made
    name = original_key if original else str
    tensors = {name(key): tensor for key, tensor in differences(checkpoint, edges).items()}
    save_file({**tensors, "difference": torch.ones(1)}, tmp_path / "a.safetensors")
    if original:  # its layout reads pictures at eight pixels a latent only; what the weights become is the same
        weight_source = read_controlnet("a", read_header(tmp_path / "a.safetensors"), open_folder(checkpoint))[1]
        assert weight_source.layout == "original"
    else:
        weight_source = opened(checkpoint, tmp_path / "a.safetensors")
    with written(weight_source, tmp_path / "written") as folder:
        found = tensors_of(folder)
    expected = tensors_of(edges)
    kept = {key for key in expected if not original or not key.startswith("controlnet_cond_embedding.")}
    assert kept <= found.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in kept) < 1e-6


def test_differences_follow_the_loras_of_the_unet(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, edges = made
    lora = save(tmp_path / "lora.safetensors", kohya(every_layer(checkpoint, seed=3, part="unet")))
    tensors = differences(checkpoint, edges)
    save_file({**tensors, "difference": torch.ones(1)}, tmp_path / "a.safetensors")
    loras = (LoraOption(path=str(lora)),)
    options = CheckpointOptions(
        loras=loras, controlnets=(ControlNetOption(name="edges", path=str(tmp_path / "a.safetensors")),)
    )
    networks = open_checkpoint(str(checkpoint), options=options).networks
    unet, network = networks["unet"], networks["controlnet_edges"]
    assert isinstance(unet, WeightSource) and isinstance(network, WeightSource)
    with written(unet, tmp_path / "unet") as one, written(network, tmp_path / "network") as two:
        changed, found = tensors_of(one), tensors_of(two)
    plain = tensors_of(checkpoint / "unet")
    key = next(key for key in sorted(changed.keys() & tensors.keys()) if not torch.equal(changed[key], plain[key]))
    torch.testing.assert_close(found[key], tensors[key] + changed[key], rtol=0, atol=1e-6)


def test_differences_to_another_unet_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, edges = made
    inpainting = save_tiny(tmp_path / "inpainting", family="sd1", variant="inpainting")
    save_file({**differences(checkpoint, edges), "difference": torch.ones(1)}, tmp_path / "a.safetensors")
    assert re.search(r" 4 .* 9;", refusal(inpainting, tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("task_embedding", "ControlNet Union"),
        ("lora_controlnet", "Control-LoRA"),
        ("encoder_hid_proj.weight", "Kolors"),
        ("time_gate.weight", "(time_gate.weight)"),
    ],
)
def test_what_is_no_plain_controlnet_is_named(made: tuple[Path, Path], tmp_path: Path, extra: str, named: str) -> None:
    save_file({**tensors_of(made[1]), extra: torch.ones(1)}, tmp_path / "a.safetensors")
    assert named in refusal(made[0], tmp_path / "a.safetensors")


def test_a_file_for_another_checkpoint_is_refused_by_its_shapes(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_controlnet(tmp_path / "other", family="sdxl")
    (weights,) = other.glob("*.safetensors")
    assert re.search(r"\bcross_attention_dim .* 80 .* 32\b", refusal(made[0], weights))
    (weights,) = made[1].glob("*.safetensors")
    wide = {**load_file(weights), "controlnet_cond_embedding.conv_in.weight": torch.zeros(8, 6, 3, 3)}
    save_file(wide, tmp_path / "wide.safetensors")
    assert "conditioning_channels: 6" in refusal(made[0], tmp_path / "wide.safetensors")


def test_blocks_that_keys_do_not_tell_need_a_directory(made: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = {key: t for key, t in tensors_of(made[1]).items() if not key.startswith("mid_block.resnets.1.")}
    save_file(tensors, tmp_path / "a.safetensors")
    assert "config.json" in refusal(made[0], tmp_path / "a.safetensors")


def test_inspect_says_that_weights_are_differences(made: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({**differences(*made), "difference": torch.ones(1)}, tmp_path / "a.safetensors")
    inspection = inspect_checkpoint(str(tmp_path / "a.safetensors"))
    assert inspection.model == "ControlNet"
    assert any("UNet" in note for note in inspection.notes)
