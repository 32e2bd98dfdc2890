"""Attacks on a bundle's files, each refused in one sentence, and the laws of writing one."""

from __future__ import annotations

import errno
import functools
import json
import re
import shlex
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.bundle import files as bundles
from latentrt.engines.bundle.files import (
    Bundle,
    disk_errors,
    inside,
    manifest_from_json,
    manifest_to_json,
    record_file,
    write_manifest,
)
from latentrt.engines.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    ComponentSpec,
    DenoiserSpec,
    LatentSpec,
    Manifest,
    Provenance,
    Role,
    TokenizerSpec,
)
from latentrt.engines.bundle.parsing import json_schema
from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import BundleError
from latentrt.engines.spec import TensorSpec
from tests.refused import caused_by

ROOT = Path(__file__).parent.parent


def write_bundle(root: Path) -> Manifest:
    """Write the smallest directory that is a bundle: every file is there and says nothing."""
    components: dict[str, Role] = {"unet": "denoiser", "vae_decoder": "decoder", "vae_encoder": "encoder"}
    graphs = {name: (f"onnx/{name}/model.onnx", f"golden/{name}.safetensors") for name in components}
    names = (*(file for files in graphs.values() for file in files), "tokenizer/tokenizer.json")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the content of {name}")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        producer="test",
        family="sd1",
        precision="fp32",
        provenance=Provenance(checkpoint="none", files={}, tools={}),
        components={
            name: ComponentSpec(
                role=role,
                files=(graphs[name][0],),
                golden=graphs[name][1],
                inputs=(TensorSpec(name="sample", dtype="float32", shape=("batch", 4, "height", "width")),),
                outputs=(TensorSpec(name="out_sample", dtype="float32", shape=("batch", 4, "height", "width")),),
                weights_bytes=12,
            )
            for name, role in components.items()
        },
        denoisers={"unet": DenoiserSpec(text_encoders=())},
        tokenizers={"tokenizer": TokenizerSpec(file=names[-1], max_length=77, begin_id=0, end_id=1, pad_id=1)},
        schedule=TrainingSchedule(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        latents=LatentSpec(channels=4, factor=8, scaling_factor=0.18215),
        default_size=(512, 512),
        files={name: record_file(root, name) for name in names},
    )
    write_manifest(root, manifest)
    return manifest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(root: Path, **changes: object) -> None:
    document = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps(document | changes))


def test_a_manifest_survives_the_way_to_disk_and_back(root: Path) -> None:
    manifest = Bundle.open(root).manifest
    assert manifest_from_json(manifest_to_json(manifest), where="here") == manifest


def test_every_file_of_a_whole_bundle_passes_both_checks(root: Path) -> None:
    opened = Bundle.open(root)
    for name in opened.manifest.files:
        assert opened.path(name, check="size") == opened.path(name, check="hash") == root / name


def test_a_manifest_from_the_future_is_refused_by_its_version_alone(root: Path) -> None:
    edit(root, schema_version=SCHEMA_VERSION + 1, something_new=True)
    with pytest.raises(BundleError, match=rf"manifest\.json\D+{SCHEMA_VERSION + 1}\D+{SCHEMA_VERSION}\b"):
        Bundle.open(root)


@pytest.mark.parametrize(
    ("where", "value", "path"),
    [
        (("components", "unet", "inputs", 0, "dtype"), "f16", "$.components.unet.inputs[0].dtype: "),
        (("components", "unet", "surprise"), 1, "$.components.unet.surprise: "),
        (("components", "vae_decoder"), None, "$.components.vae_decoder: "),
        (("schedule", "sampler"), {"name": "ddim", "order": 4}, "$.schedule.sampler.order: "),
        (("files", "a\0b"), 1, "$.files.a\\x00b: "),
        (("latents", "factor"), 8.0, "$.latents.factor: "),
    ],
)
def test_what_is_wrong_deep_in_a_manifest_is_named_by_its_whole_path(
    root: Path, where: tuple[str | int, ...], value: object, path: str
) -> None:
    """msgspec itself says `$.components[...]`, of whichever component."""
    document = json.loads((root / MANIFEST).read_text())
    *outer, last = where
    functools.reduce(lambda part, step: part[step], outer, document)[last] = value
    with pytest.raises(BundleError) as caught:
        manifest_from_json(json.dumps(document), where="manifest.json")
    assert str(caught.value).startswith(f"manifest.json {path}") and str(caught.value).isprintable()


def test_the_written_schema_of_the_manifest_is_current(root: Path) -> None:
    """docs/manifest.schema.json is `json.dumps(json_schema(Manifest), indent=1)`."""
    schema = json.loads((ROOT / "docs" / "manifest.schema.json").read_text())
    assert schema == json.loads(json.dumps(json_schema(Manifest)))
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads((root / MANIFEST).read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"surprise": 1}, schema)


@pytest.mark.parametrize("name", ["a checkpoint", "a checkpoint/model.safetensors"], ids=["a directory", "a file"])
def test_what_is_no_bundle_is_told_how_it_becomes_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "a checkpoint").mkdir()
    (tmp_path / "a checkpoint" / "model.safetensors").touch()
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / name)
    assert shlex.split(str(caught.value).split("`")[1]) == ["latentrt", "export", str(tmp_path / name), "BUNDLE"]


def test_a_directory_without_a_manifest_and_no_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"\bmanifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match=r"`latentrt export CHECKPOINT .*nowhere`"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": "1"}', "\x00"])
def test_what_is_no_manifest_is_refused_and_the_file_is_named(root: Path, text: str) -> None:
    (root / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(root)


def test_bytes_that_are_no_text_are_refused(root: Path) -> None:
    (root / MANIFEST).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(BundleError, match="UTF-8"):
        Bundle.open(root)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("family", "sd9", r"\$\.family: .*sd9.* sd1, sd2, sd3, sdxl"),
        ("surprise", 1, r"\$\.surprise: "),
        ("default_size", [512], r"\$\.default_size: "),
        ("default_size", [512, True], r"\$\.default_size\[1\]: .*int"),
        ("default_size", [512, -8], "default_size"),
        ("precision", 16, r"\$\.precision: .*str"),
    ],
)
def test_a_wrong_entry_is_named_by_its_path(root: Path, key: str, value: object, message: str) -> None:
    edit(root, **{key: value})
    with pytest.raises(BundleError, match=message):
        Bundle.open(root)


def test_a_manifest_from_before_errors_were_recorded_is_read(root: Path) -> None:
    document = json.loads((root / "manifest.json").read_text())
    for name in ("error", "float32_layers", "largest_activation"):
        del document["components"]["unet"][name]
    (root / "manifest.json").write_text(json.dumps(document))
    unet = Bundle.open(root).manifest.components["unet"]
    assert (unet.error, unet.float32_layers, unet.largest_activation) == (None, (), None)


def test_a_missing_entry_is_named(root: Path) -> None:
    document = json.loads((root / MANIFEST).read_text())
    del document["latents"]["factor"]
    (root / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"\$\.latents\.factor: "):
        Bundle.open(root)


def test_a_truncated_file_is_refused_without_hashing(root: Path) -> None:
    (root / "onnx/unet/model.onnx").write_text("short")
    with pytest.raises(BundleError, match=r"onnx/unet/model\.onnx\D+5\D+35\b"):
        Bundle.open(root).path("onnx/unet/model.onnx", check="size")


def test_an_altered_file_of_the_same_size_is_refused_by_its_hash(root: Path) -> None:
    file = root / "onnx/unet/model.onnx"
    file.write_text(file.read_text().replace("content", "CONTENT"))
    with pytest.raises(BundleError, match=r"onnx/unet/model\.onnx.*SHA-256"):
        Bundle.open(root).path("onnx/unet/model.onnx", check="hash")


def test_a_missing_file_is_refused(root: Path) -> None:
    (root / "onnx/unet/model.onnx").unlink()
    with pytest.raises(BundleError, match=r"onnx/unet/model\.onnx"):
        Bundle.open(root).path("onnx/unet/model.onnx")


def test_a_file_that_the_manifest_does_not_name_is_never_read(root: Path) -> None:
    (root / "extra.onnx").write_text("extra")
    with pytest.raises(BundleError, match=r"extra\.onnx"):
        Bundle.open(root).path("extra.onnx")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "onnx/../../secret", "", ".", "..\\secret"])
def test_a_path_that_leaves_the_bundle_is_refused(root: Path, path: str) -> None:
    (root.parent / "secret").write_text("secret")
    with pytest.raises(BundleError, match=re.escape(repr(path))):
        inside(root, path)


def test_a_link_that_leaves_the_bundle_is_refused(root: Path) -> None:
    (root.parent / "secret").write_text("secret")
    (root / "link").symlink_to(root.parent / "secret")
    with pytest.raises(BundleError, match="'link'"):
        inside(root, "link")


@given(st.text())
def test_no_text_at_all_leads_outside(text: str) -> None:
    root = Path("/somewhere/bundle")
    try:
        path = inside(root, text)
    except (BundleError, ValueError):  # ValueError: a NUL byte, which no file system takes
        return
    assert path.resolve().is_relative_to(root)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    manifest = write_bundle(tmp_path / "bundle")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BundleError, check=caused_by(errno.ENOSPC)):
        write_manifest(tmp_path / "bundle", msgspec.structs.replace(manifest, producer="other"))


def test_an_error_of_the_disk_that_has_no_sentence_of_its_own_says_what_the_system_says() -> None:
    with pytest.raises(BundleError, match=r"^x\b.* gone"), disk_errors(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_killed_write_of_the_manifest_leaves_the_old_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (root / MANIFEST).read_text()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(root, msgspec.structs.replace(Bundle.open(root).manifest, producer="other"))
    assert (root / MANIFEST).read_text() == before
