"""Weights as they come: shards, variants, pickles that were allowed. What is loaded is what was saved, bit for bit."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.networks import loading
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources import hub
from latentrt.export.sources.parts import WeightSource
from latentrt.export.sources.weight_files import find_weights
from tests.single_files import checkpoint_tensors

NETWORKS = ["text_encoder", "unet", "vae_decoder"]
FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}


@pytest.fixture
def copy(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))


def kind(component: str) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    return {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae_decoder": AutoencoderKL}[component]


def save_again(root: Path, component: str, **options: Any) -> Path:
    """Have the library that owns a network save it in another way."""
    folder = root / FOLDERS[component]
    model = kind(component).from_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize(
    ("component", "variant"),
    [
        *((component, variant) for component in NETWORKS for variant in (None, "fp16")),
        ("unet", "bf16"),
        ("unet", "a-b"),
    ],
)
def test_shards_and_variants_load_as_one_file_does(
    sd1_checkpoint: Path, copy: Path, component: str, variant: str | None
) -> None:
    expected = loading.load(component, sd1_checkpoint / FOLDERS[component]).state_dict()
    folder = save_again(copy, component, variant=variant, max_shard_size="40KB")
    found = find_weights(folder)
    assert found.variant == variant
    assert len(found.shards) > 1
    assert sorted(path.name for path in found.paths) == sorted(p.name for p in folder.iterdir() if p.stem != "config")
    checkpoint = open_checkpoint(str(copy))
    assert {f"{folder.name}/{path.name}" for path in found.paths} <= set(checkpoint.files)
    loaded = loading.load(component, folder).state_dict()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(loaded[key].numpy(), tensor.numpy())
    hosted = {f"{folder.name}/{path.name}" for path in found.paths}
    assert set(hub.choose_files(hosted)) == hosted


@pytest.mark.parametrize("change", ["missing", "elsewhere", "outside", "no map"])
def test_shards_that_do_not_fit_their_index_are_refused(copy: Path, change: str) -> None:
    folder = save_again(copy, "unet", max_shard_size="40KB")
    (index,) = folder.glob("*.index.json")
    document = json.loads(index.read_text())
    first, last = sorted(set(document["weight_map"].values()))[:: len(set(document["weight_map"].values())) - 1]
    if change == "missing":
        (folder / first).unlink()
    elif change == "elsewhere":
        document["weight_map"] = {key: last if name == first else name for key, name in document["weight_map"].items()}
    elif change == "outside":
        document["weight_map"]["conv_in.weight"] = "../../other.safetensors"
    else:
        document = {"weight_map": ["a"]}
    index.write_text(json.dumps(document))
    told = {"missing": f"{folder / first} ", "elsewhere": f" {last},", "outside": f"{index} ", "no map": f"{index} "}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(copy))
    assert told[change] in str(caught.value)


def test_the_hub_serves_one_variant_with_all_its_shards() -> None:
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = [*shards, "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/config.json"]
    assert set(hub.choose_files([*files, "unet/diffusion_pytorch_model.non_ema.safetensors"])) == set(files)


PLAIN = "diffusion_pytorch_model"
CHOICES = [  # the variants that lie in a folder, the best first
    ("", "fp16", "bf16"),
    ("fp32", "fp16", "non_ema"),
    ("fp16", "bf16", "fp16-full"),
    ("bf16", "non_ema", "other"),
    ("non_ema", "other", "another"),
    ("fp16-full",),
]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("variants", CHOICES, ids="-".join)
def test_the_best_variant_is_read_fetched_and_opened(copy: Path, variants: tuple[str, ...], ending: str) -> None:
    weights = copy / "unet" / f"{PLAIN}.safetensors"
    names = [f"{PLAIN}.{variant}.{ending}" if variant else f"{PLAIN}.{ending}" for variant in variants]
    held = weights.read_bytes()
    weights.unlink()
    for name in names:
        (copy / "unet" / name).write_bytes(held)
    opened = open_checkpoint(str(copy), options=CheckpointOptions(allow_pickle=True))
    assert [name for name in opened.files if name.startswith(f"unet/{PLAIN}")] == [f"unet/{names[0]}"]
    if ending == "safetensors":
        assert hub.choose_files([f"unet/{name}" for name in names]) == [f"unet/{names[0]}"]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_of_two_unknown_variants_none_is_taken(copy: Path, ending: str) -> None:
    weights = copy / "unet" / f"{PLAIN}.safetensors"
    shutil.copy(weights, weights.with_name(f"{PLAIN}.mine.{ending}"))
    weights.rename(weights.with_name(f"{PLAIN}.yours.{ending}"))
    with pytest.raises(CheckpointError, match=r"\(mine, yours\)"):
        open_checkpoint(str(copy), options=CheckpointOptions(allow_pickle=True))
    with pytest.raises(CheckpointError, match=r"\(mine, yours\)"):
        hub.choose_files([f"unet/{PLAIN}.{name}.safetensors" for name in ("mine", "yours")])


def test_the_weights_of_a_network_are_fetched_beside_a_lora_in_its_folder() -> None:
    files = ["unet/pytorch_lora_weights.safetensors", f"unet/{PLAIN}.bf16.safetensors"]
    assert hub.choose_files(files) == [f"unet/{PLAIN}.bf16.safetensors"]


def loaded(root: Path, component: str, folder: Path) -> dict[str, Any]:
    weight_source = open_checkpoint(str(root), options=CheckpointOptions(allow_pickle=True)).networks[component]
    assert isinstance(weight_source, WeightSource)
    with written(weight_source, folder):
        return loading.load(component, folder).state_dict()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_directory_of_pickles_is_opened_where_that_is_allowed(
    sd1_checkpoint: Path, copy: Path, component: str, shards: bool, tmp_path: Path
) -> None:
    import torch

    expected = loading.load(component, sd1_checkpoint / FOLDERS[component]).state_dict()
    folder = copy / FOLDERS[component]
    model = kind(component).from_pretrained(folder)
    next(folder.glob("*.safetensors")).unlink()
    stem = "pytorch_model" if component == "text_encoder" else "diffusion_pytorch_model"
    state = model.state_dict()
    halves = [list(state)[0::2], list(state)[1::2]] if shards else [list(state)]
    for number, keys in enumerate(halves):
        name = f"{stem}-0000{number + 1}-of-00002.bin" if shards else f"{stem}.bin"
        torch.save({key: state[key] for key in keys}, folder / name)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(str(copy))
    for key, tensor in loaded(copy, component, tmp_path / "weights").items():
        np.testing.assert_array_equal(tensor.numpy(), expected[key].numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_single_pickle_is_opened_where_that_is_allowed(sd1_checkpoint: Path, tmp_path: Path, zipped: bool) -> None:
    import torch

    document = {"state_dict": {**checkpoint_tensors(sd1_checkpoint), "callbacks": {"best": 1}}, "global_step": 7}
    file = tmp_path / "model.ckpt"
    torch.save(document, file, _use_new_zipfile_serialization=zipped)
    options = CheckpointOptions(config=str(sd1_checkpoint))
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(str(file), options=options)
    checkpoint = open_checkpoint(str(file), options=CheckpointOptions(config=str(sd1_checkpoint), allow_pickle=True))
    weight_source = checkpoint.networks["unet"]
    assert isinstance(weight_source, WeightSource)
    expected = loading.load("unet", sd1_checkpoint / "unet").state_dict()
    with written(weight_source, tmp_path / "weights") as folder:
        found = loading.load("unet", folder).state_dict()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[key].numpy())


class Harm:
    """What a hostile pickle does when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.ckpt", "unet"])
def test_a_pickle_that_holds_more_than_weights_is_refused_and_not_run(copy: Path, name: str, tmp_path: Path) -> None:
    import torch

    document = {"state_dict": {"a": torch.zeros(2)}, "harm": Harm(tmp_path / "harmed")}
    if name == "unet":
        next((copy / "unet").glob("*.safetensors")).unlink()
        file = copy / "unet" / "diffusion_pytorch_model.bin"
    else:
        file = tmp_path / name
    torch.save(document, file)
    with pytest.raises(CheckpointError) as caught:
        if name == "unet":
            loaded(copy, "unet", tmp_path / "weights")
        else:
            open_checkpoint(str(file), options=CheckpointOptions(allow_pickle=True))
    assert f"{file} " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(document["harm"]))
    assert (tmp_path / "harmed").exists()  # so it would have been


def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"no pickle at all")
    with pytest.raises(CheckpointError, match=r"/model\.pt "):
        open_checkpoint(str(tmp_path / "model.pt"), options=CheckpointOptions(allow_pickle=True))
