"""Building, finding, opening and running engines on ONNX Runtime's CPU, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from latentrt.engines import build as building
from latentrt.engines.backends import BACKENDS, Opened
from latentrt.engines.build import build_engines
from latentrt.engines.bundle.files import Bundle, Check
from latentrt.engines.bundle.manifest import ENGINE_RECORD, EngineRecord
from latentrt.engines.compare import relative_error, to_pixels
from latentrt.engines.errors import BundleError, EngineError, WrongMachineError
from latentrt.engines.find import choose, find_engines
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime import keys
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Engine, EngineKey
from latentrt.engines.verify.verify import read_golden, verify
from latentrt.engines.workspace.contract import WorkspaceShape


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_every_engine_computes_what_torch_computed(sd1_bundle: Path) -> None:
    rows = list(verify(Bundle.open(sd1_bundle), backend="cpu"))
    assert [row.what for row in rows] == ["files", "text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(row.ok for row in rows), rows


def test_the_decoder_ends_in_the_pixels_of_its_own_sample(sd1_bundle: Path) -> None:
    bundle = Bundle.open(sd1_bundle)
    inputs, expected = read_golden(bundle, "vae_decoder")
    with open_engines(bundle, "cpu").engines["vae_decoder"] as engine:
        pixels = engine(inputs)["pixels"]
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - to_pixels(expected["sample"]).astype(int)).max() <= 1


def test_outputs_hold_until_the_next_call_with_the_same_shapes(sd1_bundle: Path) -> None:
    engine = open_engines(Bundle.open(sd1_bundle), "cpu").engines["text_encoder"]
    inputs = {"input_ids": np.zeros((1, 77), dtype=np.int64), "extra_embeddings": np.zeros((1, 32))}
    first = engine(inputs)["last_hidden_state"]
    kept = first.copy()
    second = engine({**inputs, "input_ids": np.ones((1, 77), dtype=np.int64)})["last_hidden_state"]
    assert np.shares_memory(first, second)
    assert not np.array_equal(second, kept)


def test_a_wrong_name_and_a_wrong_shape_are_named(sd1_bundle: Path) -> None:
    engine = open_engines(Bundle.open(sd1_bundle), "cpu").engines["text_encoder"]
    with pytest.raises(EngineError, match=r"^text_encoder .*input_ids, extra_embeddings, .*tokens"):
        engine({"tokens": np.zeros((1, 77))})
    with pytest.raises(EngineError, match=r"input_ids: int64\[batch, 77\], .*\(1, 5\)"):
        engine({"input_ids": np.zeros((1, 5)), "extra_embeddings": np.zeros((1, 32))})


def test_building_again_keeps_what_is_there_unless_forced(copy: Bundle) -> None:
    directory, record = find_engines(copy, "cpu")
    before = (directory / ENGINE_RECORD).stat().st_mtime_ns
    assert build_engines(copy, "cpu") == record
    assert (directory / ENGINE_RECORD).stat().st_mtime_ns == before
    build_engines(copy, "cpu", force=True)
    assert (directory / ENGINE_RECORD).stat().st_mtime_ns > before


def test_two_builders_of_one_key_do_not_harm_each_other(copy: Bundle) -> None:
    errors: list[BaseException] = []

    def build() -> None:
        try:
            build_engines(copy, "cpu", force=True)
        except BaseException as error:
            errors.append(error)

    shutil.rmtree(copy.root / "engines")
    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(row.ok for row in verify(copy, backend="cpu"))
    assert len(list((copy.root / "engines").iterdir())) == 1


def test_no_engines_for_this_machine_names_the_command(copy: Bundle) -> None:
    shutil.rmtree(copy.root / "engines")
    with pytest.raises(EngineError, match=r"`latentrt build .* --backend cpu`"):
        open_engines(copy, "cpu")


def test_engines_of_another_machine_are_refused_and_the_difference_is_named(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "instruction_set", lambda: "x86_64 pentium")
    with pytest.raises(WrongMachineError, match=r"`latentrt build .* --backend cpu`") as caught:
        open_engines(copy, "cpu")
    assert any(one.startswith("device: x86_64 pentium ") for one in caught.value.differences)


def test_a_record_whose_key_is_not_its_directorys_is_refused(copy: Bundle) -> None:
    directory, _ = find_engines(copy, "cpu")
    document = json.loads((directory / ENGINE_RECORD).read_text())
    document["key"]["backend_version"] = "0.0.1"
    (directory / ENGINE_RECORD).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"backend_version: .* here, 0\.0\.1 there"):
        find_engines(copy, "cpu")


def test_an_altered_engine_is_refused_before_it_is_opened(copy: Bundle) -> None:
    directory, record = find_engines(copy, "cpu")
    file = directory / record.entries["unet"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{file.stem}\..*SHA-256"):
        open_engines(copy, "cpu")
    assert [row.ok for row in verify(copy, backend="cpu")] == [True, False]


def test_a_truncated_canonical_graph_is_refused_by_name(copy: Bundle) -> None:
    file = copy.root / copy.manifest.components["unet"].graph
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BundleError, match=r"unet/model\.onnx\D+1000\D"):
        build_engines(copy, "cpu", force=True)
    assert not list((copy.root / "engines").glob(".*"))


def test_drift_is_reported_not_hidden(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs = read_golden(copy, "text_encoder")
    moved = {name: array + 0.1 for name, array in outputs.items()}
    monkeypatch.setattr("latentrt.engines.verify.verify.read_golden", lambda bundle, component: (inputs, moved))
    row = next(row for row in verify(copy, backend="cpu") if row.what == "text_encoder")
    assert not row.ok
    assert row.error is not None and row.limit is not None and row.error > row.limit


def test_nan_is_an_infinite_error() -> None:
    assert relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) == float("inf")
    assert relative_error(np.zeros(2), np.zeros(3)) == float("inf")


def test_two_threads_that_miss_an_engine_open_it_once(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_engines(Bundle.open(sd1_bundle), "cpu", components=("unet",), threads=1)
    shape = WorkspaceShape(pictures=1, tokens=77, width=32, height=32)
    found, asked, real = list[Engine](), list[tuple[str, ...]](), opened._open_components
    second = threading.Thread(target=lambda: found.append(opened.engine("vae_encoder", shape)))

    def open_components(directory: Path, record: EngineRecord, components: tuple[str, ...], *, check: Check) -> Opened:
        asked.append(components)
        if len(asked) == 1:
            second.start()
            second.join(0.5)  # one that does not wait for this one has opened it by then, or soon after
        return real(directory, record, components, check=check)

    monkeypatch.setattr(opened, "_open_components", open_components)
    found.append(opened.engine("vae_encoder", shape))
    second.join(60)
    assert asked == [("vae_encoder",)] and found[0] is found[1]
    opened.close()


def test_an_unknown_backend_is_refused_with_the_names_there_are(sd1_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"'cpuu'.* auto, cpu, cuda"):
        choose("cpuu", Bundle.open(sd1_bundle))


def test_a_missing_onnxruntime_is_said_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"pip install 'latentrt\[cpu\]'"):
        onnxruntime.require()
    assert "pip install" in str(BACKENDS["cpu"].unavailable())


def test_a_key_differs_in_its_directory_when_any_field_does() -> None:
    key = EngineKey(backend="cpu", backend_version="1", device="x", precision="fp32", graphs="g")
    others = [
        msgspec.structs.replace(key, backend_version="2"),
        msgspec.structs.replace(key, graphs="h"),
        msgspec.structs.replace(key, profiles=("128x128",)),
        msgspec.structs.replace(key, driver_major=580),
    ]
    assert len({key.directory, *(other.directory for other in others)}) == 5


def test_a_failed_build_leaves_nothing(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("no")

    shutil.rmtree(copy.root / "engines")
    monkeypatch.setattr(building, "_build_into", fail)
    with pytest.raises(EngineError):
        build_engines(copy, "cpu")
    assert list((copy.root / "engines").iterdir()) == []


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["weights beside the graph", "weights in the graph"])
def test_an_fp16_bundle_is_built_in_fp32_for_the_cpu(
    sd1_half_bundle: Path, tmp_path: Path, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "EXTERNAL_BYTES", large)
    shutil.copytree(sd1_half_bundle, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    record = build_engines(bundle, "cpu", force=True)
    assert record.key.precision == "fp32"
    assert {tensor.dtype for tensor in record.specs["unet"].inputs} == {"float32"}
    assert any(name.endswith(".data") for name in record.files) == (large == 0)
    rows = list(verify(bundle, backend="cpu"))
    assert all(row.ok for row in rows), rows
