"""Engines with fixed shapes are compared in every profile: real graphs, on the stand-in for TensorRT."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from latentrt.engines.backends import BACKENDS, Opened, Opening
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle, record_file, write_manifest
from latentrt.engines.compare import relative_error
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.find import find_engines
from latentrt.engines.onnxruntime import keys
from latentrt.engines.spec import Array, Engine, EngineSpec, Inputs, TensorSpec
from latentrt.engines.verify.canonical_view import as_canonical
from latentrt.engines.verify.references import (
    distinct_sizes,
    read_arrays,
    read_golden,
    read_references,
    reference_file,
)
from latentrt.engines.verify.verify import Row, verify
from tests.stand_in import install

OPTIONS = BuildOptions(sizes=((32, 32), (64, 32)), batches=(1, 2))


class Broken:
    """A stage that is wrong in the last row of two guided pictures."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.spec = engine, engine.spec

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        outputs = {name: array.copy() for name, array in self.engine(inputs).items()}
        guidance = np.asarray(inputs["guidance"])
        if guidance.shape == (2, 4) and guidance[1, 3]:
            outputs["next_state"][1, 0] *= 0.9
        return outputs

    def close(self) -> None: ...
    def __enter__(self) -> Broken:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with TensorRT, but that the engines' graphs run on ONNX Runtime."""
    install(monkeypatch, tensorrt="11.4.0.106")


def built(bundle: Path, tmp_path: Path) -> Bundle:
    opened = Bundle.open(shutil.copytree(bundle, tmp_path / "bundle"))
    build_engines(opened, "tensorrt", options=OPTIONS)
    return opened


def rows_of(bundle: Bundle) -> list[Row]:
    return [row for row in verify(bundle, backend="tensorrt") if row.what != "files"]


@pytest.mark.parametrize("name", ["sd1_bundle", "sd1_half_bundle"])
def test_every_profile_is_compared_and_agrees(
    name: str, stand_in: None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rows = rows_of(built(request.getfixturevalue(name), tmp_path))
    assert all(row.ok for row in rows), rows
    unet = [row.profile for row in rows if row.what == "unet"]
    assert len(unet) == 8 and unet[-1] == "pictures 2, rows 4, tokens 77, latent_height 8, latent_width 16"
    assert {row.what: sum(other.what == row.what for other in rows) for row in rows} == {
        "text_encoder": 3,
        "unet": 8,
        "vae_decoder": 4,
        "vae_encoder": 4,
    }


def test_a_profile_that_computes_something_else_is_named(
    stand_in: None, sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel of one profile is wrong, and only for the rows without a prompt: nothing else may be blamed."""
    whole = BACKENDS["tensorrt"].open

    def open_broken(opening: Opening) -> Opened:
        opened = whole(opening)
        if "unet" in opened.engines:
            opened.engines["unet"] = Broken(opened.engines["unet"])
        return opened

    bundle = built(sd1_bundle, tmp_path)
    monkeypatch.setitem(BACKENDS, "tensorrt", replace(BACKENDS["tensorrt"], open=open_broken))
    bad = [row for row in rows_of(bundle) if not row.ok]
    assert {row.what for row in bad} == {"unet"}
    assert len(bad) == 2 and all("rows 4" in row.profile for row in bad)
    assert all(row.error is not None and row.limit is not None and row.error > row.limit for row in bad)


def test_references_are_what_the_checkpoint_computes(
    stand_in: None, sd1_bundle: Path, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    bundle = built(sd1_bundle, tmp_path)
    directory, record = find_engines(bundle, "tensorrt")
    inputs, expected = read_references(bundle, "unet", directory, record)[-1]
    assert inputs["sample"].shape == (1, 4, 8, 16)
    unet = UNet2DConditionModel.from_pretrained(sd1_checkpoint / "unet")
    with torch.no_grad():
        found = unet(**{name: torch.from_numpy(array) for name, array in inputs.items()}).sample.numpy()
    assert relative_error(found, expected["out_sample"]) < 1e-5


def test_where_the_golden_pair_fits_it_is_the_reference(stand_in: None, sd1_bundle: Path, tmp_path: Path) -> None:
    bundle = built(sd1_bundle, tmp_path)
    directory, record = find_engines(bundle, "tensorrt")
    inputs, outputs = read_references(bundle, "text_encoder", directory, record)[0]
    golden = read_golden(bundle, "text_encoder")
    np.testing.assert_array_equal(inputs["input_ids"], golden[0]["input_ids"][:1])
    np.testing.assert_array_equal(outputs["last_hidden_state"], golden[1]["last_hidden_state"][:1])


def test_inputs_that_are_drawn_are_the_same_each_time_and_of_the_networks_own_kind(
    stand_in: None, sd1_bundle: Path, tmp_path: Path
) -> None:
    first, second = (built(sd1_bundle, tmp_path / name) for name in ("first", "second"))
    arrays = [load_file(find_engines(b, "tensorrt")[0] / reference_file("vae_encoder")) for b in (first, second)]
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name])
    sample = arrays[0]["1.input.sample"]
    assert sample.shape == (1, 3, 32, 64)
    assert -1 <= sample.min() < -0.9 and 0.9 < sample.max() <= 1 and len(np.unique(sample)) > 50


def test_one_reference_serves_every_batch_of_a_size(stand_in: None, sd1_bundle: Path, tmp_path: Path) -> None:
    bundle = built(sd1_bundle, tmp_path)
    spec = find_engines(bundle, "tensorrt")[1].specs["unet"]
    assert len(spec.profiles) == 8 and len(distinct_sizes(spec)) == 2


def test_without_references_the_engines_are_the_same_and_verify_says_what_is_missing(
    stand_in: None, sd1_bundle: Path, tmp_path: Path
) -> None:
    first, second = (Bundle.open(shutil.copytree(sd1_bundle, tmp_path / name)) for name in ("first", "second"))
    records = [
        build_engines(bundle, "tensorrt", options=replace(OPTIONS, references=wanted))
        for bundle, wanted in ((first, True), (second, False))
    ]
    assert records[0].key == records[1].key
    assert {name for name in records[0].files if name not in records[1].files} == {
        reference_file(component) for component in records[0].entries
    }
    assert all(not row.ok and reference_file(row.what) in row.message for row in rows_of(second))


def test_fused_engines_that_take_any_shape_are_compared_with_the_golden_pairs(
    sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime's engines for CUDA are, here on the CPU."""
    monkeypatch.setattr(keys, "FUSED", {"cpu"})
    bundle = Bundle.open(shutil.copytree(sd1_bundle, tmp_path / "bundle"))
    record = build_engines(bundle, "cpu", force=True)
    assert "state" in {tensor.name for tensor in record.specs["unet"].inputs}
    rows = [row for row in verify(bundle, backend="cpu") if row.what != "files"]
    assert len(rows) == 4 and all(row.ok and row.profile == "" for row in rows), rows


def spoil(bundle: Bundle, change: str) -> None:
    """Alter the references of the UNet; all but a plain alteration is recorded as if it had been built so."""
    directory, record = find_engines(bundle, "tensorrt")
    file = directory / reference_file("unet")
    files = dict(record.files)
    if change == "absent":
        del files[file.name]
    elif change == "other shapes":
        save_file({name: array[..., :4] for name, array in load_file(file).items()}, file)
        files[file.name] = record_file(directory, file.name)
    elif change == "no safetensors":
        file.write_bytes(b"\xff" * 100)
        files[file.name] = record_file(directory, file.name)
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    write_manifest(directory, msgspec.structs.replace(record, files=files))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("absent", r" unet\.references\.safetensors.*`latentrt build"),
        ("other shapes", r"/unet\.references\.safetensors.*`latentrt build"),
        ("no safetensors", r"/unet\.references\.safetensors .*\(.+\)"),
        ("altered", r"/unet\.references\.safetensors .*SHA-256"),
    ],
)
def test_references_that_cannot_be_used_are_one_sentence(
    change: str, told: str, stand_in: None, sd1_bundle: Path, tmp_path: Path
) -> None:
    bundle = built(sd1_bundle, tmp_path)
    spoil(bundle, change)
    bad = [row for row in rows_of(bundle) if not row.ok]
    assert len(bad) == 1 and re.search(told, bad[0].message)
    with pytest.raises(BundleError, match=told):
        read_references(bundle, "unet", *find_engines(bundle, "tensorrt"))


@dataclass
class Recorder:
    """A fused stage that gives back its state, and remembers what it was given."""

    spec: EngineSpec
    given: list[dict[str, Array]] = field(default_factory=list)

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        self.given.append({name: np.asarray(array) for name, array in inputs.items()})
        return {"next_state": self.given[-1]["state"]}

    def close(self) -> None: ...
    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None: ...


def stage_spec(*further: TensorSpec) -> EngineSpec:
    picture: tuple[int | str, ...] = (4, "latent_height", "latent_width")
    shapes: dict[str, tuple[int | str, ...]] = {
        "state": ("pictures", 3, *picture),
        "control": ("pictures", 4 + 3 + 15),
        "noise": ("pictures", *picture),
        "guidance": ("pictures", "rows"),
        "keep_mask": ("pictures", 1, *picture[1:]),
        "known": ("pictures", 2, *picture),
    }
    inputs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()]
    inputs.append(TensorSpec(name="picture_of_row", dtype="int64", shape=("rows",)))
    return EngineSpec(component="unet", inputs=(*inputs, *further), outputs=())


def test_what_the_stage_takes_besides_has_no_effect(sd1_bundle: Path) -> None:
    """An inpainting UNet takes more channels than it gives; what this module does not know is zeros."""
    further = (
        TensorSpec(name="condition", dtype="float32", shape=("pictures", 5, "latent_height", "latent_width")),
        TensorSpec(name="pose", dtype="float32", shape=("pictures", 7)),
        TensorSpec(name="text_embeds", dtype="float16", shape=("rows", 6)),
    )
    stage = Recorder(stage_spec(*further))
    unet = as_canonical(stage, Bundle.open(sd1_bundle).manifest.latents, pictures=2)
    draw = np.random.default_rng(0).standard_normal
    sample = np.tile(draw((2, 9, 2, 2)).astype(np.float32), (2, 1, 1, 1))
    text = draw((4, 6)).astype(np.float16)
    unet({"sample": sample, "timestep": np.array([7.0]), "text_embeds": text})
    assert len(stage.given) == 2
    for turn, given in enumerate(stage.given):
        np.testing.assert_array_equal(given["state"][:, 0], sample[:2, :4])
        np.testing.assert_array_equal(given["condition"], sample[:2, 4:])
        np.testing.assert_array_equal(given["text_embeds"], text)
        np.testing.assert_array_equal(given["guidance"], np.eye(2, 4, k=2 * turn))
        np.testing.assert_array_equal(given["picture_of_row"], [0, 1, 0, 1])
        np.testing.assert_array_equal(given["control"][:, 0], [7, 7])
        assert given["keep_mask"].min() == 1 and not given["known"].any() and not given["noise"].any()
        assert not given["pose"].any() and given["pose"].shape == (2, 7)


def test_rows_that_belong_to_no_picture_are_refused(sd1_bundle: Path) -> None:
    unet = as_canonical(Recorder(stage_spec()), Bundle.open(sd1_bundle).manifest.latents, pictures=2)
    with pytest.raises(EngineError, match=r" 3 .*r % 2"):
        unet({"sample": np.zeros((3, 4, 2, 2)), "timestep": np.zeros(3)})


def test_arrays_of_a_file_are_writable_and_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["input.timestep", "output.sample", "input.hidden", "input.sample"]
    written = {name: np.full(3, number, np.float32) for number, name in enumerate(names)}
    save_file(written, tmp_path / "golden.safetensors")
    arrays = read_arrays(tmp_path / "golden.safetensors")
    assert list(arrays) == sorted(names)
    assert all(np.array_equal(arrays[name], written[name]) and arrays[name].flags.writeable for name in names)
