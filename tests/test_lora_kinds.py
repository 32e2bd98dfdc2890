"""Each kind of change against those who train it: LyCORIS and PEFT, by what tests/lora_golden.py recorded of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.file import find_deltas, read_lora
from latentrt.export.inspection import inspect_checkpoint
from tests.lora_files import Array, Tensors, save
from tests.lora_mixture import every_kind
from tests.test_lora import base as base_of
from tests.test_lora import fused, with_loras

GOLDEN = Path(__file__).parent / "data" / "lora_kinds.safetensors"
CLOSE = 5e-6  # of weights up to ten: float32 sums in another order


def recorded() -> tuple[Tensors, dict[str, str]]:
    with safe_open(GOLDEN, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


TENSORS, CASES = recorded()
BASE = {key.removeprefix("base|"): array for key, array in TENSORS.items() if key.startswith("base|")}


def of_case(name: str, what: str) -> Tensors:
    start = f"{name}|{what}|"
    return {key.removeprefix(start): array for key, array in TENSORS.items() if key.startswith(start)}


def added(path: Path, strength: float, base: Tensors = BASE) -> Tensors:
    deltas = find_deltas(read_lora(path), "unet", {key: array.shape for key, array in base.items()}, strength=strength)
    return {key: delta(base[key]) for key, delta in deltas.items()}


@pytest.mark.parametrize("name", sorted(CASES))
def test_weights_are_those_of_the_trainer(name: str, tmp_path: Path) -> None:
    told = json.loads(CASES[name])
    file = save(tmp_path / "adapter_model.safetensors", of_case(name, "file"))
    if told["config"]:
        (tmp_path / "adapter_config.json").write_text(told["config"])
    found, merged = added(file, told["strength"]), of_case(name, "merged")
    assert set(found) <= set(merged)
    assert any(np.abs(array).max() > 0.1 for array in found.values())
    for key, array in merged.items():
        np.testing.assert_allclose(BASE[key] + found.get(key, np.float32(0)), array, rtol=0, atol=CLOSE)


def lora(path: Path, **roles: Array) -> Path:
    return save(path, {f"lora_unet_time_embedding_linear_1.{role.replace('__', '.')}": t for role, t in roles.items()})


def dora(path: Path, *, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    up, down, magnitudes = (generator.uniform(0.2, 1, size).astype(np.float32) for size in ((12, 2), (2, 8), (12, 1)))
    return lora(path, lora_up__weight=up, lora_down__weight=down, dora_scale=magnitudes)


@given(strength=st.floats(-2, 2))
def test_the_strength_of_magnitudes_lies_on_a_line_from_the_base(
    tmp_path_factory: pytest.TempPathFactory, strength: float
) -> None:
    file = dora(tmp_path_factory.mktemp("dora") / "a.safetensors")
    (whole,), (part,) = added(file, 1.0).values(), added(file, strength).values()
    np.testing.assert_allclose(part, np.float32(strength) * whole, atol=CLOSE)


def test_a_row_of_zeros_stays_finite(tmp_path: Path) -> None:
    base = {"time_embedding.linear_1.weight": np.zeros((12, 8), np.float32)}
    file = lora(
        tmp_path / "a.safetensors",
        lora_up__weight=np.zeros((12, 2)),
        lora_down__weight=np.zeros((2, 8)),
        dora_scale=np.ones((12, 1)),
    )
    np.testing.assert_array_equal(added(file, 1.0, base)["time_embedding.linear_1.weight"], 0)


def test_every_kind_is_written_into_an_export(sd1_checkpoint: Path, tmp_path: Path) -> None:
    tensors, changed = every_kind(sd1_checkpoint, seed=1, strength=0.7)
    checkpoint = with_loras(sd1_checkpoint, (save(tmp_path / "a.safetensors", tensors), 0.7))
    for part in ("unet", "text_encoder"):
        found = fused(checkpoint, part, tmp_path / part)
        names = {name: key for network, name in changed if network == part for key in found if name.endswith(key)}
        for name, key in names.items():
            np.testing.assert_allclose(found[key], changed[part, name], rtol=0, atol=CLOSE)
        for key, array in base_of(sd1_checkpoint, part).items():
            if key not in names.values():
                np.testing.assert_array_equal(found[key], array)


def test_the_order_of_files_with_magnitudes_makes_no_difference(sd1_checkpoint: Path, tmp_path: Path) -> None:
    """Each adds to the base's weight what it would add alone, as LyCORIS' networks do on one layer."""
    files = []
    for seed in (1, 2):
        tensors, _ = every_kind(sd1_checkpoint, seed=seed, strength=1.0)
        files.append((save(tmp_path / f"{seed}.safetensors", tensors), 0.5))
    one, other, first, second = (
        fused(with_loras(sd1_checkpoint, *chosen), "unet", tmp_path / "unet")
        for chosen in (files, files[::-1], files[:1], files[1:])
    )
    for key, array in base_of(sd1_checkpoint, "unet").items():
        np.testing.assert_array_equal(one[key], other[key])
        np.testing.assert_allclose(one[key] - array, first[key] - array + second[key] - array, atol=CLOSE)


NAMES = {  # PEFT's adapter names, and the prefixes that other tools give
    "unet.{}.lora_{}.weight": ("A", "B"),
    "unet.{}.lora_{}.default_0.weight": ("A", "B"),
    "unet.{}.lora_{}.my-style.weight": ("A", "B"),
    "unet.{}.lora_linear_layer.{}.weight": ("down", "up"),
    "diffusion_model.{}.lora_{}.weight": ("down", "up"),
    "lycoris_{}.lora_{}.weight": ("down", "up"),
}


@pytest.mark.parametrize("pattern", NAMES)
def test_adapters_of_any_name_and_wrapper_are_read(pattern: str, tmp_path: Path) -> None:
    module = "time_embedding.linear_1" if pattern.startswith("unet") else "time_embedding_linear_1"
    module = "time_embed.0" if pattern.startswith("diffusion_model") else module
    down, up = np.ones((2, 8), np.float32), np.full((12, 2), 0.5, np.float32)
    tensors = {pattern.format(module, side): array for side, array in zip(NAMES[pattern], (down, up), strict=True)}
    (found,) = added(save(tmp_path / "a.safetensors", tensors), 1.0).values()
    np.testing.assert_array_equal(found, 1)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.unet.", "unet.base_model.model."])
@pytest.mark.parametrize("adapter", ["", ".default", ".style"])
def test_pefts_own_names_take_their_scale_from_its_config(prefix: str, adapter: str, tmp_path: Path) -> None:
    down, up = np.ones((2, 8), np.float32), np.ones((12, 2), np.float32)
    name = f"{prefix}time_embedding.linear_1"
    tensors = {f"{name}.lora_A{adapter}.weight": down, f"{name}.lora_B{adapter}.weight": up}
    file = save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 3, "peft_type": "LORA"}))
    (found,) = added(file, 1.0).values()
    np.testing.assert_array_equal(found, 3)


CONFIGS: dict[str, tuple[str, str]] = {
    "no json": ("{", r"/adapter_config\.json .*JSON"),
    "no object": ("[]", r"/adapter_config\.json .*JSON"),
    "another kind": ('{"peft_type": "IA3"}', " IA3,"),
    "another base": ('{"init_lora_weights": "pissa_niter_4"}', "init_lora_weights 'pissa"),
    "lost magnitudes": ('{"use_dora": true}', "use_dora"),
    "no number": ('{"lora_alpha": "many"}', "'many'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_means_other_weights_is_refused(name: str, tmp_path: Path) -> None:
    text, told = CONFIGS[name]
    start = "base_model.model.time_embedding.linear_1.lora_"
    tensors = {f"{start}A.weight": np.ones((2, 8), np.float32), f"{start}B.weight": np.ones((12, 2), np.float32)}
    file = save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=told):
        added(file, 1.0)


def test_inspect_names_each_kind_and_its_rank(sd1_checkpoint: Path, tmp_path: Path) -> None:
    tensors, _ = every_kind(sd1_checkpoint, seed=1, strength=1.0)
    notes = inspect_checkpoint(str(save(tmp_path / "a.safetensors", tensors))).notes
    (note,) = (note for note in notes if "text_encoder" in note)
    assert re.search(r"\b4\b", note)
    assert "LoRA with DoRA of rank 2 and difference and LoKr of rank 3" in note
