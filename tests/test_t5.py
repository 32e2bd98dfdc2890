"""T5's encoder as a graph: transformers' states for any length, and inside float16 where published weights leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.compare import relative_error
from latentrt.engines.spec import Array, Precision
from latentrt.export.graphs import golden, half_precision, ranges, run
from latentrt.export.graphs.external_data import save_graph
from latentrt.export.graphs.types import load_typed
from latentrt.export.networks import loading, modules
from latentrt.export.networks.streamed_weights import StoredWeights
from latentrt.export.sources.unigram import read_unigram
from latentrt.export.work.finished import Finished, golden_path, graph_path
from latentrt.export.work.jobs import ExportJob, run_job
from tests.tiny_t5 import SIZES, VOCABULARY, save_t5, save_unigram

NAME = "text_encoder_3"
LOUD = 3e4  # the states between the layers reach 2e5 then, where float16 ends at 65504
# (rows, tokens): shorter and longer than the traced ones, beyond the furthest distance that has a bucket of its own
SHAPES = ((1, 1), (3, 5), (2, 256), (1, 300))


def job(folder: Path, root: Path, precision: Precision, tokenizer: Path) -> ExportJob:
    read = read_unigram(tokenizer)
    return ExportJob(
        component=NAME,
        row=NAME,
        source="torch",
        folder=str(folder),
        root=str(root),
        precision=precision,
        dimensions={"text_width_3": SIZES["d_model"], "pooled_width": 0, **read.dimensions()},
        scaling_factor=1.0,
        texts=read.texts(),
    )


def export(one: ExportJob) -> Finished:
    Path(one.root).mkdir(parents=True, exist_ok=True)
    return [run_job(dataclasses.replace(one, phase=phase)) for phase in one.phases][-1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unigram(tmp_path_factory.mktemp("unigram"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def exported(folder: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    one = job(folder, tmp_path_factory.mktemp("bundle") / "staged", "fp32", tokenizer)
    return Path(one.root), export(one)


def theirs(folder: Path, ids: Array) -> Array:
    from transformers import T5EncoderModel

    with torch.no_grad():
        states: Array = T5EncoderModel.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(ids))[0].numpy()
    return states


def draw_ids(*shape: int) -> Array:
    return np.random.default_rng(shape).integers(0, VOCABULARY, shape)


def states_of(graph: Path, ids: Array) -> Array:
    (found,) = run.run_in_pieces(graph, [{"input_ids": ids}])
    return found["last_hidden_state"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_gives_the_states_of_transformers_at_any_length(
    exported: tuple[Path, Finished], folder: Path, shape: tuple[int, int]
) -> None:
    ids = draw_ids(*shape)
    assert relative_error(states_of(exported[0] / graph_path(NAME), ids), theirs(folder, ids)) < 1e-5


def test_the_golden_inputs_are_tokens_of_real_prompts(exported: tuple[Path, Finished], tokenizer: Path) -> None:
    root, finished = exported
    inputs, _ = golden.load_golden(root / golden_path(NAME))
    rows, (first, second, *_) = inputs["input_ids"], read_unigram(tokenizer).texts()
    assert rows.shape == (2, 77) and len(first) > 77 and len(second) == 1
    assert rows[0].tolist() == [*first[:76], 1] and rows[1].tolist() == [1] + [0] * 76
    assert finished.error is not None and finished.error < 1e-5


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("loud"), loudness=LOUD)


def test_states_beyond_float16_are_held_at_a_fraction_and_nothing_stays_in_float32(
    loud: Path, tokenizer: Path, tmp_path: Path
) -> None:
    finished = export(job(loud, tmp_path / "staged", "fp16", tokenizer))
    assert finished.largest_activation is not None and finished.largest_activation > ranges.LARGEST
    assert finished.float32_layers == ()
    assert finished.error is not None and finished.error < 5e-3
    ids = draw_ids(2, 200)
    pair = ({"input_ids": ids}, {"last_hidden_state": theirs(loud, ids)})
    assert ranges.rounding_error(tmp_path / "staged" / graph_path(NAME), [pair], component=NAME) < 5e-3


def test_without_the_recorded_ranges_it_would_be_infinite(loud: Path, tokenizer: Path, tmp_path: Path) -> None:
    wide, half = job(loud, tmp_path / "wide", "fp32", tokenizer), tmp_path / "half" / "model.onnx"
    made, narrowed = export(wide), job(loud, tmp_path / "wide", "fp16", tokenizer)
    model = load_typed(tmp_path / "wide" / graph_path(NAME))
    half_precision.narrow(model, [], takes=made.inputs, gives=gives(narrowed))
    save_graph(model, half)
    pair = golden.load_golden(tmp_path / "wide" / golden_path(NAME))
    assert ranges.rounding_error(half, [pair], component=NAME) == float("inf")


def gives(one: ExportJob) -> Any:
    from latentrt.export.networks.components import COMPONENTS, output_specs

    return output_specs(COMPONENTS[NAME], one.dimensions, one.precision)


def test_buckets_of_distances_do_not_depend_on_float16(exported: tuple[Path, Finished]) -> None:
    """A logarithm that is rounded may fall into the next bucket: the graph has none, but a table."""
    kinds = {node.op_type for node in load_typed(exported[0] / graph_path(NAME)).graph}
    assert not kinds & {"Log", "Pow"} and {"RMSNormalization", "Gelu", "Attention"} <= kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_weight_is_read_from_its_file_when_its_layer_computes(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    # transformers would load `wo` in float32, which is a copy of 4 GB of T5-XXL
    save_as(folder, tmp_path, {key: tensor.to(dtype) for key, tensor in read(folder).items()})
    module = loading.load(NAME, tmp_path, dtype=None)
    weights = StoredWeights(module)
    assert not weights._kept
    ids = draw_ids(2, 20)
    with weights.lent():
        found = modules.run(module, {"input_ids": ids}, ["last_hidden_state"])
    assert relative_error(found["last_hidden_state"], theirs(tmp_path, ids)) < 1e-5


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_as(folder: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(dict(tensors), target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_the_embedding_may_be_stored_under_either_name_or_both(
    folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    tensors = read(folder)
    table = tensors.pop("shared.weight")
    save_as(folder, tmp_path, tensors | {f"{name}.weight": table.clone() for name in names})
    module, ids = loading.load(NAME, tmp_path), draw_ids(1, 9)
    found = modules.run(module, {"input_ids": ids}, ["last_hidden_state"])
    assert relative_error(found["last_hidden_state"], theirs(folder, ids)) < 1e-5


def test_a_word_that_alone_reaches_beyond_float16_is_seen_where_a_real_prompt_has_it(
    tokenizer: Path, tmp_path: Path
) -> None:
    """The states of one token of the third prompt leave float16 at export's own prompts, and nobody else's do."""
    first, second, third, _ = read_unigram(tokenizer).texts()
    word = next(token for token in third[:20] if token not in {*first, *second, 0, 1})
    folder = save_t5(tmp_path / "t5", loudness=3e3)
    tensors = read(folder)
    tensors["shared.weight"][word] = 6e4 * torch.sign(tensors["shared.weight"][word])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    others = np.array([[*first[:76], 1]])
    for ids, leaves in ((others, False), (np.array([third[:20]]), True)):
        assert (np.abs(residual_sums(folder, ids)).max() > 65504) == leaves
    finished = export(job(folder, tmp_path / "staged", "fp16", tokenizer))
    assert finished.largest_activation is not None and finished.largest_activation > 65504
    pair = ({"input_ids": np.array([third[:20]])}, {"last_hidden_state": theirs(folder, np.array([third[:20]]))})
    assert ranges.rounding_error(tmp_path / "staged" / graph_path(NAME), [pair], component=NAME) < 5e-3


def residual_sums(folder: Path, ids: Array) -> Array:
    """Return the states between the layers, the embeddings first."""
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[:-1]
        return torch.stack(states).numpy()
