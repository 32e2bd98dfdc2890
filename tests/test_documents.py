"""Damaged JSON: whatever bytes stand in a bundle's or a checkpoint's documents, what comes of it is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.__main__ import main
from latentrt.engines.bundle.files import Bundle, engine_record_from_json, manifest_from_json
from latentrt.engines.bundle.manifest import MANIFEST
from latentrt.engines.bundle.parsing import ParseError, decode
from latentrt.engines.bundle.safetensors_header import read_header
from latentrt.engines.bundle.weight_map import GraphWeights, read_weights
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.sources.tokenizer import read_tokenizer

# What a document may hold instead of one of its values.
NASTY = [
    b"",
    b"\xff\xfe",
    b"\x00",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 30,
    b"9" * 5000,
    b'"\\ud800"',
    b'"\\u0000"',
    b"[" * 3000,
    b'{"a":' * 3000,
    b"[" * 900 + b"]" * 900,
    b'{"a": 1, "a": 2}',
    b"null",
    b"true",
    b'"../../../etc/passwd"',
    b'"' + b"a" * 5000 + b'"',
]
Change = Callable[[bytes], bytes]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Flip, cut, insert, repeat or replace some bytes of a document."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "drop", "value"]))
    place, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    new = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NASTY)))

    def change(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ new[0] if new else 0]) + content[at + 1 :]
        if kind == "cut":
            return content[:at]
        if kind == "drop":
            return content[:at] + content[at + length :]
        if kind == "insert":
            return content[:at] + new + content[at:]
        start = content.find(b": ", at) + 2  # a whole value, so that it stays JSON
        end = min(found for mark in (b",\n", b"\n") if (found := content.find(mark, start)) >= 0)
        return content[:start] + new + content[end:]

    return change


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line, which must refuse: exit code 2, nothing on stdout, and a sentence."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["latentrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (2, "")
        assert "Traceback" not in said.err
        return said.err.strip().splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def bundle(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(sd1_bundle, tmp_path_factory.mktemp("damaged") / "bundle"))


@pytest.mark.parametrize("document", ["manifest.json", "engine.json"])
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=changes())
def test_a_damaged_document_opens_or_is_refused_in_a_sentence(bundle: Path, document: str, change: Change) -> None:
    (file,) = bundle.rglob(document)
    whole = file.read_bytes()
    file.write_bytes(change(whole))
    try:
        opened = Bundle.open(bundle)
        for name in opened.manifest.files:
            opened.path(name)
        opened.engine_directories()
    except BundleError as error:
        assert str(error).isprintable() and str(error).encode("utf-8")
        assert len(str(error)) < 1000
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("nasty", [n for n in NASTY if n not in (b"", b"null")], ids=lambda nasty: repr(nasty[:12]))
def test_no_such_value_is_taken_for_a_size(bundle: Path, nasty: bytes) -> None:
    content = (bundle / MANIFEST).read_bytes()
    with pytest.raises(BundleError):
        manifest_from_json(content.replace(b'"factor": 4', b'"factor": ' + nasty), where="here")
    assert b'"scaling_factor": 0.18215' in content
    if nasty != b"9" * 30:  # too large for 64 bits, and for what is a float it would be a number like any other
        with pytest.raises(BundleError):
            manifest_from_json(content.replace(b'"scaling_factor": 0.18215', b'"scaling_factor": ' + nasty), where="x")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x80", b"[" * 100_000, b'{"schema_version": 1e999}', b"\xed\xa0\x80"]
)
def test_the_command_line_says_it_in_a_sentence(bundle: Path, content: bytes, refused: Callable[..., str]) -> None:
    for document in ("manifest.json", "engine.json"):
        (file,) = bundle.rglob(document)
        whole = file.read_bytes()
        file.write_bytes(content)
        try:
            assert str(file) in refused("inspect", bundle)
        finally:
            file.write_bytes(whole)


def test_an_engines_record_without_a_spec_is_refused(bundle: Path) -> None:
    (file,) = bundle.rglob("engine.json")
    document = json.loads(file.read_bytes())
    del document["specs"]["unet"]
    with pytest.raises(BundleError):
        engine_record_from_json(json.dumps(document), where="here")


@pytest.mark.parametrize("name", ["../unet", "a/b", "", "a\0", "é", ".."])
def test_a_component_is_named_so_that_files_can_be_named_for_it(bundle: Path, name: str) -> None:
    document = json.loads((bundle / MANIFEST).read_bytes())
    document["components"][name] = document["components"]["unet"]
    with pytest.raises(BundleError, match="components"):
        manifest_from_json(json.dumps(document), where="here")


def test_a_record_of_weights_is_read_as_strictly(tmp_path: Path) -> None:
    for content in (b"\xff", b"[" * 100_000, b"{}", b'{"weights": NaN}'):
        (tmp_path / "unet.json").write_bytes(content)
        with pytest.raises(BundleError):
            read_weights(tmp_path / "unet.json", GraphWeights)


def test_a_safetensors_header_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    header = b'{"a":' * 20_000
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "a.safetensors")


def test_other_peoples_documents_may_hold_what_theirs_do() -> None:
    """A scheduler of diffusers is saved with -Infinity, and a tokenizer with 1e30 as a whole number."""
    content = b'{"lambda_min_clipped": -Infinity, "model_max_length": 1000000000000000019884624838656, "a": 1, "a": 2}'
    found: Any = decode(content, strict=False)
    assert (found["lambda_min_clipped"], found["model_max_length"], found["a"]) == (float("-inf"), int(1e30), 2)
    with pytest.raises(ParseError):
        decode(content, strict=True)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{", b"[]", b'{"a": "\\ud800"}', b"9" * 5000])
@pytest.mark.parametrize(
    "document",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_a_checkpoints_damaged_document_is_refused(
    sd1_checkpoint: Path, tmp_path: Path, document: str, content: bytes, refused: Callable[..., str]
) -> None:
    copy = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    if "index.json" in document and "unet" in document:
        (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "other.safetensors")
    (copy / document).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(copy))
    assert document in str(caught.value) and str(caught.value).isprintable()
    assert document in refused("export", copy, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{", b"[]"])
@pytest.mark.parametrize("document", ["vocab.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizers_damaged_document_is_refused(
    sd1_checkpoint: Path, tmp_path: Path, document: str, content: bytes
) -> None:
    folder = Path(shutil.copytree(sd1_checkpoint / "tokenizer", tmp_path / "tokenizer"))
    (folder / document).write_bytes(content)
    with pytest.raises(CheckpointError, match=document):
        read_tokenizer(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a b c", b"#version: 0.2\nno such\n"])
def test_merges_that_are_none_are_refused(sd1_checkpoint: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(sd1_checkpoint / "tokenizer", tmp_path / "tokenizer"))
    (folder / "merges.txt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("model", [[], {}, {"merges": 1}, {"vocab": [], "merges": []}, 1])
def test_a_tokenizer_json_without_its_model_is_refused(tmp_path: Path, model: object) -> None:
    whole = {"type": "BPE", "end_of_word_suffix": "</w>", **model} if isinstance(model, dict) else model
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": whole}))
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(tmp_path)
    assert str(caught.value).isprintable()
