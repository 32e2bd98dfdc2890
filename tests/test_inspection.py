"""Saying what lies at a path: the model, its networks and whether it can be exported, from headers and JSON alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from latentrt.engines.bundle.safetensors_header import read_header
from latentrt.engines.errors import CheckpointError
from latentrt.export.cli import inspect
from latentrt.export.configs.families import SUPPORTED
from latentrt.export.inspection import DISTILLED, Inspection, inspect_checkpoint
from latentrt.export.sources.recognise_file import recognise
from tests.sd3 import make_sd3
from tests.single_files import clip_tensors, open_clip_tensors, save_header, save_single_file, unet_tensors, vae_tensors
from tests.test_guards import FORBID
from tests.tiny import save_tiny

XL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
REFINER = XL | {
    "cross_attention_dim": 1280,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "attention_head_dim": [5, 10, 20, 20],
}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
OPEN_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
Texts = dict[str, dict[str, Any]]
ONE: Texts = {"cond_stage_model.transformer.": CLIP}
OPEN: Texts = {"cond_stage_model.model.": OPEN_CLIP}
TWO: Texts = {"conditioner.embedders.0.transformer.": CLIP, "conditioner.embedders.1.model.": OPEN_CLIP_G}
SECOND: Texts = {"conditioner.embedders.0.model.": OPEN_CLIP_G}
# (the UNet's config, the text encoders' by their keys' beginning, what it is, its prediction type,
# parameters of the published UNet in millions)
PUBLISHED: list[tuple[dict[str, Any], Texts, str, str | None, float]] = [
    ({"cross_attention_dim": 768}, ONE, "Stable Diffusion 1.x", "epsilon", 859.52),
    ({"cross_attention_dim": 768, "in_channels": 9}, ONE, "Stable Diffusion 1.x, for inpainting", "epsilon", 859.54),
    (SD2, OPEN, "Stable Diffusion 2.x", None, 865.91),
    (SD2 | {"in_channels": 5}, OPEN, "Stable Diffusion 2.x, with a depth map", None, 865.91),
    (XL, TWO, "Stable Diffusion XL", "epsilon", 2567.46),
    (XL | {"in_channels": 9}, {}, "Stable Diffusion XL, for inpainting", "epsilon", 2567.48),
    (REFINER, SECOND, "Stable Diffusion XL refiner", "epsilon", 2259.53),
]
IDS = [row[2] for row in PUBLISHED]


def published(unet: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    """The tensors of a whole file at full size, without their data. texts: by what the keys begin with."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**unet)
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels)
        tensors = {}
        for prefix, config in texts.items():
            kind = CLIPTextModelWithProjection if config is OPEN_CLIP_G else CLIPTextModel
            encode = clip_tensors if prefix.endswith("transformer.") else open_clip_tensors
            tensors |= encode(kind(CLIPTextConfig(**config)).state_dict(), prefix=prefix)
        return {
            **tensors,
            **vae_tensors(vae.state_dict(), vae.config, prefix="first_stage_model."),
            **unet_tensors(denoiser.state_dict(), denoiser.config),
        }


@pytest.mark.parametrize(("unet", "text", "label", "prediction", "millions"), PUBLISHED, ids=IDS)
def test_files_in_published_sizes_are_recognised(
    tmp_path: Path,
    unet: dict[str, Any],
    text: Texts,
    label: str,
    prediction: str | None,
    millions: float,
) -> None:
    file = save_header(tmp_path / "model.safetensors", published(unet, text))
    found = recognise(read_header(file))
    assert found is not None
    assert (found.label, found.prediction) == (label, prediction)
    inspection = inspect_checkpoint(str(file))
    assert inspection.model == label
    networks = {network.name: network for network in inspection.networks}
    assert networks["unet"].parameters == pytest.approx(millions * 1e6, rel=1e-5)
    assert networks["vae"].parameters == pytest.approx(83.65e6, rel=1e-3)
    assert networks["unet"].dtypes == {"F16": 1.0}
    assert any("text encoder" in note for note in inspection.notes) == (not text)
    assert DISTILLED in inspection.notes


def test_what_a_file_says_of_its_prediction_is_believed(sd1_checkpoint: Path, tmp_path: Path) -> None:
    written = {"modelspec.prediction_type": "v", "modelspec.title": "A title"}
    file = save_single_file(sd1_checkpoint, tmp_path / "a.safetensors", metadata=written)
    inspection = inspect_checkpoint(str(file))
    assert inspection.prediction == "v_prediction (by modelspec.prediction_type in its metadata)"
    assert any("'A title'" in note for note in inspection.notes)


# One of diffusers' own names of models, what we call it. The keys and shapes are those by which diffusers tells them.
OTHERS = {
    "sd3": "Stable Diffusion 3's transformer alone",
    "sd35_large": "Stable Diffusion 3's transformer alone",
    "flux": "Flux",
    "flux2": "Flux 2",
    "chroma": "Chroma",
    "auraflow": "AuraFlow",
    "ltx-video": "LTX-Video",
    "lumina2": "Lumina 2",
    "z-image-turbo": "Z-Image",
    "wan": "Wan",
    "stable_cascade_stage_b": "Stable Cascade, stage B",
    "stable_cascade_stage_c": "Stable Cascade, stage C",
    "hunyuan-video": "HunyuanVideo",
}


@pytest.mark.parametrize(("name", "label"), OTHERS.items())
def test_files_of_other_models_are_named(tmp_path: Path, name: str, label: str) -> None:
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES

    keys = CHECKPOINT_KEY_NAMES[name]
    keys = [keys] if isinstance(keys, str) else list(keys)
    if name == "sd35_large":  # the table tells the large one by a late block; a file holds the first one too
        keys.append(CHECKPOINT_KEY_NAMES["sd3"][0])
    if name == "z-image-turbo":
        keys.append(CHECKPOINT_KEY_NAMES["lumina2"][0])
    file = save_header(tmp_path / "a.safetensors", dict.fromkeys(keys, (4, 4)))
    inspection = inspect_checkpoint(str(file))
    assert inspection.model == label
    assert inspection.problem is not None
    assert inspection.problem.startswith(f"{label} ") and SUPPORTED in inspection.problem


PARTS = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "LoRA",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "LoRA",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": "LoRA",
    "lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a": "LoRA",
    "lora_unet_down_blocks_0_attentions_0_proj_in.dora_scale": "LoRA",
    "control_model.input_blocks.0.0.weight": "ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "ControlNet",
    "ip_adapter.1.to_k_ip.weight": "IP-Adapter",
    "lora_controlnet": "Control-LoRA",
    "lllite_unet_input_blocks_4_1_proj_in.down.0.weight": "ControlNet-LLLite",
    "task_embedding": "ControlNet Union",
    "adapter.conv_in.weight": "T2I-Adapter",
    "emb_params": "textual inversion embedding",
    "<cat>": "textual inversion embedding",
    "decoder.conv_in.weight": "VAE",
    "encoder.layers.0.weight": "tiny VAE (TAESD)",
    "text_model.embeddings.token_embedding.weight": "text encoder",
    "down_blocks.0.resnets.0.conv1.weight": "UNet without text encoder and VAE",
}


@pytest.mark.parametrize(("key", "label"), PARTS.items())
def test_parts_and_additions_are_named(tmp_path: Path, key: str, label: str) -> None:
    inspection = inspect_checkpoint(str(save_header(tmp_path / "a.safetensors", {key: (4, 4)})))
    assert inspection.model == label
    assert inspection.problem is not None
    assert label in inspection.problem


def test_a_loras_changes_are_counted(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {}
    for name, rank in (("unet_conv_in", 4), ("unet_conv_out", 8), ("te_text_model_encoder_layers_0_mlp_fc1", 2)):
        tensors |= {f"lora_{name}.lora_down.weight": (rank, 4), f"lora_{name}.lora_up.weight": (4, rank)}
    file = save_header(tmp_path / "a.safetensors", tensors, metadata={"ss_base_model_version": "sd_v1"})
    notes = inspect_checkpoint(str(file)).notes
    for part, numbers in (("unet", ["2", "4", "8"]), ("text_encoder", ["1", "2"])):
        (note,) = (note for note in notes if part in note)
        assert "LoRA" in note and re.findall(r"\d+", note) == numbers
    assert any("ss_base_model_version: sd_v1" in note for note in notes)


def test_what_nobody_knows_is_said_with_a_name_from_inside(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(str(save_header(tmp_path / "a.safetensors", {"x.y": (4,), "z": (2, 2, 2)})))
    assert inspection.model == ""
    assert inspection.problem is not None and re.search(r" 2 .* x\.y, z$", inspection.problem)


@pytest.mark.parametrize(("family", "label"), [("sd1", "Stable Diffusion 1.x"), ("sd2", "Stable Diffusion 2.x")])
def test_a_directory_is_described_as_diffusers_counts(request: pytest.FixtureRequest, family: str, label: str) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    root = Path(request.getfixturevalue(f"{family}_checkpoint"))
    inspection = inspect_checkpoint(str(root))
    assert (inspection.model, inspection.problem) == (label, None)
    networks = {network.name: network for network in inspection.networks}
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        assert networks[name].parameters == kind.from_pretrained(root / name).num_parameters()
        assert networks[name].dtypes == {"F32": 1.0}


def test_what_a_scheduler_s_class_says_of_the_prediction_is_known(tmp_path: Path) -> None:
    """Flow matching's schedulers have no key for it."""
    assert inspect_checkpoint(str(make_sd3(tmp_path / "tiny"))).prediction == (
        "flow_prediction (FlowMatchEulerDiscreteScheduler)"
    )


def test_the_shares_of_mixed_types_are_told(sd1_checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    arrays = {"a": np.zeros(6, np.float16), "b": np.zeros(1, np.float32)}
    save_file(arrays, root / "vae" / "diffusion_pytorch_model.safetensors")
    (vae,) = (network for network in inspect_checkpoint(str(root)).networks if network.name == "vae")
    assert (vae.parameters, vae.bytes, vae.dtypes) == (7, 16, {"F16": 0.75, "F32": 0.25})


def test_everything_that_is_missing_is_named_at_once(sd1_checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    shutil.rmtree(root / "tokenizer")
    shutil.rmtree(root / "vae")
    (root / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    inspection = inspect_checkpoint(str(root))
    told = " ".join((str(inspection.problem), *inspection.notes))
    assert all(name in told for name in (" vae/", " tokenizer/", "unet/diffusion_pytorch_model.safetensors"))


def test_a_directory_of_another_model_is_named(sd1_checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    shutil.rmtree(root / "text_encoder")
    for file, change in (
        ("model_index.json", {"_class_name": "StableDiffusionUpscalePipeline"}),
        ("unet/config.json", {"num_class_embeds": 1000}),
    ):
        document = json.loads((root / file).read_text()) | change
        (root / file).write_text(json.dumps(document))
    inspection = inspect_checkpoint(str(root))
    assert inspection.model == "Stable Diffusion's upscaler"
    assert inspection.problem is not None
    assert "num_class_embeds: 1000" in inspection.problem


@pytest.mark.parametrize(
    ("family", "variant", "label"),
    [
        ("sdxl", "", "Stable Diffusion XL"),
        ("sdxl", "refiner", "Stable Diffusion XL refiner"),
        ("sd1", "inpainting", "Stable Diffusion 1.x, for inpainting"),
        ("sdxl", "lcm", "Stable Diffusion XL, for latent consistency"),
    ],
)
def test_families_and_their_variants_are_told_apart(family: str, variant: str, label: str, tmp_path: Path) -> None:
    inspection = inspect_checkpoint(str(save_tiny(tmp_path / "a", family=family, variant=variant)))
    assert (inspection.model, inspection.problem) == (label, None)


def test_one_network_is_named_by_its_class(sd1_checkpoint: Path) -> None:
    inspection = inspect_checkpoint(str(sd1_checkpoint / "vae"))
    assert inspection.model == "AutoencoderKL"
    assert inspection.problem is not None
    assert "AutoencoderKL" in inspection.problem


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    inspection = inspect_checkpoint(str(tmp_path / "model.ckpt"))
    assert inspection.problem is not None
    assert "pickle" in inspection.layout
    assert not (tmp_path / "opened").exists()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>")
    for name in ("page.html", "absent"):
        assert f"'{tmp_path / name}'" in refusal(tmp_path / name)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "`git lfs pull`" in refusal(tmp_path / "pointer.safetensors")


def header(document: object, tail: int) -> bytes:
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * tail


def entry(dtype: str, shape: list[Any], *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


DAMAGE = {
    "empty": b"",
    "no header": b"\xff" * 64,
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no object": header([], 0),
    "one byte short": header({"a": entry("F32", [2], 0, 8)}, 7),
    "one byte more": header({"a": entry("F32", [2], 0, 8)}, 9),
    "a hole": header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, 20),
    "an overlap": header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12),
    "a shape of another size": header({"a": entry("F32", [3], 0, 8)}, 8),
    "a negative side": header({"a": entry("F32", [-1, -2], 0, 8)}, 8),
    "a fraction": header({"a": entry("F32", [2.0], 0, 8)}, 8),
    "backwards": header({"a": entry("U8", [0], 8, 0)}, 0),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "metadata that are a list": header({"__metadata__": [1], "a": entry("F32", [2], 0, 8)}, 8),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    assert str(tmp_path / "a.safetensors") in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_are_read_as_torch_reads_them(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save

    tensors = {"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))}
    tensors |= {"alpha": torch.tensor(8.0).to(getattr(torch, dtype)), "none": torch.zeros(0, 4)}
    save(tensors, tmp_path / "a.safetensors")
    file = read_header(tmp_path / "a.safetensors")
    for key, tensor in tensors.items():
        found = file.read_float32(key)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.float().numpy(), strict=True)


def test_the_command_prints_words_and_json(sd1_checkpoint: Path) -> None:
    text = CliRunner().invoke(inspect, [str(sd1_checkpoint)]).output
    assert all(word in text for word in ("Stable Diffusion 1.x", "epsilon", "32x32", "AutoencoderKL"))
    document = json.loads(CliRunner().invoke(inspect, [str(sd1_checkpoint), "--json"]).output)
    assert set(document) == set(Inspection.__dataclass_fields__) and document["problem"] is None
    assert "Stable Diffusion 1.x" in CliRunner().invoke(inspect, ["demo"]).output


def test_inspection_needs_no_torch(sd1_checkpoint: Path) -> None:
    code = f"""{FORBID}
from latentrt.export.inspection import inspect_checkpoint
print(inspect_checkpoint({str(sd1_checkpoint)!r}).model)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "Stable Diffusion 1.x", result.stderr
