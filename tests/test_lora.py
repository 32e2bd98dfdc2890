"""LoRA: every trainer's file means the same change, the change is the published formula, and nothing is left over."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.file import LoraFile, Match, read_lora
from latentrt.engines.lora.kinds import KIND_OF, Change
from latentrt.engines.lora.names import from_original, plain_module
from latentrt.export.additions.loras import fuse
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions, LoraOption
from latentrt.export.sources.parts import WeightSource
from latentrt.runtime.pipeline import Pipeline
from tests.lora_files import (
    TEXT,
    UNET,
    WRITERS,
    Array,
    Factors,
    Tensors,
    adapter_metadata,
    kohya,
    make_factors,
    peft,
    processors,
    save,
    save_with_adapter_metadata,
)
from tests.single_files import save_header, save_single_file, unet_key
from tests.test_inspection import REFINER, SD2, XL
from tests.test_parity import LIMITS, NEGATIVE, PROMPT, Reference, psnr
from tests.tiny import save_tiny

CLOSE = 1e-6  # of weights of size one: float32 sums of a handful of products


@pytest.fixture(scope="module")
def factors(sd1_checkpoint: Path) -> list[Factors]:
    return make_factors(sd1_checkpoint, seed=3)


def with_loras(root: Path, *loras: tuple[Path, float], **options: Any) -> Checkpoint:
    chosen = tuple(LoraOption(path=str(path), strength=strength) for path, strength in loras)
    return open_checkpoint(str(root), options=CheckpointOptions(loras=chosen, **options))


def fused(checkpoint: Checkpoint, part: str, folder: Path) -> dict[str, Array]:
    """The weights of a network that a LoRA was added to, as they are written before it is loaded."""
    from safetensors.numpy import load_file

    weight_source = checkpoint.networks[part]
    assert isinstance(weight_source, WeightSource)
    with written(weight_source, folder):
        return {key: array for file in folder.glob("*.safetensors") for key, array in load_file(file).items()}


def base(root: Path, part: str) -> dict[str, Array]:
    from safetensors.numpy import load_file

    (file,) = (root / part).glob("*.safetensors")
    return load_file(file)


def formula(weight: Array, row: Factors, strength: float) -> Array:
    """W + strength * alpha / rank * up down, with a convolution's factors multiplied as a convolution of the two is."""
    up, down = row.up.astype(np.float64), row.down.astype(np.float64)
    product = np.tensordot(up.reshape(up.shape[0], row.rank), down, axes=1)
    return np.asarray(weight + strength * row.alpha / row.rank * product)


def check_fused(root: Path, found: dict[str, Array], part: str, changes: list[tuple[Factors, float]]) -> None:
    expected = {key: array.astype(np.float64) for key, array in base(root, part).items()}
    touched = set()
    for row, strength in changes:
        if row.part == part:
            key = f"{row.module}.weight"
            expected[key] = formula(expected[key], row, strength)
            touched.add(key)
    assert touched
    assert set(found) == set(expected)
    for key, array in found.items():
        assert array.dtype == np.float32
        if key in touched:
            np.testing.assert_allclose(array, expected[key], atol=CLOSE)
        else:
            np.testing.assert_array_equal(array, expected[key])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_means_the_published_formula(
    sd1_checkpoint: Path, factors: list[Factors], writer: str, dtype: str, tmp_path: Path
) -> None:
    import torch

    file = save(tmp_path / "a.safetensors", WRITERS[writer](factors), dtype=getattr(torch, dtype))
    checkpoint = with_loras(sd1_checkpoint, (file, 0.7))
    rounded = factors
    if dtype == "bfloat16":  # what the file holds is the truth; peft's holds a product
        lora = read_lora(file)
        rounded = [as_read(lora, row) for row in factors]
    for part in ("unet", "text_encoder"):
        changes = [(row, 0.7) for row in rounded]
        check_fused(sd1_checkpoint, fused(checkpoint, part, tmp_path / part), part, changes)
    assert checkpoint.networks["vae_decoder"] == sd1_checkpoint / "vae"


def as_read(lora: LoraFile, row: Factors) -> Factors:
    """What a file in bfloat16 keeps of one module's factors, checked to be near them."""
    module = plain_module(row.module)
    names = lora.modules[row.part]
    if (module, "weight") not in names:
        key = unet_key(f"{row.module}.weight", layers=1, attended=(1,)).removesuffix(".weight")
        module = plain_module(key)
    change = lora.change(row.part, (module, "weight"))
    up, down = change.tensors["lora_up"], change.tensors["lora_down"]
    up = (up * np.float32(change.scale * row.rank / row.alpha)).reshape(row.up.shape)
    np.testing.assert_allclose(up, row.up, rtol=2**-7)
    np.testing.assert_allclose(down, row.down, rtol=2**-7)
    return Factors(part=row.part, module=row.module, down=down, up=up, alpha=row.alpha)


def test_attention_processors_mean_the_published_formula(sd1_checkpoint: Path, tmp_path: Path) -> None:
    modules = {module: rank for module, rank in UNET.items() if ".attn" in module}
    rows = make_factors(sd1_checkpoint, seed=4, unet=modules)
    rows = [row for row in rows if "mlp" not in row.module]
    checkpoint = with_loras(sd1_checkpoint, (save(tmp_path / "a.safetensors", processors(rows)), 1.5))
    for part in ("unet", "text_encoder"):
        check_fused(sd1_checkpoint, fused(checkpoint, part, tmp_path / part), part, [(row, 1.5) for row in rows])


def test_alphas_are_read_from_what_peft_says_of_its_training(
    sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path
) -> None:
    checkpoint = with_loras(sd1_checkpoint, (save_with_adapter_metadata(tmp_path / "a.safetensors", factors), 1.0))
    for part in ("unet", "text_encoder"):
        found = fused(checkpoint, part, tmp_path / part)
        check_fused(sd1_checkpoint, found, part, [(row, 1.0) for row in factors])


@pytest.mark.parametrize("stabilised", [False, True])
def test_pefts_own_directory_has_its_alpha_in_another_file(
    sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path, stabilised: bool
) -> None:
    rows = [row for row in factors if row.part == "unet"]
    tensors = {}
    for row in rows:
        tensors[f"base_model.model.{row.module}.lora_A.weight"] = row.down
        tensors[f"base_model.model.{row.module}.lora_B.weight"] = row.up
    file = save(tmp_path / "adapter_model.safetensors", tensors)
    assert "adapter_config.json" in refusal(sd1_checkpoint, file)
    config = adapter_metadata(rows, prefix=False) | {"use_rslora": stabilised}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = fused(with_loras(sd1_checkpoint, (file, 1.0)), "unet", tmp_path / "unet")
    changes = [(row, row.rank**0.5 if stabilised else 1.0) for row in rows]
    check_fused(sd1_checkpoint, found, "unet", changes)


sizes = st.integers(1, 6)


@given(rank=st.integers(1, 4), outputs=sizes, inputs=sizes, kernel=st.sampled_from([1, 3]), mid=st.booleans())
def test_a_convolutions_change_is_the_convolution_of_its_factors(
    tmp_path_factory: pytest.TempPathFactory, rank: int, outputs: int, inputs: int, kernel: int, mid: bool
) -> None:
    """down, then LyCORIS' convolution between the two where there is one, then up: torch runs the three in turn."""
    import torch
    from torch.nn.functional import conv2d

    generator = torch.Generator().manual_seed(rank + 10 * outputs + 100 * inputs)
    factors = {
        "down": torch.randn(rank, inputs, *((1, 1) if mid else (kernel, kernel)), generator=generator),
        "up": torch.randn(outputs, rank, 1, 1, generator=generator),
        **({"mid": torch.randn(rank, rank, kernel, kernel, generator=generator)} if mid else {}),
    }
    tensors = {f"lora_unet_conv_in.lora_{role}.weight": tensor.numpy() for role, tensor in factors.items()}
    file = save(tmp_path_factory.mktemp("lora") / "a.safetensors", tensors | {"lora_unet_conv_in.alpha": np.array(3.0)})
    lora = read_lora(file)
    shape = (outputs, inputs, kernel, kernel)
    assert lora.match("unet", {"conv_in.weight": shape}) == {"conv_in.weight": Match(target=("conv_in", "weight"))}
    delta = torch.from_numpy(lora.change("unet", ("conv_in", "weight")).added(np.ones(shape, np.float32), strength=2.0))
    pixels = torch.randn(1, inputs, 7, 7, generator=generator)
    expected = conv2d(pixels, factors["down"])
    if mid:
        expected = conv2d(expected, factors["mid"])
    expected = conv2d(expected, factors["up"]) * (2.0 * 3.0 / rank)
    torch.testing.assert_close(conv2d(pixels, delta), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config", [{"cross_attention_dim": 768}, SD2, XL, REFINER], ids=["sd1", "sd2", "xl", "refiner"]
)
def test_every_original_name_of_a_unet_means_its_own_weight(config: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    attended = [number for number, kind in enumerate(unet.config["up_block_types"]) if "Attn" in kind]
    tensors, expected = {}, {}
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) > 1:
            name = unet_key(key, layers=2, attended=attended).removesuffix(".weight").replace(".", "_")
            tensors[f"lora_unet_{name}.lora_down.weight"] = (1, *shape[1:])
            tensors[f"lora_unet_{name}.lora_up.weight"] = (shape[0], 1, *(1 for _ in shape[2:]))
            expected[key] = Match(target=(name, "weight"))
    found = read_lora(save_header(tmp_path / "a.safetensors", tensors)).match("unet", shapes)
    assert found == expected
    assert len(found) > 250


def test_names_that_are_not_original_stay_as_they_are() -> None:
    for name in ("down_blocks_0_resnets_0_conv1", "time_embedding_linear_1", "conv_in", "encoder_layers_0_mlp_fc1"):
        assert from_original(name, resnets=2) == name


def test_the_order_of_several_does_not_matter(sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", kohya(factors))
    second = save(tmp_path / "b.safetensors", peft(make_factors(sd1_checkpoint, seed=9)))
    third = (save(tmp_path / "c.safetensors", peft(make_factors(sd1_checkpoint, seed=10))), -0.25)
    one = with_loras(sd1_checkpoint, (first, 0.5), (second, 0.25), third)
    other = with_loras(sd1_checkpoint, third, (second, 0.25), (first, 0.5))
    assert (one.hashes(), one.options) == (other.hashes(), other.options)
    weights = [fused(checkpoint, "unet", tmp_path / "unet") for checkpoint in (one, other)]
    for key, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][key])
    changes = [(row, 0.5) for row in factors]
    changes += [(row, 0.25) for row in make_factors(sd1_checkpoint, seed=9)]
    changes += [(row, -0.25) for row in make_factors(sd1_checkpoint, seed=10)]
    check_fused(sd1_checkpoint, weights[0], "unet", changes)


def test_strengths_and_files_are_part_of_what_was_exported(
    sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path
) -> None:
    file = save(tmp_path / "style.safetensors", kohya(factors))
    first, second = (with_loras(sd1_checkpoint, (file, strength)) for strength in (0.5, 0.75))
    assert first.options == {"lora/1-style.safetensors": "0.5"}
    assert second.options == {"lora/1-style.safetensors": "0.75"}
    assert first.files["lora/1-style.safetensors"] == file


def test_a_lora_fits_a_single_file_and_a_directory_alike(
    sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path
) -> None:
    lora = save(tmp_path / "a.safetensors", kohya(factors))
    file = save_single_file(sd1_checkpoint, tmp_path / "model.safetensors")
    for part in ("unet", "text_encoder"):
        ours = fused(with_loras(file, (lora, 0.5), config=str(sd1_checkpoint)), part, tmp_path / "x")
        theirs = fused(with_loras(sd1_checkpoint, (lora, 0.5)), part, tmp_path / "x")
        assert set(ours) == set(theirs)
        for key, array in theirs.items():
            np.testing.assert_array_equal(ours[key], array)


def test_a_change_smaller_than_float16_can_tell_is_kept() -> None:
    import torch

    weight = torch.ones(2, 2, dtype=torch.float16)
    factors = {"lora_up": np.ones((2, 1), np.float32), "lora_down": np.full((1, 2), 1e-5, np.float32)}
    change = Change(kind=KIND_OF["lora_up"], tensors=factors)
    found = fuse(weight, [lambda base: change.added(base, strength=1.0)])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), 1.00001, rtol=1e-7)
    np.testing.assert_array_equal(weight.numpy(), np.ones((2, 2)))


def test_written_shards_are_read_as_one(
    sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.export.networks import conversion, loading

    checkpoint = with_loras(sd1_checkpoint, (save(tmp_path / "a.safetensors", kohya(factors)), 0.5))
    weight_source = checkpoint.networks["unet"]
    assert isinstance(weight_source, WeightSource)
    loaded = []
    for size in (1 << 30, 100_000):
        monkeypatch.setattr(conversion, "SHARD_BYTES", size)
        with written(weight_source, tmp_path / "unet") as folder:
            assert (len(list(folder.glob("*.safetensors"))) > 1) == (size < 1 << 30)
            loaded.append(loading.load("unet", folder).state_dict())
    for key, tensor in loaded[0].items():
        np.testing.assert_array_equal(tensor.numpy(), loaded[1][key].numpy())


def refusal(root: Path, *files: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        with_loras(root, *((file, 1.0) for file in files), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pair(name: str, inputs: int = 16, outputs: int = 16, rank: int = 2) -> Tensors:
    down, up = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UP = f"{TO_Q}.lora_up.weight"
REFUSED: dict[str, tuple[Tensors, str]] = {
    "a module of another model": (
        pair(TO_Q) | pair("lora_unet_down_blocks_7_attentions_0_proj_in"),
        r" 1 .* 2 .*\(down_blocks_7_attentions_0_proj_in\)",
    ),
    "another width": (pair(TO_Q, inputs=32), r"\(2, 32\) .*\(16, 2\).*to_q\.weight"),
    "two ranks": (pair(TO_Q) | {UP: np.zeros((16, 3), np.float32)}, r"\(2, 16\) .*\(16, 3\)"),
    "rank zero": (pair(TO_Q, rank=0), r"\(0, 16\) .*\(16, 0\)"),
    "no up": ({f"{TO_Q}.lora_down.weight": np.zeros((2, 16), np.float32)}, "lora_up"),
    "only an alpha": ({f"{TO_Q}.alpha": np.zeros(())}, "'.*alpha'"),
    "two alphas": (pair(TO_Q) | {f"{TO_Q}.alpha": np.zeros(2)}, r"alpha .*\(2,\)"),
    "a second text encoder": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "text_encoder_2"),
    "another network": (pair("lora_transformer_single_blocks_0"), " transformer,"),
    "no lora": ({"x.weight": np.zeros((2, 2), np.float32)}, r"'x\.weight'"),
    "nothing": ({}, r"a\.safetensors'"),
    "half a loha": ({f"{TO_Q}.hada_w1_a": np.zeros((2, 2))}, "hada_w1_b .*hada_w2_b .*hada_w2_a"),
    "half a lokr": ({f"{TO_Q}.lokr_w1": np.zeros((2, 2))}, "lokr_w2_b .*lokr_w2_a"),
    "two kinds at once": (pair(TO_Q) | {f"{TO_Q}.hada_w1_a": np.zeros((2, 2))}, "LoHa .*LoRA"),
    "magnitudes alone": ({f"{TO_Q}.dora_scale": np.zeros((2, 2))}, "'.*dora_scale'"),
    "magnitudes of another shape": (pair(TO_Q) | {f"{TO_Q}.dora_scale": np.zeros((2, 2))}, r"\(2, 2\)"),
    "magnitudes twice": (
        pair(TO_Q) | {f"{TO_Q}.{name}": np.ones((16, 1)) for name in ("dora_scale", "lora_magnitude_vector")},
        "'.*(dora_scale|lora_magnitude_vector)' .*LoRA",
    ),
    "a scaled difference": (
        {f"{TO_Q}.diff": np.zeros((16, 16)), f"{TO_Q}.alpha": np.zeros(())},
        "alpha' .*difference",
    ),
    "a bias that is not there": (pair(TO_Q) | {f"{TO_Q}.diff_b": np.zeros(16)}, r"\(.*_to_q\.bias\)"),
    "oft": ({f"{TO_Q}.oft_blocks": np.zeros((2, 2, 2))}, "OFT"),
    "glora": ({f"{TO_Q}.{name}.weight": np.zeros((2, 2)) for name in ("a1", "a2", "b1", "b2")}, "GLoRA"),
    "ia3": ({f"{TO_Q}.weight": np.zeros(16), f"{TO_Q}.on_input": np.zeros(())}, "IA3"),
    "learned words": (pair(TO_Q) | {"bundle_emb.cat.clip_l": np.zeros((1, 32))}, r"'bundle_emb\.cat\.clip_l'"),
    "biases of a lora": (
        {f"unet.x.lora_{name}": np.zeros((2, 2)) for name in ("A.weight", "B.weight", "B.bias")},
        r"'unet\.x\.lora_B\.bias'",
    ),
    "several adapters": (
        {f"unet.x.lora_A.{name}.weight": np.zeros((2, 2)) for name in ("a", "b")},
        r"\(a, b\)",
    ),
    "the same twice": (
        pair(TO_Q) | {f"{TO_Q}.lora_A.weight": np.zeros((2, 16), np.float32)},
        r"lora_A\.weight' .*lora_down\.weight'|lora_down\.weight' .*lora_A\.weight'",
    ),
    "one weight by two names": (
        pair(TO_Q) | pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
        r"to_q\.weight .*input_blocks_1_1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(sd1_checkpoint: Path, name: str, tmp_path: Path) -> None:
    tensors, words = REFUSED[name]
    assert re.search(words, refusal(sd1_checkpoint, save(tmp_path / "a.safetensors", tensors)))


def test_both_text_encoders_of_sdxl_are_changed(tmp_path: Path) -> None:
    """Their modules have the same names; kohya tells them apart by te1 and te2."""
    root = save_tiny(tmp_path / "checkpoint", family="sdxl")
    generator, rows = np.random.default_rng(1), []
    for part, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        down, up = (generator.uniform(-1, 1, size).astype(np.float32) for size in ((2, width), (width, 2)))
        module = "text_model.encoder.layers.0.self_attn.k_proj"
        rows.append(Factors(part=part, module=module, down=down, up=up, alpha=1.0))
    tensors: Tensors = {}
    for row, name in zip(rows, ("lora_te1", "lora_te2"), strict=True):
        start = f"{name}_{row.module.replace('.', '_')}"
        tensors |= {f"{start}.lora_down.weight": row.down, f"{start}.lora_up.weight": row.up}
        tensors[f"{start}.alpha"] = np.array(row.alpha)
    checkpoint = with_loras(root, (save(tmp_path / "a.safetensors", tensors), 0.5))
    for row in rows:
        check_fused(root, fused(checkpoint, row.part, tmp_path / row.part), row.part, [(row, 0.5)])
    assert checkpoint.networks["unet"] == root / "unet"


def test_what_it_was_made_for_is_told_where_the_file_says_it(sd1_checkpoint: Path, tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    tensors = pair("lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q", 640, 640)
    file = save(tmp_path / "a.safetensors", tensors, metadata=metadata)
    assert "sdxl_base_v1-0" in refusal(sd1_checkpoint, file)


def test_a_lora_for_another_checkpoint_is_refused_for_a_single_file_too(sd1_checkpoint: Path, tmp_path: Path) -> None:
    file = save_single_file(sd1_checkpoint, tmp_path / "model.safetensors")
    lora = save(tmp_path / "a.safetensors", pair("lora_unet_down_blocks_7_attentions_0_proj_in"))
    weight_source = with_loras(file, (lora, 1.0), config=str(sd1_checkpoint)).networks["unet"]
    assert isinstance(weight_source, WeightSource)
    with (
        pytest.raises(CheckpointError, match=r"\(down_blocks_7_attentions_0_proj_in\)"),
        written(weight_source, tmp_path / "unet"),
    ):
        pass


def test_files_that_are_none_are_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    assert "FILE:SCALE" in refusal(sd1_checkpoint, tmp_path / "absent.safetensors")
    (tmp_path / "a.pt").write_bytes(b"x")
    assert "a.pt'" in refusal(sd1_checkpoint, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"x")
    assert str(tmp_path / "b.safetensors") in refusal(sd1_checkpoint, tmp_path / "b.safetensors")


def test_graphs_of_optimum_cannot_be_changed(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sd1_bundle / "onnx", tmp_path / "graphs"))
    assert re.search("^--lora .*optimum", refusal(root, save(tmp_path / "a.safetensors", pair(TO_Q))))


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir:x/a.safetensors:-1", "dir:x/a.safetensors", -1.0),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
    ],
)
def test_a_file_and_its_strength_are_written_as_one_word(text: str, path: str, strength: float) -> None:
    assert LoraOption.parse(text) == LoraOption(path=path, strength=strength)


@pytest.mark.parametrize("text", ["a.safetensors:nan", "a.safetensors:inf", ":0.5"])
def test_strengths_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=f"^--lora '{text}': "):
        LoraOption.parse(text)


def add_hooks(pipe: Any, changes: list[tuple[Factors, float]]) -> None:
    """Have diffusers' own modules add strength * alpha / rank * up(down(x)) to what they give: nothing is fused."""
    import torch
    from torch import nn

    def hook(row: Factors, strength: float) -> Any:
        down, up = torch.from_numpy(row.down), torch.from_numpy(row.up)

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(module, nn.Conv2d):
                low = nn.functional.conv2d(inputs[0], down, stride=module.stride, padding=module.padding)
                high = nn.functional.conv2d(low, up)
            else:
                high = inputs[0] @ down.T @ up.T
            return output + strength * row.alpha / row.rank * high

        return add

    for row, strength in changes:
        network = getattr(pipe, row.part)
        name = row.module if row.part == "unet" else row.module.removeprefix("text_model.")
        modules = dict(network.named_modules())
        (modules.get(name) or modules[row.module]).register_forward_hook(hook(row, strength))


def test_pictures_are_those_of_diffusers_with_the_same_loras(
    sd1_checkpoint: Path, factors: list[Factors], tmp_path: Path
) -> None:
    """From a single file and two LoRAs in two formats, through the whole export, at least 50 dB."""
    first = save(tmp_path / "a.safetensors", kohya(factors))
    others = make_factors(sd1_checkpoint, seed=9)
    second = save(tmp_path / "b.safetensors", peft(others))
    file = save_single_file(sd1_checkpoint, tmp_path / "model.safetensors")
    loras = (LoraOption(path=str(second), strength=-0.5), LoraOption(path=str(first), strength=0.75))
    options = CheckpointOptions(config=str(sd1_checkpoint), loras=loras)
    exported = export_checkpoint(str(file), tmp_path / "bundle", precision="fp32", options=options)
    assert sorted(exported.manifest.provenance.options.values()) == ["-0.5", "0.75"]
    assert {"model.safetensors", "config/unet/config.json"} < set(exported.manifest.provenance.files)
    assert exported.manifest.tokenizers["tokenizer"].max_length == 77
    reference = Reference(sd1_checkpoint)
    calls = [("euler", 3.0), ("lcm", 1.0), ("lcm", 1.5)]  # LCM-LoRA is used with its sampler and little guidance
    without = reference("euler", [3, 4], guidance_scale=3.0, num_inference_steps=4)
    add_hooks(reference.pipe, [(row, 0.75) for row in factors] + [(row, -0.5) for row in others])
    with Pipeline.load(tmp_path / "bundle", "cpu") as pipe:
        for sampler, guidance in calls:
            expected = reference(sampler, [3, 4], guidance_scale=guidance, num_inference_steps=4)
            request: dict[str, Any] = {"negative_prompt": NEGATIVE, "sampler": sampler, "guidance": guidance}
            found = pipe(PROMPT, n=2, seed=3, steps=4, **request).pixels
            for ours, theirs, plain in zip(found, expected, without, strict=True):
                assert psnr(ours, theirs) >= LIMITS["random"]
                assert psnr(ours, plain) < LIMITS["random"] - 20  # the changes are visible
                assert len(np.unique(ours)) > 16


def test_every_kind_of_layer_is_in_these_tests(sd1_checkpoint: Path) -> None:
    assert {len(row.down.shape) for row in make_factors(sd1_checkpoint, seed=0)} == {2, 4}
    assert {row.part for row in make_factors(sd1_checkpoint, seed=0)} == {"unet", "text_encoder"}
    assert len(TEXT) == 3
