"""SD 3 as it is stored: in bfloat16, as fp16 variants, in shards. The same numbers become the same bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.files import Bundle
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.networks import loading
from latentrt.export.networks.components import COMPONENTS
from latentrt.export.sources.weight_files import find_weights
from tests.conftest import Make

Tensors = Mapping[str, torch.Tensor]
SHARDS = 3


class Form(NamedTuple):
    """How the weights of every network are stored."""

    dtype: torch.dtype
    variant: str = ""
    sharded: bool = False


FORMS = {
    "bf16": Form(torch.bfloat16),
    "sharded": Form(torch.float32, sharded=True),
    "bf16 in shards": Form(torch.bfloat16, sharded=True),
    "fp16 variant": Form(torch.float16, variant="fp16"),
    "fp16 variant in shards": Form(torch.float16, variant="fp16", sharded=True),
}


@pytest.fixture(scope="module")
def exact(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3.5 medium's kind with T5, whose numbers bfloat16 and float16 hold as they are."""
    target = tmp_path_factory.mktemp("stored") / "exact"
    shutil.copytree(made("sd3", "dual t5")[0], target)
    for file in target.glob("*/*.safetensors"):
        tensors = {key: tensor.bfloat16().float() for key, tensor in load_file(file).items()}
        held = {key: torch.where(tensor.abs() < 2.0**-14, 0.0, tensor) for key, tensor in tensors.items()}
        save_file(held, file, metadata={"format": "pt"})
    return target


def store(source: Path, target: Path, form: Form) -> Path:
    """Store a checkpoint in another form. Returns its directory."""
    shutil.copytree(source, target)
    for file in target.glob("*/*.safetensors"):
        tensors = {key: tensor.to(form.dtype) for key, tensor in load_file(file).items()}
        file.unlink()
        write(tensors, file.parent, file.stem, form)
    return target


def write(tensors: Tensors, folder: Path, stem: str, form: Form) -> None:
    """Write a network's weights under the names that diffusers and transformers give them."""
    variant = f".{form.variant}" if form.variant else ""
    if not form.sharded:
        save_file(dict(tensors), folder / f"{stem}{variant}.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for number in range(SHARDS):
        name = f"{stem}{variant}-{number + 1:05}-of-{SHARDS:05}.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::SHARDS]}
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("name", FORMS)
def test_every_network_is_loaded_with_the_same_numbers(exact: Path, tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    one, other = open_checkpoint(str(exact)), open_checkpoint(str(store(exact, tmp_path / "stored", form)))
    assert one.networks.keys() == other.networks.keys()
    assert (one.dimensions, one.latents, one.schedule) == (other.dimensions, other.latents, other.schedule)
    for component, folder in one.networks.items():
        stored = other.networks[component]
        assert isinstance(folder, Path) and isinstance(stored, Path)
        found = find_weights(stored)
        assert (found.variant or "") == form.variant and len(found.shards) == (SHARDS if form.sharded else 1)
        row = one.rows.get(component, component)
        takes = tuple(tensor.name for tensor in COMPONENTS[row].takes(one.dimensions))
        expected, mine = (loading.load(row, place, takes=takes).state_dict() for place in (folder, stored))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], tensor) for key, tensor in expected.items()), component


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp16 variant in shards"])
def test_the_bundle_is_the_same_to_the_byte(exact: Path, tmp_path: Path, name: str) -> None:
    files = []
    for checkpoint in (exact, store(exact, tmp_path / "stored", FORMS[name])):
        target = tmp_path / f"bundle-of-{checkpoint.name}"
        export_checkpoint(str(checkpoint), target, precision="fp16", backends=())
        manifest = Bundle.open(target).manifest
        assert not [part for part, component in manifest.components.items() if component.float32_layers]
        files.append({name: record for name, record in manifest.files.items() if name.startswith(("onnx", "golden"))})
    assert files[0] == files[1] and len(files[0]) > 10
