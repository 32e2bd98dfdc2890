"""A motion adapter put into a UNet: its graph is diffusers' network on rows, whatever file it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.compare import relative_error
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.families import option_for
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.run import open_session, run_session
from latentrt.export.networks.conversion import read_tensors, written
from latentrt.export.options import CheckpointOptions, ControlNetOption, LoraOption
from latentrt.export.sources.parts import WeightSource
from latentrt.export.sources.recognise_file import name_other
from latentrt.export.sources.single_file import read_weights_header
from tests.conftest import Controlled
from tests.tiny import save_motion, save_tiny


def theirs(checkpoint: Path, adapter: Path) -> UNetMotionModel:
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    return UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(adapter)).eval()


def source_of(checkpoint: Path, **options: Any) -> WeightSource:
    source = open_checkpoint(str(checkpoint), options=CheckpointOptions(**options)).networks["unet"]
    assert isinstance(source, WeightSource)
    return source


def in_original_names(adapter: Path, target: Path) -> Path:
    """Write an adapter as AnimateDiff's authors do: other names, and the table of places once for each attention."""
    tensors = {}
    for key, tensor in load_file(adapter / "diffusion_pytorch_model.safetensors").items():
        name = key.replace(".norm1", ".norms.0").replace(".norm2", ".norms.1").replace(".norm3", ".ff_norm")
        name = name.replace(".attn1", ".attention_blocks.0").replace(".attn2", ".attention_blocks.1")
        level, modules, number, rest = name.partition(".motion_modules.")[0], *_split(name)
        for place in (0, 1) if rest.endswith("pos_embed.pe") else (None,):
            own = rest if place is None else rest.replace("pos_embed", f"attention_blocks.{place}.pos_encoder")
            tensors[f"{level}.{modules}.{number}.temporal_transformer.{own}"] = tensor.clone()
    save_file(tensors, target)
    return target


def _split(name: str) -> tuple[str, str, str]:
    number, _, rest = name.partition(".motion_modules.")[2].partition(".")
    return "motion_modules", number, rest


@pytest.mark.parametrize(("windows", "frames"), [(2, 4), (3, 1), (1, 24)])
def test_rows_are_frames_of_windows(motion: Controlled, windows: int, frames: int) -> None:
    bundle = Bundle.open(motion.bundle)
    generator, rows = np.random.default_rng(0), windows * frames
    times = np.repeat(np.linspace(900, 1.5, windows, dtype=np.float32), frames)
    inputs = {
        "sample": generator.standard_normal((rows, 4, 5, 6), dtype=np.float32),
        "timestep": times,
        "encoder_hidden_states": generator.standard_normal((rows, 7, 32), dtype=np.float32),
        "frame_index": np.zeros(frames, np.float32),
    }
    graph = bundle.path(bundle.manifest.components["unet"].graph)
    residuals = {
        spec.name: np.zeros([rows, spec.shape[1], *_sides(spec.shape)], np.float32)
        for spec in bundle.manifest.components["unet"].inputs
        if "residual" in spec.name
    }
    found = run_session(open_session(graph), inputs | residuals)["out_sample"]
    sample = torch.from_numpy(inputs["sample"]).unflatten(0, (windows, frames)).permute(0, 2, 1, 3, 4)
    with torch.no_grad():
        expected = theirs(motion.checkpoint, motion.networks["motion"])(
            sample, torch.from_numpy(times[::frames]), torch.from_numpy(inputs["encoder_hidden_states"])
        ).sample
    assert relative_error(found, expected.permute(0, 2, 1, 3, 4).flatten(0, 1).numpy()) < 1e-5


def _sides(shape: tuple[int | str, ...]) -> list[int]:
    return [-(-side // int(name.rpartition("_")[2])) for side, name in zip((5, 6), map(str, shape[2:]), strict=True)]


def test_the_manifest_says_how_many_frames(motion: Controlled) -> None:
    manifest = Bundle.open(motion.bundle).manifest
    spec = manifest.denoisers["unet"].frames
    assert spec is not None
    assert (spec.window, spec.most) == (16, 24)
    assert manifest.schedule.beta_schedule == "linear"


@pytest.mark.parametrize("middle", [False, True])
def test_a_file_in_the_authors_names_is_the_same_adapter(sd1_checkpoint: Path, tmp_path: Path, *, middle: bool) -> None:
    adapter = save_motion(tmp_path / "adapter", middle=middle)
    network = MotionAdapter.from_pretrained(adapter)
    file = in_original_names(adapter, tmp_path / "mm.safetensors")
    found = read_tensors(source_of(sd1_checkpoint, motion_adapter=str(file)))
    expected = read_tensors(source_of(sd1_checkpoint, motion_adapter=str(adapter)))
    assert found.keys() == expected.keys()
    assert set(network.state_dict()) <= set(found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert option_for(name_other(read_weights_header(file, allow_pickle=False))[0]) == "--motion-adapter FILE"
    config = open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(motion_adapter=str(file))).configs
    for key in ("use_motion_mid_block", "motion_max_seq_length", "motion_layers_per_block"):
        assert config["motion_adapter"][key] == network.config[key]


def test_a_written_network_is_the_one_of_diffusers(sd1_checkpoint: Path, tmp_path: Path) -> None:
    adapter = save_motion(tmp_path / "adapter", middle=True)
    expected = theirs(sd1_checkpoint, adapter)
    with written(source_of(sd1_checkpoint, motion_adapter=str(adapter)), tmp_path / "unet") as folder:
        found = UNetMotionModel.from_pretrained(folder)
    assert found.config["motion_max_seq_length"] == 24
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_motion_lora_is_merged(sd1_checkpoint: Path, tmp_path: Path) -> None:
    adapter, module = save_motion(tmp_path / "adapter"), "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    names = {"down": down, "up": up}
    lora = tmp_path / "pan-left.safetensors"
    save_file({f"unet.{module}.to_q.lora.{side}.weight": tensor for side, tensor in names.items()}, lora)
    plain = source_of(sd1_checkpoint, motion_adapter=str(adapter))
    merged = source_of(sd1_checkpoint, motion_adapter=str(adapter), loras=(LoraOption(path=str(lora), strength=0.5),))
    key = f"{module}.to_q.weight"
    with written(plain, tmp_path / "plain") as one, written(merged, tmp_path / "merged") as other:
        before, after = (load_file(next(folder.glob("*.safetensors")))[key] for folder in (one, other))
    assert torch.allclose(after, before + 0.5 * up @ down, atol=1e-6)


@pytest.mark.slow
def test_a_bundle_in_float16_holds_the_modules_too(sd1_checkpoint: Path, tmp_path: Path) -> None:
    adapter = save_motion(tmp_path / "adapter", middle=True)
    options = CheckpointOptions(motion_adapter=str(adapter))
    exported = export_checkpoint(str(sd1_checkpoint), tmp_path / "half", precision="fp16", backends=(), options=options)
    error = exported.components["unet"].error
    assert error is not None
    assert error < 1e-2
    assert any(spec.name == "frame_index" for spec in exported.components["unet"].inputs)


def test_what_does_not_fit_is_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    adapter = save_motion(tmp_path / "adapter")
    checkpoint = save_tiny(tmp_path / "sdxl", family="sdxl")
    with pytest.raises(CheckpointError, match="SDXL"):
        source_of(checkpoint, motion_adapter=str(adapter))
    plain = sd1_checkpoint
    with pytest.raises(CheckpointError, match=r"^--motion-adapter '.*/nothing'"):
        source_of(plain, motion_adapter=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"^--motion-adapter .*`latentrt inspect`"):
        source_of(plain, motion_adapter=str(plain / "unet" / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(CheckpointError, match="T2I-Adapters"):
        source_of(plain, motion_adapter=str(adapter), adapters=(ControlNetOption(name="a", path="b"),))
