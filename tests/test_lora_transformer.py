"""LoRAs for SD 3's transformer: each name that trainers give means its own rows of its own weight.

The oracle of the names is diffusers' conversion of a whole checkpoint: a change that is added to the first authors'
matrices and converted with them is what the names must mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.file import find_deltas, read_lora
from latentrt.engines.spec import Array
from tests.single_sd3 import joint_tensors

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
}
# SD 3 medium's kind, and 3.5 medium's
KINDS: Mapping[str, dict[str, Any]] = {
    "medium": {},
    "dual": {"num_layers": 3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
}
RANK, ALPHA = 3, 1.5


def transformer_state(kind: str) -> Tensors:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    state = SD3Transformer2DModel(**SIZES | KINDS[kind]).state_dict()
    return {key: torch.randn(tensor.shape) if key != "pos_embed.pos_embed" else tensor for key, tensor in state.items()}


def convert(original: Tensors) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    converted: Tensors = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    return converted


def matrices(state: Tensors) -> list[str]:
    return [key.removesuffix(".weight") for key, tensor in state.items() if tensor.ndim == 2 and key.endswith("weight")]


def factors(state: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return down and up of a change of every matrix, by its module."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for module in matrices(state):
        outputs, inputs = state[f"{module}.weight"].shape
        down = torch.randn(RANK, inputs, generator=generator)
        found[module] = (down, torch.randn(outputs, RANK, generator=generator))
    return found


def added(file: Path, part: str, state: Tensors) -> dict[str, Array]:
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    deltas = find_deltas(read_lora(file), part, shapes, strength=1.0)
    return {name: delta(state[name].numpy()) for name, delta in deltas.items()}


def differences(original: Tensors, changes: Tensors) -> dict[str, Array]:
    """Return what changes of the first authors' weights are for diffusers'."""
    before = convert(original)
    after = convert({key: tensor + changes.get(key, 0) for key, tensor in original.items()})
    moved = {key: (after[key] - before[key]).numpy() for key in before}
    return {key: array for key, array in moved.items() if array.any()}


def agree(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_these_tests_is_what_diffusers_converts(kind: str) -> None:
    state = transformer_state(kind)
    converted = convert(joint_tensors(state))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in state.items())


def kohya(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


NAMES: Mapping[str, Callable[[str], tuple[str, str, str]]] = {
    "kohya": lambda m: (f"{kohya(m)}.lora_down.weight", f"{kohya(m)}.lora_up.weight", f"{kohya(m)}.alpha"),
    "ComfyUI": lambda m: (
        f"diffusion_model.{m}.lora_A.weight",
        f"diffusion_model.{m}.lora_B.weight",
        f"diffusion_model.{m}.alpha",
    ),
}


@pytest.mark.parametrize("names", ["kohya", "ComfyUI"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_authors_names_mean_what_diffusers_makes_of_their_matrices(
    kind: str, names: str, tmp_path: Path
) -> None:
    state = transformer_state(kind)
    original = joint_tensors(state)
    tensors, changes = {}, {}
    for module, (down, up) in factors(original).items():
        first, second, alpha = NAMES[names](module)
        tensors |= {first: down, second: up, alpha: torch.tensor(ALPHA)}
        changes[f"{module}.weight"] = ALPHA / RANK * (up @ down)
    save_file(tensors, tmp_path / "lora.safetensors")
    agree(added(tmp_path / "lora.safetensors", "transformer", state), differences(original, changes))


DIFFUSERS = ("transformer.{}", "base_model.model.{}", "{}", "diffusion_model.{}", "lora_transformer_{}", "lora_unet_{}")


@pytest.mark.parametrize("pattern", DIFFUSERS)
def test_diffusers_names_mean_their_own_weights(pattern: str, tmp_path: Path) -> None:
    state = transformer_state("dual")
    tensors: Tensors = {}
    for module, (down, up) in factors(state).items():
        flat = module.replace(".", "_") if pattern.startswith("lora_") else module
        tensors |= {f"{pattern}.lora_A.weight".format(flat): down, f"{pattern}.lora_B.weight".format(flat): up}
    save_file(tensors, tmp_path / "lora.safetensors")
    if "base_model" in pattern:
        (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 3}')
    expected = {f"{module}.weight": (up @ down).numpy() for module, (down, up) in factors(state).items()}
    agree(added(tmp_path / "lora.safetensors", "transformer", state), expected)


FUSED = "joint_blocks.0.x_block.attn.qkv"


def test_every_kind_of_change_of_a_fused_layer_is_split(tmp_path: Path) -> None:
    state = transformer_state("medium")
    original, generator = joint_tensors(state), torch.Generator().manual_seed(2)
    rows, columns = original[f"{FUSED}.weight"].shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    kron, whole, bias = (draw(3, 2), draw(rows // 3, columns // 2)), draw(rows, columns), draw(rows)
    hada = [draw(rows, 2), draw(2, columns), draw(rows, 2), draw(2, columns)]
    cases: dict[str, tuple[Tensors, torch.Tensor]] = {
        "LoKr": ({"lokr_w1": kron[0], "lokr_w2": kron[1]}, torch.kron(*kron)),
        "LoHa": (
            dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), hada, strict=True)),
            (hada[0] @ hada[1]) * (hada[2] @ hada[3]),
        ),
        "difference": ({"diff": whole, "diff_b": bias}, whole),
    }
    for name, (tensors, delta) in cases.items():
        save_file({f"{kohya(FUSED)}.{role}": one for role, one in tensors.items()}, tmp_path / name)
        changes = {f"{FUSED}.weight": delta} | ({f"{FUSED}.bias": bias} if "diff_b" in tensors else {})
        agree(added(tmp_path / name, "transformer", state), differences(original, changes))


def test_magnitudes_of_outputs_are_split_and_those_of_inputs_are_refused(tmp_path: Path) -> None:
    state = transformer_state("medium")
    original = joint_tensors(state)
    weight, (down, up) = original[f"{FUSED}.weight"], factors(original)[FUSED]
    magnitudes = torch.rand(len(weight), 1) + 0.5
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitudes}
    file = tmp_path / "lora.safetensors"
    save_file({f"{kohya(FUSED)}.{role}": one for role, one in tensors.items()}, file)
    merged = weight + up @ down
    merged = magnitudes * merged / merged.norm(dim=1, keepdim=True)
    agree(added(file, "transformer", state), differences(original, {f"{FUSED}.weight": merged - weight}))
    tensors["dora_scale"] = torch.rand(1, weight.shape[1])
    save_file({f"{kohya(FUSED)}.{role}": one for role, one in tensors.items()}, file)
    with pytest.raises(CheckpointError, match="dora_scale"):
        added(file, "transformer", state)


def test_a_lora_for_a_unet_is_refused_by_its_network(tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"unet.{module}.lora_A.weight": torch.ones(2, 4), f"unet.{module}.lora_B.weight": torch.ones(4, 2)},
        tmp_path / "lora.safetensors",
    )
    assert read_lora(tmp_path / "lora.safetensors").modules.keys() == {"unet"}


@pytest.mark.parametrize("prefix", ["lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer."])
def test_layers_of_t5_are_named_as_transformers_names_them(prefix: str, tmp_path: Path) -> None:
    module = "encoder.block.0.layer.0.SelfAttention.q"
    name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    state = {f"{module}.weight": torch.zeros(6, 4)}
    agree(added(tmp_path / "lora.safetensors", "text_encoder_3", state), {f"{module}.weight": (up @ down).numpy()})
