"""LoRAs of SD 3 in kohya's names: at export and for one call, what diffusers draws with those weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt import Lora, Pipeline
from latentrt.engines.spec import Array
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.networks import loading
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions, LoraOption
from latentrt.export.sources.parts import WeightSource
from tests.conftest import Make
from tests.sd3 import diffusers_sd3
from tests.single_sd3 import joint_tensors
from tests.test_families import LEAST, psnr
from tests.test_lora_transformer import convert, factors, kohya

PROMPT, STEPS, SEED, SCALE = "a red circle on blue", 3, 3, 0.7
# Of the text encoders, by what kohya calls them: the module, and its name in diffusers' pipeline.
TEXTS = {
    "te1": ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
    "te2": ("text_encoder_2", "text_model.encoder.layers.1.mlp.fc1"),
    "te3": ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q"),
}
Changes = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def plain(made: Make) -> tuple[Path, Path]:
    return made("sd3", "t5")


def network(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (checkpoint / part).glob("*.safetensors")
    return dict(load_file(file))


@pytest.fixture(scope="module")
def style(plain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Changes]:
    """A LoRA of every layer of the transformer and of one of each text encoder, and what it adds to which weight."""
    checkpoint = plain[0]
    original = joint_tensors(network(checkpoint, "transformer"))
    tensors: dict[str, torch.Tensor] = {}
    added = {key: torch.zeros_like(tensor) for key, tensor in original.items()}
    for module, (down, up) in factors(original).items():
        up = 0.05 * up
        tensors |= {f"{kohya(module)}.lora_down.weight": down, f"{kohya(module)}.lora_up.weight": up}
        added[f"{module}.weight"] = up @ down
    changes: Changes = {"transformer": convert(added)}
    for name, (part, module) in TEXTS.items():
        outputs, inputs = network(checkpoint, part)[f"{module}.weight"].shape
        down, up = torch.randn(2, inputs), 0.3 * torch.randn(outputs, 2)
        start = f"lora_{name}_{module.replace('.', '_')}"
        tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
        changes[part] = {f"{module}.weight": up @ down}
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return file, changes


def their_picture(checkpoint: Path, changes: Changes) -> Array:
    pipe = diffusers_sd3(checkpoint)
    for part, added in changes.items():
        own = getattr(pipe, part).state_dict()
        for name, delta in added.items():
            own[name if name in own else name.removeprefix("text_model.")].add_(SCALE * delta)
    generator = torch.Generator().manual_seed(SEED)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "generator": generator}
    pixels = pipe(PROMPT, output_type="np", width=48, height=32, **call).images
    return np.asarray((pixels * 255).round())


def test_a_picture_with_a_lora_is_that_of_diffusers(plain: tuple[Path, Path], style: tuple[Path, Changes]) -> None:
    checkpoint, bundle = plain
    file, changes = style
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:

        def draw(*loras: Lora) -> Array:
            call: dict[str, Any] = {"steps": STEPS, "seed": SEED, "guidance": 4.0, "size": (48, 32)}
            return pipe(PROMPT, loras=list(loras), **call).pixels

        before, found, after = draw(), draw(Lora(file=file, scale=SCALE)), draw()
    assert psnr(found, their_picture(checkpoint, changes)) >= LEAST
    assert psnr(found, before) < LEAST
    np.testing.assert_array_equal(before, after)


def test_an_export_adds_it_to_the_weights(
    plain: tuple[Path, Path], style: tuple[Path, Changes], tmp_path: Path
) -> None:
    file, changes = style
    options = CheckpointOptions(loras=(LoraOption(path=str(file), strength=SCALE),))
    opened = open_checkpoint(str(plain[0]), options=options)
    for part, added in changes.items():
        source = opened.networks[part]
        assert isinstance(source, WeightSource)
        row = opened.rows.get(part, part)
        base = loading.load(row, plain[0] / part).state_dict()
        with written(source, tmp_path / part) as folder:
            found = loading.load(row, folder).state_dict()
        moved = {f"model.{name}": delta for name, delta in added.items()}
        for key, tensor in found.items():
            delta = moved.get(key, moved.get(key.replace("model.", "model.text_model.", 1)))
            expected = base[key] + (0 if delta is None else SCALE * delta)
            np.testing.assert_allclose(tensor.numpy(), expected.numpy(), atol=1e-5, err_msg=key)
