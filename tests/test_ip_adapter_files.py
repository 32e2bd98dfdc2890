"""IP-Adapters' files: recognised by what they hold, checked against the UNet and the image encoder, refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.files import Bundle, manifest_from_json, manifest_to_json
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.export.additions.ip_adapters import attention_layers
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.configs.defaults import complete
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from tests.conftest import Controlled, Make
from tests.test_full_graphs import CONFIGS
from tests.tiny import save_image_encoder, save_ip_adapter

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder like the published repository, with adapters for SD 1.5."""
    save_image_encoder(tmp_path / "models" / "image_encoder")
    for kind in ("plain", "plus", "full"):
        save_ip_adapter(tmp_path / "models" / f"{kind}.safetensors", kind=kind)
    return tmp_path


def opened(checkpoint: Path, *files: Path, **options: Any) -> Checkpoint:
    adapters = tuple(ControlNetOption(name=file.stem, path=str(file)) for file in files)
    return open_checkpoint(str(checkpoint), options=CheckpointOptions(ip_adapters=adapters, **options))


def attending(unet: Any) -> list[str]:
    """Return the layers that attend to a text, in diffusers' order."""
    ends = ".attn2.processor"
    return [name.removesuffix(ends) for name in unet.attn_processors if name.endswith(ends)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layers_are_diffusers_in_its_order(name: str) -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**CONFIGS[name])
    found = attention_layers(complete("unet", dict(unet.config), where="x"))
    assert list(found) == attending(unet)
    assert list(found.values()) == [unet.get_submodule(f"{one}.attn2").inner_dim for one in found]


def test_every_kind_is_recognised_with_its_tokens(sd1_checkpoint: Path, published: Path) -> None:
    files = [published / "models" / f"{kind}.safetensors" for kind in ("plus", "full", "plain")]
    checkpoint = opened(sd1_checkpoint, *files)
    specs = {adapter.spec.name: adapter.spec for adapter in checkpoint.image_adapters}
    assert [(name, spec.tokens, spec.zero_negative) for name, spec in specs.items()] == [
        ("full", 17, False), ("plain", 4, True), ("plus", 6, False),
    ]  # fmt: skip
    assert (checkpoint.dimensions["image_tokens"], checkpoint.dimensions["image_adapters"]) == (27, 3)
    assert checkpoint.hashes().keys() >= {"image_encoder/config.json", "image_projection_plus/plus.safetensors"}
    assert open_checkpoint(str(sd1_checkpoint)).dimensions["image_tokens"] == 0


def test_an_encoder_is_found_where_the_published_repository_has_it(made: Make, published: Path) -> None:
    checkpoint, _ = made("sdxl", "")
    adapter = save_ip_adapter(published / "sdxl_models" / "plus.safetensors", family="sdxl", kind="plus")
    found = opened(checkpoint, adapter).networks["image_encoder"]
    assert found == published / "models" / "image_encoder"
    own = save_image_encoder(published / "sdxl_models" / "image_encoder")
    assert opened(checkpoint, adapter).networks["image_encoder"] == own
    config = json.loads((own / "config.json").read_text()) | {"hidden_size": 48}
    (own / "config.json").write_text(json.dumps(config))  # of another kind: it is passed over
    assert opened(checkpoint, adapter).networks["image_encoder"] == found


def test_a_pickle_is_read_where_that_is_allowed(sd1_checkpoint: Path, published: Path) -> None:
    plain = published / "models" / "plus.safetensors"
    groups: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(plain).items():
        group, _, name = key.partition(".")
        groups[group][name] = tensor
    pickled = published / "models" / "plus.bin"
    torch.save(groups, pickled)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        opened(sd1_checkpoint, pickled)
    found, expected = opened(sd1_checkpoint, pickled, allow_pickle=True), opened(sd1_checkpoint, plain)
    assert [one.spec for one in found.image_adapters] == [one.spec for one in expected.image_adapters]
    assert found.dimensions == expected.dimensions


def renamed(tensors: Tensors) -> Tensors:
    """FaceID's: a projection of what a face recogniser gives, and LoRAs."""
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith("ip_adapter.")}
    names = ("proj.0.weight", "proj.2.weight", "norm.weight")
    return kept | {f"image_proj.{name}": torch.zeros(8, 8) for name in names}


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "FaceID": renamed,
    "FaceID Plus": lambda tensors: tensors | {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(8, 8)},
    "with LoRAs": lambda tensors: tensors | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(8, 8)},
    "a layer is missing": lambda t: {key: tensor for key, tensor in t.items() if not key.startswith("ip_adapter.7.")},
    "a layer more": lambda t: t | {"ip_adapter.9.to_k_ip.weight": torch.zeros(32, 32)},
    "of another width": lambda t: t | {"ip_adapter.1.to_v_ip.weight": torch.zeros(16, 48)},
    "no projection": lambda t: {key: tensor for key, tensor in t.items() if not key.startswith("image_proj.")},
    "strangers": lambda tensors: tensors | {"down_blocks.0.weight": torch.zeros(2)},
    "of another encoder": lambda tensors: tensors | {"image_proj.proj.weight": torch.zeros(128, 40)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused_in_a_sentence(sd1_checkpoint: Path, published: Path, change: str) -> None:
    file = published / "models" / "plain.safetensors"
    save_file(CHANGES[change](load_file(file)), file)
    with pytest.raises(CheckpointError, match="--ip-adapter plain=") as refused:
        opened(sd1_checkpoint, file)
    assert "\n" not in str(refused.value) and ("FaceID" in str(refused.value)) == (
        "FaceID" in change or "LoRA" in change
    )


def test_other_refusals(sd1_checkpoint: Path, made: Make, published: Path, tmp_path: Path) -> None:
    models = published / "models"
    plain = models / "plain.safetensors"
    with pytest.raises(CheckpointError, match=r"\(16, 32\) .*\(32, 80\)"):
        opened(made("sdxl", "")[0], plain)
    with pytest.raises(CheckpointError, match=r"'.*nothing\.safetensors'"):
        opened(sd1_checkpoint, models / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"^--ip-adapter: .*'plain'"):
        opened(sd1_checkpoint, plain, plain)
    with pytest.raises(CheckpointError, match="--image-encoder"):
        opened(sd1_checkpoint, plain, image_encoder=str(tmp_path / "empty"))
    shutil.rmtree(models / "image_encoder")
    with pytest.raises(CheckpointError, match="--image-encoder"):
        opened(sd1_checkpoint, plain)


def test_inspect_names_an_adapter_and_how_to_give_it(published: Path) -> None:
    told = inspect_checkpoint(str(published / "models" / "plus.safetensors"))
    assert told.model == "IP-Adapter" and "--ip-adapter" in str(told.problem)


@pytest.mark.parametrize(
    "fault",
    [
        {"tokens": 5},
        {"encoder": "text_encoder"},
        {"projection": "image_encoder"},
        {"reads": "pooler_output"},
    ],
)
def test_a_manifest_whose_image_prompts_do_not_fit_is_refused(
    shown: Callable[[str], Controlled], fault: dict[str, Any]
) -> None:
    manifest = Bundle.open(shown("sd1").bundle).manifest
    name, spec = manifest.denoiser, manifest.denoisers[manifest.denoiser]
    first, *others = spec.image_prompts
    images = (msgspec.structs.replace(first, **fault), *others)
    wrong = {**manifest.denoisers, name: msgspec.structs.replace(spec, image_prompts=images)}
    with pytest.raises(BundleError, match="image_prompts"):
        manifest_from_json(manifest_to_json(msgspec.structs.replace(manifest, denoisers=wrong)), where="x")
    longer = msgspec.structs.replace(spec, image_layers=(*spec.image_layers, "further"))
    with pytest.raises(BundleError, match="image_prompts"):
        manifest_from_json(
            manifest_to_json(msgspec.structs.replace(manifest, denoisers={**manifest.denoisers, name: longer})),
            where="x",
        )
