"""What lies in a cache of the Hugging Face hub is read as what it is: by its content and its given name.

The links of a snapshot lead to blobs whose names have no ending.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import CheckpointError
from latentrt.export.additions.refiner import add_refiner
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions, ControlNetOption, LoraOption
from latentrt.export.sources.parts import WeightSource
from latentrt.export.sources.places import find_place
from latentrt.runtime.text.textual_inversion import load_embedding
from tests.conftest import _tiny
from tests.hub_cache import in_hub_cache
from tests.lora_files import adapter_metadata, kohya, make_factors, peft, save
from tests.single_files import checkpoint_tensors, save_single_file
from tests.test_tiny_decoder import save_tiny_vae
from tests.test_weights import save_again
from tests.tiny import save_adapter, save_controlnet

Place = Callable[[Path], Path]
"""Where a file or a directory is given from: where it lies, or from a cache of the hub."""
Enter = Callable[[Path, Path, Place], Checkpoint]
"""(a directory to work in, the tiny checkpoint, place) -> what was opened"""


def opened(checkpoint: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(str(checkpoint), options=CheckpointOptions(**options))


def pickled(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / f"{stem}.bin")
    weights.unlink()
    return folder


def directory(work: Path, root: Path, place: Place) -> Checkpoint:
    return opened(place(root))


def shards(work: Path, root: Path, place: Place) -> Checkpoint:
    copy = Path(shutil.copytree(root, work / "checkpoint"))
    save_again(copy, "unet", max_shard_size="40KB")
    shutil.copyfile(root / "unet" / "config.json", copy / "unet" / "config.json")  # diffusers' names where it was read
    return opened(place(copy))


def directory_of_pickles(work: Path, root: Path, place: Place) -> Checkpoint:
    copy = Path(shutil.copytree(root, work / "checkpoint"))
    pickled(copy / "unet")
    pickled(copy / "text_encoder", "pytorch_model")
    return opened(place(copy), allow_pickle=True)


def single_file(work: Path, root: Path, place: Place) -> Checkpoint:
    file = save_single_file(root, work / "model.safetensors")
    return opened(place(file), config=str(place(root)), tokenizer=str(place(root)))


def single_pickle(work: Path, root: Path, place: Place) -> Checkpoint:
    torch.save({"state_dict": checkpoint_tensors(root)}, work / "model.ckpt")
    return opened(place(work / "model.ckpt"), config=str(root), allow_pickle=True)


def unet(work: Path, root: Path, place: Place) -> Checkpoint:
    return opened(root, unet=str(place(root / "unet" / "diffusion_pytorch_model.safetensors")))


def unet_pickle(work: Path, root: Path, place: Place) -> Checkpoint:
    torch.save(load_file(root / "unet" / "diffusion_pytorch_model.safetensors"), work / "unet.pt")
    return opened(root, unet=str(place(work / "unet.pt")), allow_pickle=True)


def unet_directory_of_pickles(work: Path, root: Path, place: Place) -> Checkpoint:
    copy = pickled(Path(shutil.copytree(root / "unet", work / "unet")))
    return opened(root, unet=str(place(copy)), allow_pickle=True)


def vae(work: Path, root: Path, place: Place) -> Checkpoint:
    return opened(root, vae=str(place(root / "vae" / "diffusion_pytorch_model.safetensors")))


def vae_directory(work: Path, root: Path, place: Place) -> Checkpoint:
    return opened(root, vae=str(place(root / "vae")))


def vae_pickle(work: Path, root: Path, place: Place) -> Checkpoint:
    torch.save(load_file(root / "vae" / "diffusion_pytorch_model.safetensors"), work / "vae.pt")
    return opened(root, vae=str(place(work / "vae.pt")), allow_pickle=True)


def tiny_vae(work: Path, root: Path, place: Place) -> Checkpoint:
    return opened(root, tiny_vae=str(place(save_tiny_vae(work / "taesd"))))


def controlnet(work: Path, root: Path, place: Place) -> Checkpoint:
    network = place(save_controlnet(work / "edges"))
    return opened(root, controlnets=(ControlNetOption(name="edges", path=str(network)),))


def controlnet_pickle(work: Path, root: Path, place: Place) -> Checkpoint:
    (weights,) = save_controlnet(work / "edges").glob("*.safetensors")
    torch.save(load_file(weights), work / "edges.pth")
    option = ControlNetOption(name="edges", path=str(place(work / "edges.pth")))
    return opened(root, controlnets=(option,), allow_pickle=True)


def adapter(work: Path, root: Path, place: Place) -> Checkpoint:
    network = place(save_adapter(work / "sketch"))
    return opened(root, adapters=(ControlNetOption(name="sketch", path=str(network)),))


def adapter_pickle(work: Path, root: Path, place: Place) -> Checkpoint:
    network = place(pickled(save_adapter(work / "sketch")))
    return opened(root, adapters=(ControlNetOption(name="sketch", path=str(network)),), allow_pickle=True)


def lora(work: Path, root: Path, place: Place) -> Checkpoint:
    file = place(save(work / "style.safetensors", kohya(make_factors(root, seed=1))))
    return opened(root, loras=(LoraOption(path=str(file), strength=0.7),))


def peft_lora(work: Path, root: Path, place: Place) -> Checkpoint:
    """Its scale is in a file beside it, which lies beside the link and not beside the blob."""
    factors = [row for row in make_factors(root, seed=1) if row.part == "unet"]
    folder = work / "style"
    folder.mkdir()
    save(folder / "adapter_model.safetensors", peft(factors))
    (folder / "adapter_config.json").write_text(json.dumps(adapter_metadata(factors, prefix=False)))
    file = place(folder) / "adapter_model.safetensors"
    return opened(root, loras=(LoraOption(path=str(file)),))


def refiner(work: Path, root: Path, place: Place) -> Checkpoint:
    base = _tiny(root.parent / "sdxl-plain-checkpoint", family="sdxl")
    other = _tiny(root.parent / "sdxl-refiner-checkpoint", family="sdxl", variant="refiner")
    found = add_refiner(opened(place(base)), CheckpointOptions(refiner=str(place(other))))
    assert found.refiner is not None
    return found.refiner


ENTRANCES: tuple[Enter, ...] = (
    directory,
    shards,
    directory_of_pickles,
    single_file,
    single_pickle,
    unet,
    unet_pickle,
    unet_directory_of_pickles,
    vae,
    vae_directory,
    vae_pickle,
    tiny_vae,
    controlnet,
    controlnet_pickle,
    adapter,
    adapter_pickle,
    lora,
    peft_lora,
    refiner,
)

WHOLE_FOLDERS: tuple[Enter, ...] = (
    directory,
    directory_of_pickles,
    single_file,
    unet_directory_of_pickles,
    vae_directory,
    tiny_vae,
    controlnet,
    adapter,
    refiner,
)
"""Those of ENTRANCES that are given a directory."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    def cached(given: Path) -> Path:
        repositories = len(list((tmp_path / "cache").glob("*")))
        return in_hub_cache(given, tmp_path / "cache", repository=f"models--user--{repositories}")

    return cached


def tensors(network: Path | WeightSource, folder: Path) -> Mapping[str, Any]:
    """Load a network's weights as they are exported."""
    if isinstance(network, Path):
        return {key: tensor for file in network.glob("*.safetensors") for key, tensor in load_file(file).items()}
    with written(network, folder) as made:
        return tensors(made, folder)


@pytest.mark.parametrize("enter", ENTRANCES, ids=lambda enter: enter.__name__)
def test_what_lies_in_the_hubs_cache_is_what_was_published(
    enter: Enter, sd1_checkpoint: Path, place: Place, tmp_path: Path
) -> None:
    for name in ("plain", "cached"):
        (tmp_path / name).mkdir()
    plain = enter(tmp_path / "plain", sd1_checkpoint, lambda path: path)
    cached = enter(tmp_path / "cached", sd1_checkpoint, place)
    assert set(cached.files) == set(plain.files)
    assert all("blobs" not in path.parts for path in cached.files.values())
    assert (cached.configs, cached.family, cached.options) == (plain.configs, plain.family, plain.options)
    for component, network in plain.networks.items():
        expected = tensors(network, tmp_path / "a")
        found = tensors(cached.networks[component], tmp_path / "b")
        assert expected and set(found) == set(expected)
        for key, tensor in expected.items():
            np.testing.assert_array_equal(found[key].numpy(), tensor.numpy())


@pytest.mark.parametrize("enter", WHOLE_FOLDERS, ids=lambda enter: enter.__name__)
def test_a_repositorys_folder_in_the_cache_means_its_main_branch(
    enter: Enter, sd1_checkpoint: Path, place: Place, tmp_path: Path
) -> None:
    def repository(given: Path) -> Path:
        return place(given).parent.parent if given.is_dir() else place(given)

    for name in ("plain", "cached"):
        (tmp_path / name).mkdir()
    plain = enter(tmp_path / "plain", sd1_checkpoint, lambda path: path)
    cached = enter(tmp_path / "cached", sd1_checkpoint, repository)
    assert set(cached.files) == set(plain.files)
    assert (cached.configs, cached.family) == (plain.configs, plain.family)


def test_what_a_repository_has_of_a_revision_is_found_by_its_name_and_by_its_commit(
    sd1_checkpoint: Path, place: Place
) -> None:
    main = place(sd1_checkpoint)
    repository = main.parent.parent
    other = Path(shutil.copytree(main, main.with_name("f" * 40), symlinks=True))
    (repository / "refs" / "v2").write_text(other.name)
    assert find_place(str(repository)) == main
    assert find_place(str(repository), revision="v2") == find_place(str(repository), revision=other.name) == other
    (repository / "refs" / "main").unlink()
    assert find_place(str(repository)) == repository, "which of two is meant is not guessed"
    shutil.rmtree(other)
    assert find_place(str(repository)) == main
    assert inspect_checkpoint(str(repository)).problem is None


def test_a_revision_of_what_has_none_is_refused(sd1_checkpoint: Path, place: Place) -> None:
    for given in (sd1_checkpoint, place(sd1_checkpoint).parent.parent, place(sd1_checkpoint)):
        with pytest.raises(CheckpointError, match="--revision"):
            opened(given, revision="v3")
        with pytest.raises(CheckpointError, match="--revision"):
            inspect_checkpoint(str(given), revision="v3")


REPOSITORY = "user/name"
ADDED: Mapping[str, dict[str, Any]] = {
    "a ControlNet": {"controlnets": (ControlNetOption(name="edges", path=REPOSITORY),)},
    "an adapter": {"adapters": (ControlNetOption(name="sketch", path=REPOSITORY),)},
    "an IP-Adapter": {"ip_adapters": (ControlNetOption(name="style", path=REPOSITORY),)},
    "a VAE": {"vae": REPOSITORY},
    "a tiny VAE": {"tiny_vae": REPOSITORY},
    "a UNet": {"unet": REPOSITORY},
    "a motion adapter": {"motion_adapter": REPOSITORY},
}


@pytest.mark.parametrize("options", ADDED.values(), ids=ADDED)
def test_a_hub_id_where_none_is_fetched_is_told_how_to_get_it(options: dict[str, Any], sd1_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=f"`hf download {REPOSITORY}`"):
        opened(sd1_checkpoint, **options)


@pytest.mark.parametrize(
    ("save", "kind", "option"),
    [(save_adapter, "controlnets", "--adapter"), (save_controlnet, "adapters", "--controlnet")],
    ids=["an adapter", "a ControlNet"],
)
def test_what_was_given_to_the_wrong_option_names_its_own(
    save: Callable[[Path], Path], kind: str, option: str, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    given = ControlNetOption(name="edges", path=str(save(tmp_path / "network")))
    with pytest.raises(CheckpointError, match=f"{option}$"):
        opened(sd1_checkpoint, **{kind: (given,)})


def test_a_lora_that_was_given_as_a_controlnet_names_its_own_option(sd1_checkpoint: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", kohya(make_factors(sd1_checkpoint, seed=1)))
    with pytest.raises(CheckpointError, match="--lora FILE"):
        opened(sd1_checkpoint, controlnets=(ControlNetOption(name="edges", path=str(file)),))


def test_a_learned_word_has_the_links_name(place: Place, tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "easynegative.safetensors")
    learned = load_embedding(place(tmp_path / "easynegative.safetensors"))
    assert (learned.name, learned.taught("text_encoder").vectors.shape) == ("easynegative", (2, 32))


def test_a_blob_itself_is_read_by_its_content(sd1_checkpoint: Path, place: Place, tmp_path: Path) -> None:
    """A file without any ending: whoever copied it out of the cache need not rename it."""
    weights = sd1_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "vae.pt")
    blob, pickle = place(weights).resolve(), place(tmp_path / "vae.pt").resolve()
    assert blob.suffix == pickle.suffix == ""
    assert opened(sd1_checkpoint, vae=str(blob)).files[f"vae/{blob.name}"] == blob
    assert opened(sd1_checkpoint, vae=str(pickle), allow_pickle=True).files[f"vae/{pickle.name}"] == pickle
    assert (inspect_checkpoint(str(blob)).model, inspect_checkpoint(str(pickle)).layout) == ("VAE", "a pickle")
