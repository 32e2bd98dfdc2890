"""LoRAs of a request: the pictures of diffusers with the same weights, always from the base, and nothing is mixed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from latentrt.__main__ import cli
from latentrt.engines.build import build_engines
from latentrt.engines.bundle.files import Bundle, manifest_from_json, record_file, write_manifest
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.bundle.weight_map import (
    COLUMN,
    LAYOUTS,
    PADDED,
    TRANSPOSED,
    BuiltWeight,
    BuiltWeights,
    GraphWeights,
    arrange,
    built_record,
    fits,
    read_weights,
    restore,
    write_weights,
)
from latentrt.engines.errors import BundleError, EngineError, OutOfMemoryError, RequestError
from latentrt.engines.graphs.widen import LEAST_EXTERNAL
from latentrt.engines.lora.weight_changes import Adaptable
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime import engines
from latentrt.engines.onnxruntime import engines as sessions
from latentrt.engines.spec import Array, EngineKey
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Lora
from tests.conftest import Make
from tests.lora_files import WRITERS, Factors, every_layer, kohya, make_factors, peft, save, weight_shapes
from tests.lora_mixture import every_kind
from tests.refused import about
from tests.test_families import LEAST, psnr, reference, theirs

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red circle on blue"
CALL: Mapping[str, Any] = {"prompt": PROMPT, "steps": 3, "seed": 3, "sampler": "euler", "guidance": 4.0}
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
Choice = Sequence[tuple[list[Factors], float]]


def their_picture(family: str, checkpoint: Path, choice: Choice) -> Array:
    """Draw with diffusers after adding strength * alpha / rank * up down to its own weights, with torch."""
    pipe = reference(PIPELINES[family], checkpoint, diffusers.EulerDiscreteScheduler)
    for rows, strength in choice:
        for row in rows:
            weight = getattr(pipe, row.part).get_submodule(_inner(pipe, row)).weight
            up, down = torch.from_numpy(row.up).double(), torch.from_numpy(row.down).double()
            product = torch.tensordot(up.reshape(len(up), row.rank), down, dims=1)
            weight.data += (strength * row.alpha / row.rank * product).float()
    return theirs(pipe, prompt=PROMPT, num_inference_steps=3, guidance_scale=4.0)


def _inner(pipe: Any, row: Factors) -> str:
    """Return a module's name in the library's version at hand: transformers 5 has dropped a level."""
    names = {name for name, _ in getattr(pipe, row.part).named_modules()}
    return row.module if row.module in names else row.module.removeprefix("text_model.")


def their_changed_picture(checkpoint: Path, changed: Mapping[tuple[str, str], torch.Tensor]) -> Array:
    """Draw with diffusers after putting other weights in place of its own."""
    pipe = reference(PIPELINES["sd1"], checkpoint, diffusers.EulerDiscreteScheduler)
    for (part, name), tensor in changed.items():
        own = getattr(pipe, part).state_dict()
        own[name if name in own else name.removeprefix("text_model.")].copy_(tensor)
    return theirs(pipe, prompt=PROMPT, num_inference_steps=3, guidance_scale=4.0)


def loras(*choice: tuple[Path, float]) -> list[Lora]:
    return [Lora(file=file, scale=scale) for file, scale in choice]


def draw(pipe: Pipeline, *choice: tuple[Path, float], **more: Any) -> Array:
    return pipe(**{**CALL, **more}, loras=loras(*choice)).pixels


@pytest.fixture
def pipe(made: Make) -> Iterator[Pipeline]:
    with Pipeline.load(made("sd1", "")[1], "cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def styles(made: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs for SD 1.x: every layer, attention and convolutions with alphas, and one more."""
    root, folder = made("sd1", "")[0], tmp_path_factory.mktemp("loras")
    return [
        save(folder / "every.safetensors", kohya(every_layer(root, seed=1))),
        save(folder / "some.safetensors", peft(make_factors(root, seed=2))),
        save(folder / "text.safetensors", kohya(every_layer(root, seed=3, part="text_encoder"))),
    ]


@pytest.mark.parametrize("family", PIPELINES)
def test_every_layer_of_every_network_changes_as_in_diffusers(made: Make, family: str, tmp_path: Path) -> None:
    """Linear layers, convolutions and text encoders, two files with alphas, one of them taken backwards."""
    checkpoint, bundle = made(family, "")
    first, second = every_layer(checkpoint, seed=1), every_layer(checkpoint, seed=2)
    files = [save(tmp_path / f"{n}.safetensors", kohya(rows)) for n, rows in enumerate((first, second))]
    expected = their_picture(family, checkpoint, [(first, 0.8), (second, -0.5)])
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        found = draw(pipe, (files[0], 0.8), (files[1], -0.5))
        base = draw(pipe)
    assert psnr(found, expected) >= LEAST
    assert psnr(base, expected) < 40


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_draws_the_picture_of_diffusers(made: Make, pipe: Pipeline, writer: str, tmp_path: Path) -> None:
    checkpoint, _ = made("sd1", "")
    rows = make_factors(checkpoint, seed=5, size=0.1)
    file = save(tmp_path / "a.safetensors", WRITERS[writer](rows))
    assert psnr(draw(pipe, (file, 0.7)), their_picture("sd1", checkpoint, [(rows, 0.7)])) >= LEAST


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_one_network_alone_may_change(made: Make, part: str, tmp_path: Path) -> None:
    checkpoint, bundle = made("sdxl", "")
    rows = every_layer(checkpoint, seed=6, part=part)
    file = save(tmp_path / "a.safetensors", kohya(rows))
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        found, base = draw(pipe, (file, 1.0)), draw(pipe)
    assert psnr(found, their_picture("sdxl", checkpoint, [(rows, 1.0)])) >= LEAST
    assert psnr(found, base) < LEAST


def test_a_choice_gives_the_same_picture_whatever_was_drawn_before(pipe: Pipeline, styles: list[Path]) -> None:
    """A, B, A: bit for bit, where sessions are kept and where they were dropped in between."""
    plain = draw(pipe)
    first = draw(pipe, (styles[0], 0.8))
    others = [draw(pipe, (style, scale)) for style in styles[1:] for scale in (0.5, 1.0, -1.0)]
    assert all(not np.array_equal(first, other) for other in [plain, *others])
    np.testing.assert_array_equal(draw(pipe, (styles[0], 0.8)), first)
    np.testing.assert_array_equal(draw(pipe), plain)
    np.testing.assert_array_equal(draw(pipe, (styles[0], 0.8)), first)


def test_the_first_and_the_last_picture_without_any_are_those_of_a_pipeline_that_knows_none(
    made: Make, styles: list[Path]
) -> None:
    pictures = []
    for changed in (False, True):
        with Pipeline.load(made("sd1", "")[1], "cpu", threads=1) as pipe:
            if changed:
                draw(pipe, (styles[0], 1.0))
            pictures.append(draw(pipe))
    np.testing.assert_array_equal(*pictures)


def test_no_scale_is_no_lora(pipe: Pipeline, styles: list[Path]) -> None:
    result = pipe(**CALL, loras=loras((styles[0], 0.0)))
    assert result.seconds["adapt"] == 0
    np.testing.assert_array_equal(result.pixels, draw(pipe))


def test_the_order_of_several_makes_no_difference(pipe: Pipeline, styles: list[Path]) -> None:
    choice = [(styles[0], 0.4), (styles[1], 0.7), (styles[2], -0.3)]
    found = draw(pipe, *choice)
    result = pipe(**CALL, loras=loras(*reversed(choice)))
    np.testing.assert_array_equal(result.pixels, found)
    assert result.seconds["adapt"] == 0  # nothing was to be changed


def test_what_the_change_took_is_told(pipe: Pipeline, styles: list[Path]) -> None:
    seconds = [pipe(**CALL, loras=loras((style, 1.0))).seconds for style in (styles[0], styles[1], styles[1])]
    assert [one["adapt"] > 0 for one in seconds] == [True, True, False]
    for one in seconds:
        assert one["total"] >= one["adapt"] + one["denoise"]


def test_text_is_not_remembered_across_text_encoders(pipe: Pipeline, styles: list[Path]) -> None:
    changed = draw(pipe, (styles[2], 1.0))
    plain = draw(pipe)
    assert not np.array_equal(plain, changed)
    np.testing.assert_array_equal(draw(pipe, (styles[2], 1.0)), changed)


def test_a_file_that_was_written_again_is_read_again(
    made: Make, pipe: Pipeline, styles: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "style.safetensors"
    shutil.copyfile(styles[0], file)
    assert np.array_equal(draw(pipe, (file, 1.0)), draw(pipe, (styles[0], 1.0)))
    file.unlink()
    shutil.copyfile(styles[1], file)
    assert np.array_equal(draw(pipe, (file, 1.0)), draw(pipe, (styles[1], 1.0)))


def test_few_changed_sessions_are_kept(pipe: Pipeline, styles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn of as many choices as are kept opens nothing; of one more, everything."""
    opened: list[Path] = []
    load = engines.load

    def counted(file: Path, *rest: Any, **more: Any) -> Any:
        opened.append(file)
        return load(file, *rest, **more)

    monkeypatch.setattr(engines, "load", counted)
    for scales, expected in (((0.1, 0.2), 2), ((0.1, 0.2), 0), ((0.3, 0.1, 0.2), 3)):
        opened.clear()
        for scale in scales:
            draw(pipe, (styles[1], scale))
        assert len([file for file in opened if file.stem == "unet"]) == expected
    assert sessions.KEPT_ADAPTED == 2


def test_sessions_that_are_only_kept_make_room(
    pipe: Pipeline, styles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draw(pipe, (styles[1], 0.6))
    load, full = engines.load, list[Path]()

    def cramped(file: Path, *rest: Any, **more: Any) -> Any:
        if not full:
            full.append(file)
            raise OutOfMemoryError("no room")
        return load(file, *rest, **more)

    monkeypatch.setattr(engines, "load", cramped)
    assert not np.array_equal(draw(pipe, (styles[1], 0.7)), before)
    assert len(full) == 1
    assert np.array_equal(draw(pipe, (styles[1], 0.6)), before)


def test_an_animation_is_drawn_with_them(pipe: Pipeline, styles: list[Path]) -> None:
    from latentrt.runtime.request import KeyFrame

    keys = [KeyFrame(prompt=PROMPT, seed=3), KeyFrame(prompt="a green square", seed=4)]
    (result,) = pipe.animate(keys, 2, steps=3, sampler="euler", guidance=4.0, loras=loras((styles[0], 1.0)))
    np.testing.assert_array_equal(result.pixels[:1], draw(pipe, (styles[0], 1.0)))


def test_threads_with_different_choices_wait_for_one_another(pipe: Pipeline, styles: list[Path]) -> None:
    choices: list[list[tuple[Path, float]]] = [[], [(styles[0], 0.8)], [(styles[1], 1.0)], [(styles[2], 1.0)]]
    expected = [draw(pipe, *choice) for choice in choices]
    found: dict[tuple[int, int], Array] = {}

    def work(thread: int) -> None:
        for turn in range(3):
            place = (thread + turn) % len(choices)
            found[thread, turn] = draw(pipe, *choices[place])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for (thread, turn), pixels in found.items():
        np.testing.assert_array_equal(pixels, expected[(thread + turn) % len(choices)])


def test_an_fp16_bundle_changes_too(sd1_half_bundle: Path, sd1_checkpoint: Path, tmp_path: Path) -> None:
    """Its weights are float16's; the sums are not rounded to it on the CPU, which computes in float32."""
    rows = every_layer(sd1_checkpoint, seed=1)
    file = save(tmp_path / "a.safetensors", kohya(rows))
    expected = their_picture("sd1", sd1_checkpoint, [(rows, 0.5)])
    with Pipeline.load(sd1_half_bundle, "cpu", threads=1) as pipe:
        plain, found, again = draw(pipe), draw(pipe, (file, 0.5)), draw(pipe)
    assert psnr(found, expected) >= 35
    assert psnr(plain, expected) < 33
    np.testing.assert_array_equal(plain, again)


@pytest.mark.parametrize("family", PIPELINES)
def test_every_weight_of_a_checkpoint_is_found_in_the_graph_and_every_matrix_in_what_is_built(
    made: Make, family: str
) -> None:
    checkpoint, root = made(family, "")
    bundle = Bundle.open(root)
    (directory,) = bundle.engine_directories()
    shapes = weight_shapes(checkpoint)
    for part in ("unet", *bundle.manifest.of_role("text_encoder")):
        expected = {
            key.removeprefix(f"{part}:").removeprefix("text_model."): shape
            for key, shape in shapes.items()
            if key.startswith(f"{part}:") and "embedding.weight" not in key and "position_embedding" not in key
        }
        record = bundle.manifest.components[part].weights
        assert record is not None
        graph = read_weights(bundle.path(record, check="hash"), GraphWeights).weights
        assert {name.removeprefix("text_model."): weight.shape for name, weight in graph.items()} == expected
        built = read_weights(directory / f"{part}.weights.json", BuiltWeights).weights
        assert {name for name, weight in graph.items() if len(weight.shape) > 1} <= set(built)


def test_weights_in_files_of_their_own_change_too(
    made: Make, styles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of large networks are, beside the canonical graph and beside the built one; there they are mapped."""
    import onnx

    root = shutil.copytree(made("sd1", "")[1], tmp_path / "bundle")
    manifest = Bundle.open(root).manifest
    files, components = dict(manifest.files), dict(manifest.components)
    for name in ("unet", "text_encoder"):
        graph = root / manifest.components[name].graph
        onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="model.onnx_data", size_threshold=256)
        data = f"{manifest.components[name].graph}_data"
        files |= {path: record_file(root, path) for path in (manifest.components[name].graph, data)}
        components[name] = msgspec.structs.replace(components[name], files=(manifest.components[name].graph, data))
    write_manifest(root, msgspec.structs.replace(manifest, files=files, components=components))
    monkeypatch.setattr(onnxruntime, "EXTERNAL_BYTES", 0)
    shutil.rmtree(root / "engines")
    build_engines(Bundle.open(root), "cpu")
    (data,) = root.glob("engines/*/unet.onnx.data")
    note = read_weights(data.with_name("unet.weights.json"), BuiltWeights)
    large = [weight for weight in note.weights.values() if math.prod(weight.shape) * 4 >= LEAST_EXTERNAL]
    assert large and {weight.file for weight in large} == {data.name}
    pictures = []
    for bundle in (root, made("sd1", "")[1]):
        with Pipeline.load(bundle, "cpu", threads=1) as pipe:
            pictures.append(draw(pipe, (styles[0], 0.8), (styles[1], -0.5)))
    np.testing.assert_array_equal(*pictures)


ATTENTION, RESNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "mid_block.resnets.0"


@pytest.fixture(scope="module")
def varied(made: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose vectors have numbers of their own, as trained ones have, and two pairs of equal weights."""
    from safetensors.torch import load_file, save_file

    from latentrt.export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("varied")
    root = shutil.copytree(made("sd1", "")[0], folder / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    for part in ("unet", "text_encoder"):
        (file,) = (root / part).glob("*.safetensors")
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if tensor.ndim == 1:
                tensors[key] = tensor + 0.1 * torch.rand(tensor.shape, generator=generator)
        if part == "unet":
            tensors[f"{ATTENTION}.to_q.weight"] = tensors[f"{ATTENTION}.to_out.0.weight"].clone()
            tensors[f"{RESNET}.conv2.weight"] = tensors[f"{RESNET}.conv1.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    export_checkpoint(str(root), folder / "bundle", precision="fp32")
    return root, folder / "bundle"


def test_layers_whose_weights_are_equal_change_alone_or_are_refused(varied: tuple[Path, Path], tmp_path: Path) -> None:
    """An exporter keeps equal small weights once; each layer gets its own. Laid out again, none can be told apart."""
    root, bundle = varied
    rows = {row.module: row for row in every_layer(root, seed=1, part="unet")}
    alone = [dataclasses.replace(rows[f"{ATTENTION}.to_q"], up=rows[f"{ATTENTION}.to_q"].up * 30)]
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        found, base = draw(pipe, (save(tmp_path / "a.safetensors", kohya(alone)), 1.0)), draw(pipe)
        expected = their_picture("sd1", root, [(alone, 1.0)])
        assert psnr(found, expected) >= LEAST
        assert psnr(base, expected) < LEAST
        lora = save(tmp_path / "b.safetensors", kohya([rows[f"{RESNET}.conv2"]]))
        words = refusal(pipe, Lora(file=lora), error=EngineError)
        assert f"({RESNET}.conv2.weight" in words
        assert "latentrt export CHECKPOINT BUNDLE --lora" in words
        np.testing.assert_array_equal(draw(pipe), base)


def test_every_kind_of_change_draws_the_picture_of_diffusers(varied: tuple[Path, Path], tmp_path: Path) -> None:
    """LoHa, LoKr, DoRA and differences of weights, biases and normalizations; with a plain LoRA too, and gone after."""
    checkpoint, bundle = varied
    tensors, changed = every_kind(checkpoint, seed=1, strength=0.7)
    file = save(tmp_path / "a.safetensors", tensors)
    row = next(row for row in make_factors(checkpoint, seed=5) if row.module == f"{ATTENTION}.to_q")
    other = save(tmp_path / "b.safetensors", kohya([row]))
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        plain, found, both, again = (
            draw(pipe),
            draw(pipe, (file, 0.7)),
            draw(pipe, (other, 0.5), (file, 0.7)),
            draw(pipe),
        )
    expected = their_changed_picture(checkpoint, changed)
    assert psnr(found, expected) >= LEAST
    assert psnr(plain, expected) < 40
    np.testing.assert_array_equal(plain, again)
    name = (row.part, f"{row.module}.weight")
    changed[name] = changed[name] + torch.from_numpy(row.up @ row.down).double() * (0.5 * row.alpha / row.rank)
    assert psnr(both, their_changed_picture(checkpoint, changed)) >= LEAST


def test_every_weight_of_a_trained_checkpoint_is_found_in_what_is_built(varied: tuple[Path, Path]) -> None:
    """Biases and normalizations too: only those cannot be told apart that have the same numbers."""
    bundle = Bundle.open(varied[1])
    (directory,) = bundle.engine_directories()
    for part in ("unet", "text_encoder"):
        graph = read_weights(bundle.root / f"weights/{part}.json", GraphWeights).weights
        built = read_weights(directory / f"{part}.weights.json", BuiltWeights).weights
        twins = {f"{RESNET}.conv{number}.weight" for number in (1, 2)} if part == "unet" else set()
        assert set(graph) - set(built) == twins


@given(
    layout=st.sampled_from(LAYOUTS),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    block=st.booleans(),
)
def test_layouts_keep_every_number_and_add_up(layout: str, outputs: int, inputs: int, kernel: int, block: bool) -> None:
    """What is arranged holds the weight's numbers and zeros, and sums may be made before or after."""
    shape: tuple[int, ...] = (outputs, inputs * 16 if block else inputs)
    if layout == COLUMN or re.fullmatch(PADDED, layout):
        shape = (outputs,)
    elif layout != TRANSPOSED:
        shape = (*shape, kernel, kernel)
    generator = np.random.default_rng(outputs)
    first, second = (generator.uniform(1, 2, shape).astype(np.float32) for _ in range(2))
    stored = [candidate for candidate in _shapes_of(layout, shape) if fits(layout, shape, candidate)]
    if not stored:
        return
    found = arrange(first, layout)
    assert [found.shape] == stored
    np.testing.assert_array_equal(np.sort(found[found != 0]), np.sort(first.ravel()))
    np.testing.assert_array_equal(arrange(first + second, layout), found + arrange(second, layout))
    np.testing.assert_array_equal(restore(found, layout, shape), first)


def _shapes_of(layout: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    padded = [(-(-shape[0] // block) * block, *shape[1:]) for block in (4, 8, 16)]
    turned = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
    return list(dict.fromkeys([shape, shape[::-1], (*shape, 1), turned, *padded]))


def test_float16_weights_are_summed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    """torch's own sum in float64 is the oracle: half of float16's last place is all that may be lost."""
    weight = np.random.default_rng(0).normal(0, 1, (24, 16)).astype(np.float16)
    (tmp_path / "data").write_bytes(b"\0" * 6 + weight.T.tobytes())
    deltas = [np.random.default_rng(seed).normal(0, 1e-4, weight.shape).astype(np.float32) for seed in (1, 2, 3)]
    weights = adaptable_of(tmp_path, dtype="float16", shape=(24, 16), stored=(16, 24), layout="transposed", offset=6)
    name, found = weights.changed("unet", "w", [lambda _, delta=delta: delta for delta in deltas])
    assert (name, found.dtype) == ("there", np.float16)
    exact = torch.from_numpy(weight).double() + sum(torch.from_numpy(delta).double() for delta in deltas)
    np.testing.assert_array_equal(found.T, exact.float().half().numpy())
    assert not np.array_equal(found.T, weight)
    with pytest.raises(RequestError, check=about("loras")):
        weights.changed("unet", "w", [lambda base: np.full(base.shape, 1e5, np.float32)])


@pytest.mark.parametrize("exponent", [0, 5, -3])
def test_weights_that_are_held_at_a_fraction_change_by_that_of_what_is_added(exponent: int, tmp_path: Path) -> None:
    weight, delta = np.random.default_rng(0).normal(0, 1, (2, 24, 16)).astype(np.float32)
    (tmp_path / "data").write_bytes(np.ldexp(weight, -exponent).tobytes())
    place = {"dtype": "float32", "shape": (24, 16), "stored": (24, 16), "layout": "as named", "offset": 0}
    weights = adaptable_of(tmp_path, exponent=exponent, **place)
    _, found = weights.changed("unet", "w", [lambda base: delta * base])  # what is added is told the weight itself
    np.testing.assert_array_equal(np.ldexp(found, exponent), weight + delta * weight)


def adaptable_of(folder: Path, **place: Any) -> Adaptable:
    """One weight of one component, as a build would have noted it."""
    weight = BuiltWeight(initializer="there", file="data", **place)
    write_weights(folder / built_record("unet"), BuiltWeights(weights={"w": weight}))
    key = EngineKey(backend="cuda", backend_version="1", device="x", precision="fp16", graphs="0")
    files = {built_record("unet"): record_file(folder, built_record("unet"))}
    record = EngineRecord(schema_version=1, key=key, specs={}, entries={}, files=files, build_s=0.0)
    return Adaptable(record=record, directory=folder, files=folder, command="")


def test_damaged_numbers_are_refused_before_anything_changes(
    pipe: Pipeline, styles: list[Path], tmp_path: Path
) -> None:
    before = draw(pipe, (styles[0], 1.0))
    tensors = matrices(TO_Q)
    tensors[f"{TO_Q}.lora_up.weight"][0, 0] = np.nan
    words = refusal(pipe, Lora(file=save(tmp_path / "nan.safetensors", tensors)))
    assert "attn1.to_q.weight" in words and "float32" in words
    np.testing.assert_array_equal(draw(pipe, (styles[0], 1.0)), before)


def refusal(pipe: Pipeline, *choice: Any, error: type[Exception] = RequestError) -> str:
    with pytest.raises(error) as caught:
        pipe(**CALL, loras=list(choice))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def matrices(name: str, inputs: int = 16, outputs: int = 16) -> dict[str, Array]:
    down, up = np.ones((2, inputs), np.float32), np.ones((outputs, 2), np.float32)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REFUSED: Mapping[str, tuple[dict[str, Array], str]] = {
    "another model": (matrices("lora_unet_down_blocks_9_attentions_0_proj_in"), "(down_blocks_9_attentions_0_proj_in)"),
    "another width": (matrices(TO_Q, inputs=32), "(2, 32)"),
    "another network": (
        matrices("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "text_encoder_2",
    ),
    "no lora": ({"x.weight": np.ones((2, 2), np.float32)}, "'x.weight'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(
    pipe: Pipeline, styles: list[Path], name: str, tmp_path: Path
) -> None:
    tensors, words = REFUSED[name]
    before = draw(pipe, (styles[0], 1.0))
    strange = save(tmp_path / "a.safetensors", tensors)
    assert words in refusal(pipe, *loras((styles[1], 1.0), (strange, 1.0)))
    result = pipe(**CALL, loras=loras((styles[0], 1.0)))
    assert result.seconds["adapt"] == 0
    np.testing.assert_array_equal(result.pixels, before)


def test_what_is_no_choice_is_refused(pipe: Pipeline, styles: list[Path], tmp_path: Path) -> None:
    assert f"'{tmp_path / 'nowhere.safetensors'}'" in refusal(pipe, Lora(file=tmp_path / "nowhere.safetensors"))
    assert " nan " in refusal(pipe, Lora(file=styles[0], scale=float("nan")))
    assert "Lora(file" in refusal(pipe, str(styles[0]))


def test_a_bundle_of_an_older_export_is_refused(made: Make, styles: list[Path], tmp_path: Path) -> None:
    old = _copy(made("sd1", "")[1], tmp_path / "old", lambda bundle: _without_records(bundle))
    with Pipeline.load(old, "cpu", threads=1) as pipe:
        words = refusal(pipe, Lora(file=styles[0]))
        assert draw(pipe).any()
    assert "latentrt export CHECKPOINT" in words and "--overwrite" in words


def test_biases_of_which_an_older_export_made_no_note_are_refused(made: Make, tmp_path: Path) -> None:
    def forget(copy: Path) -> None:
        note = copy / "weights" / "unet.json"
        known = json.loads(note.read_text())["weights"]
        matrices = {name: weight for name, weight in known.items() if len(weight["shape"]) > 1}
        note.write_text(json.dumps({"weights": matrices}))
        manifest = Bundle.open(copy).manifest
        files = {**manifest.files, "weights/unet.json": record_file(copy, "weights/unet.json")}
        write_manifest(copy, msgspec.structs.replace(manifest, files=files))

    old = _copy(made("sd1", "")[1], tmp_path / "old", forget)
    lora = save(tmp_path / "a.safetensors", {"lora_unet_conv_in.diff_b": np.ones(16, np.float32)})
    with Pipeline.load(old, "cpu", threads=1) as pipe:
        words = refusal(pipe, Lora(file=lora))
    assert str(lora) in words
    assert "latentrt export CHECKPOINT" in words and "--overwrite" in words


def test_engines_of_an_older_build_are_refused(made: Make, styles: list[Path], tmp_path: Path) -> None:
    def forget(root: Path) -> None:
        (record,) = root.glob("engines/*/engine.json")
        document = json.loads(record.read_text())
        document["files"] = {name: file for name, file in document["files"].items() if "weights" not in name}
        record.write_text(json.dumps(document))

    old = _copy(made("sd1", "")[1], tmp_path / "old", forget)
    with Pipeline.load(old, "cpu", threads=1) as pipe:
        words = refusal(pipe, Lora(file=styles[0]), error=EngineError)
    assert f"`latentrt build {old} --backend cpu --force`" in words


def test_an_altered_note_is_refused(made: Make, styles: list[Path], tmp_path: Path) -> None:
    def alter(root: Path) -> None:
        note = root / "weights" / "unet.json"
        note.write_text(note.read_text().replace("transposed", "as  named!", 1))

    altered = _copy(made("sd1", "")[1], tmp_path / "altered", alter)
    with Pipeline.load(altered, "cpu", threads=1) as pipe:
        assert "SHA-256" in refusal(pipe, Lora(file=styles[0]), error=BundleError)


def _copy(bundle: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(bundle, target)
    change(target)
    return target


def _without_records(root: Path) -> None:
    text = (root / "manifest.json").read_text()
    manifest = manifest_from_json(text, where=str(root))
    plain = {name: msgspec.structs.replace(part, weights=None) for name, part in manifest.components.items()}
    write_manifest(root, msgspec.structs.replace(manifest, components=plain))


def test_generate_adds_them_and_tells_what_it_took(made: Make, styles: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    bundle = made("sd1", "")[1]
    options = ["--steps", "3", "--sampler", "euler", "--guidance", "4", "--seed", "3", "--backend", "cpu"]
    chosen = ["--lora", f"{styles[0]}:0.8", "--lora", f"{styles[1]}:-0.5"]
    command = ["generate", str(bundle), PROMPT, *options, *chosen, "-o"]
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    assert "adapt " in done.output
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        expected = draw(pipe, (styles[0], 0.8), (styles[1], -0.5))
    picture = Image.open(tmp_path / "a.png")
    assert psnr(np.asarray(picture)[None], expected) >= LEAST
    assert "every.safetensors:0.8 some.safetensors:-0.5" in picture.text["parameters"]  # type: ignore[attr-defined]
    told = CliRunner().invoke(cli, [*command, str(tmp_path / "b.png"), "--json"])
    assert json.loads(told.output)["loras"] == ["every.safetensors:0.8", "some.safetensors:-0.5"]
    plain = CliRunner().invoke(cli, ["generate", str(bundle), PROMPT, *options, "-o", str(tmp_path / "c.png")])
    assert "adapt " not in plain.output
