"""Files of weights in other blocks than their base's: what is counted from the keys is what diffusers' configs say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from latentrt.export.checkpoint import DEMO, open_checkpoint
from latentrt.export.configs.published import CONFIGS
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.networks.conversion import read_tensors
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import WeightSource
from latentrt.export.sources.structure import read_structure
from tests.single_files import save_header, unet_tensors
from tests.test_inspection import ONE, REFINER, SD2, TWO, XL, published

PLAIN, THREE = {"mid_block_type": "UNetMidBlock2D"}, ("CrossAttnDownBlock2D",) * 3
# As their repositories' unet/config.json have them; ComfyUI's table of UNets has the same numbers.
DISTILLED: dict[str, dict[str, Any]] = {
    "SSD-1B": XL
    | PLAIN
    | {
        "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Segmind-Vega": XL | PLAIN | {"transformer_layers_per_block": [1, 1, 2]},
    "KOALA-700M": XL | PLAIN | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]},
    "KOALA-1B": XL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
    "BK-SDM-base": {"cross_attention_dim": 768, "layers_per_block": 1},
    "small-sd": {"cross_attention_dim": 768, "layers_per_block": 1, "mid_block_type": None},
    "tiny-sd": {
        "cross_attention_dim": 768,
        "layers_per_block": 1,
        "mid_block_type": None,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": THREE,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
}


def unet(config: Mapping[str, Any]) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["SSD-1B", "tiny-sd"])
def test_a_distilled_file_needs_no_config(tmp_path: Path, name: str) -> None:
    config = DISTILLED[name]
    file = save_header(tmp_path / "model.safetensors", published(config, _texts(config)))
    checkpoint = open_checkpoint(str(file), options=CheckpointOptions(tokenizer=str(DEMO)))
    weight_source = checkpoint.networks["unet"]
    assert isinstance(weight_source, WeightSource)
    ours, theirs = json.loads(weight_source.config), unet(config)
    assert shapes(unet(ours).state_dict()) == shapes(theirs.state_dict()) == shapes(read_tensors(weight_source))
    heads = ours["attention_head_dim"]  # which shapes do not tell
    assert heads == (8 if checkpoint.family == "sd1" else [width // 64 for width in ours["block_out_channels"]])
    label = inspect_checkpoint(str(file)).model
    assert label.endswith("in blocks of its own, as distilled ones have")


def _texts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return ONE if config["cross_attention_dim"] == 768 else TWO


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd1": (CONFIGS["sd1"], {"cross_attention_dim": 768}),
    "sd2": (CONFIGS["sd2"], SD2),
    "sdxl": (CONFIGS["sdxl"], XL),
    "sdxl_refiner": (CONFIGS["sdxl_refiner"], REFINER),
}


@pytest.mark.parametrize("family", BASES)
def test_the_published_ones_differ_in_nothing(family: str) -> None:
    configs, config = BASES[family]
    network = unet(config)
    tensors = unet_tensors(network.state_dict(), network.config)
    bare = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in tensors.items()}
    assert read_structure(shapes(network.state_dict()), "diffusers").changes(configs["unet"]) == {}
    assert read_structure(shapes(bare), "original").changes(configs["unet"]) == {}


@pytest.mark.parametrize("name", DISTILLED)
def test_both_layouts_tell_the_same(name: str) -> None:
    network = unet(DISTILLED[name])
    original = unet_tensors(network.state_dict(), network.config)
    bare = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in original.items()}
    theirs = read_structure(shapes(network.state_dict()), "diffusers")
    assert read_structure(shapes(bare), "original") == theirs
    base = CONFIGS["sdxl" if "addition_embed_type" in DISTILLED[name] else "sd1"]["unet"]
    assert shapes(unet({**base, **(theirs.changes(base) or {})}).state_dict()) == shapes(network.state_dict())


def test_blocks_that_no_config_can_say_are_none() -> None:
    tensors = shapes(unet({"cross_attention_dim": 768}).state_dict())
    less = {key: shape for key, shape in tensors.items() if not key.startswith("down_blocks.0.attentions.0.")}
    assert read_structure(less, "diffusers").changes(CONFIGS["sd1"]["unet"]) is None
    assert read_structure({}, "original").changes(CONFIGS["sd1"]["unet"]) is None


def test_a_file_in_blocks_that_no_config_can_say_asks_for_configs(tmp_path: Path) -> None:
    tensors = published({"cross_attention_dim": 768}, ONE)
    less = {key: tensor for key, tensor in tensors.items() if "input_blocks.1.1." not in key}
    problem = inspect_checkpoint(str(save_header(tmp_path / "a.safetensors", less))).problem
    assert "--config DIRECTORY" in str(problem)
