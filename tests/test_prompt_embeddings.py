"""Files of textual-inversion embeddings: what is read from them, and which are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.errors import RequestError
from latentrt.runtime.text.textual_inversion import LearnedWord, load_embedding


def save(path: Path, **tensors: Any) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


def draw(*shape: int, dtype: str = "float32") -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_float_type_is_read_as_torch_reads_it(tmp_path: Path, dtype: str) -> None:
    vectors = draw(3, 32, dtype=dtype)
    embedding = load_embedding(save(tmp_path / "a.safetensors", **{"<cat>": vectors}))
    learned = embedding.taught("text_encoder").vectors
    assert learned.dtype == np.float32
    assert np.array_equal(learned, vectors.float().numpy())


def test_the_word_is_the_tensors_name_the_files_or_the_callers(tmp_path: Path) -> None:
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    one = save(tmp_path / "one.safetensors", **{"<cat>": draw(32)})
    (theirs,) = load_textual_inversion_state_dicts([str(one)])
    ours = load_embedding(one)
    assert [ours.name] == list(theirs)
    assert np.array_equal(ours.taught("text_encoder").vectors, theirs["<cat>"].numpy()[None])
    assert load_embedding(str(one), name="dog").taught("text_encoder").vectors.shape == (1, 32)


@pytest.mark.parametrize("key", ["emb_params", "string_to_param.*", "*", "clip_l", "clip_g"])
def test_the_word_is_the_files_where_the_tensors_name_is_none(tmp_path: Path, key: str) -> None:
    file = save(tmp_path / "easynegative.safetensors", **{key: draw(4, 32)})
    assert load_embedding(file).name == "easynegative"
    assert load_embedding(file, name="<bad>").name == "<bad>"


# Which text encoders a bundle has, and the files whose words all of them can learn.
BOTH = frozenset({"text_encoder", "text_encoder_2"})
FITTING: dict[frozenset[str], set[tuple[str, ...]]] = {
    frozenset({"text_encoder"}): {("<cat>",), ("emb_params",), ("clip_l",)},
    BOTH: {("clip_g", "clip_l")},
    frozenset({"text_encoder_2"}): {("<cat>",), ("emb_params",), ("clip_g",), ("clip_g", "clip_l")},
}


@pytest.mark.parametrize("keys", [("<cat>",), ("emb_params",), ("clip_l",), ("clip_g",), ("clip_g", "clip_l")])
def test_no_bundle_learns_half_a_word(tmp_path: Path, keys: tuple[str, ...]) -> None:
    word = load_embedding(save(tmp_path / "cat.safetensors", **{key: draw(2, 8) for key in keys}))
    for components, fitting in FITTING.items():
        assert word.fits(components) == (keys in fitting)
        if keys in fitting:
            assert all(word.taught(component).vectors.shape == (2, 8) for component in components)


def refused(path: Path, told: str = "") -> None:
    with pytest.raises(RequestError) as caught:
        load_embedding(path)
    assert str(path) in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    import pickle

    import torch

    torch.save({"string_to_param": {"*": draw(1, 32)}, "name": "x"}, tmp_path / "zip.pt")
    torch.save({"<cat>": draw(32)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps({"<cat>": [1.0]}))
    for name in ("zip.pt", "old.bin", "named.safetensors"):
        refused(tmp_path / name, " pickle")


def test_other_contents_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.safetensors", f"({os.strerror(errno.ENOENT)})")
    refused(tmp_path, f"({os.strerror(errno.EISDIR)})")
    file = tmp_path / "a.safetensors"
    refused(save(file, clip_l=draw(1, 32), clip_g=draw(2, 40)), "2 in clip_g, 1 in clip_l")
    refused(save(file, clip_l=draw(1, 32), clip_x=draw(1, 40)), "(clip_l, clip_x)")
    refused(save(file, **{f"layer.{n}": draw(2, 2) for n in range(5)}), "(layer.0, layer.1, layer.2, …)")
    refused(save(file, cat=draw(1, 2, 3)), "(1, 2, 3)")
    refused(save(file, cat=draw(0, 3)), "(0, 3)")
    refused(save(file, cat=draw(3).int()), "F64, F32, F16, BF16")
    refused(save(file, cat=draw(3) / 0))
    file.write_bytes(bytes((16 << 20) + 1))
    refused(file, " 16 MiB")


@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused_with_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        load_embedding(file)
    assert "\n" not in str(caught.value)


@given(cut=st.integers(0, 10_000), place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, value: int
) -> None:
    file = save(tmp_path_factory.getbasetemp() / "damaged.safetensors", **{"<cat>": draw(2, 8)})
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(content[: len(content) - cut % 40])
    try:
        assert isinstance(load_embedding(file), LearnedWord)
    except RequestError as error:
        assert str(file) in str(error)
