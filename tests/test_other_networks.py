"""Networks that are neither what was asked for nor unknown: they are named, with the option that takes them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import DEMO, open_checkpoint
from latentrt.export.cli import export
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.options import CheckpointOptions
from tests.single_files import save_header
from tests.test_inspection import TWO, XL, published
from tests.test_tiny_decoder import save_tiny_vae


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), options=CheckpointOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tiny_vae_given_as_the_vae_is_named_with_its_option(sd1_checkpoint: Path, tmp_path: Path) -> None:
    folder = save_tiny_vae(tmp_path / "taesd")
    (weights,) = folder.glob("*.safetensors")
    original = save_header(tmp_path / "taesd_decoder.safetensors", {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (4,)})
    for given in (folder, weights, original):
        assert "--tiny-vae DIRECTORY" in refusal(sd1_checkpoint, vae=str(given))
    assert "--tiny-vae DIRECTORY" in str(inspect_checkpoint(str(weights)).problem)
    command = [str(sd1_checkpoint), str(tmp_path / "bundle"), "--no-build", "--vae", str(folder)]
    result = CliRunner().invoke(export, command)
    assert isinstance(result.exception, CheckpointError) and not (tmp_path / "bundle").exists()


def test_a_checkpoint_whose_vae_is_of_another_class_is_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((root / "vae" / "config.json").read_text())
    for kind, told in (("AutoencoderTiny", "--tiny-vae DIRECTORY"), ("AsymmetricAutoencoderKL", " AutoencoderKL")):
        (root / "vae" / "config.json").write_text(json.dumps({**config, "_class_name": kind}))
        assert told in refusal(root)
        assert open_checkpoint(str(root), options=CheckpointOptions(vae=str(sd1_checkpoint))).latents.channels == 4


def test_a_vae_of_other_latents_is_refused_before_it_is_loaded(sd1_checkpoint: Path, tmp_path: Path) -> None:
    keys = {"decoder.conv_in.weight": (16, 16, 3, 3), "decoder.up_blocks.0.resnets.0.conv1.weight": (16, 16, 3, 3)}
    file = save_header(tmp_path / "flux.safetensors", keys)
    assert " 16 latent" in refusal(sd1_checkpoint, vae=str(file))


def test_kolors_is_named_as_what_it_is(sd1_checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sd1_checkpoint, tmp_path / "kolors"))
    index = json.loads((root / "model_index.json").read_text())
    index |= {"_class_name": "KolorsPipeline", "text_encoder": ["kolors", "ChatGLMModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    assert "Kolors" in refusal(root)
    assert inspect_checkpoint(str(root)).model == "Kolors"


def test_other_models_in_the_sizes_of_sdxl_are_named(tmp_path: Path) -> None:
    tensors = published(XL, TWO)
    added = tensors | {"model.diffusion_model.label_emb.0.0.weight": (1280, 5632)}
    file = save_header(tmp_path / "a.safetensors", added)
    assert re.search(" 5632 .* 2816 .*Kolors", refusal(file))
    editor = tensors | {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}
    marks = {"edm_vpred.sigma_max": [120.0]}
    file = save_header(tmp_path / "cosxl_edit.safetensors", editor, marks=marks)
    assert "(InstructPix2Pix)" in refusal(file, tokenizer=str(DEMO))
