"""Words that were added to a checkpoint's tokenizer, with rows of the text encoder's table: one token each."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import AddedToken
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentrt.engines.errors import CheckpointError
from latentrt.export.export import export_checkpoint
from latentrt.export.networks.loading import load
from latentrt.export.sources.tokenizer import read_tokenizer, write_clip_files, write_tokenizer
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer
from tests.test_families import LEAST, SEED, STEPS, XL, psnr, reference, theirs
from tests.tiny import END, START, WORDS, clip_vocabulary, save_tiny, save_tokenizer

SIZE = len(clip_vocabulary(WORDS)[0])
# Every flag, capitals, spaces and punctuation, and a word inside another.
ADDED = (
    AddedToken("<cat>", normalized=True),
    AddedToken("Big Dog", normalized=True),
    AddedToken("<S*>", normalized=False),
    AddedToken("ohwx", normalized=True, single_word=True),
    AddedToken("<left>", normalized=False, lstrip=True),
    AddedToken("<right>", normalized=False, rstrip=True),
    AddedToken("<mark>", normalized=False, special=True),
    AddedToken("red, blue", normalized=True),
    AddedToken("<cat>s", normalized=True),
)


def by_transformers(folder: Path) -> None:
    """As `add_tokens` and `save_pretrained` of transformers 5 leave a folder: a tokenizer.json."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(ADDED))
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()


def by_version_4(folder: Path) -> None:
    """As transformers from 4.34 on left it: beside vocab.json, in tokenizer_config.json."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    rows = {str(SIZE + place): token.__getstate__() for place, token in enumerate(ADDED)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": rows}))


def by_older_versions(folder: Path) -> None:
    """As transformers before 4.34 left it: the words and their ids alone."""
    rows = {str(token): SIZE + place for place, token in enumerate(ADDED)}
    (folder / "added_tokens.json").write_text(json.dumps(rows))


def by_ours(folder: Path) -> None:
    """As the files beside a bundle's graphs are, for other tools."""
    by_transformers(folder)
    tokenizer = read_tokenizer(folder)
    shutil.rmtree(folder)
    write_clip_files(tokenizer, folder)


WAYS: dict[str, Callable[[Path], None]] = {
    "transformers 5": by_transformers,
    "transformers 4": by_version_4,
    "older": by_older_versions,
    "ours": by_ours,
}
Pair = tuple[PromptTokenizer, Any]


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A bundle's tokenizer and transformers', from one folder."""
    folder = tmp_path_factory.mktemp("added") / "clip"
    save_tokenizer(folder, *clip_vocabulary(WORDS), pad=END)
    WAYS[request.param](folder)
    spec = write_tokenizer(read_tokenizer(folder, rows=SIZE + len(ADDED)), folder, "bundle.json")
    return PromptTokenizer(folder / spec.file, spec), CLIPTokenizer.from_pretrained(folder)


PIECES = [*(str(token) for token in ADDED), *WORDS, " ", "  ", ", ", "<", ">", "s", "\n", START, END, "ß"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.sampled_from(PIECES).map(str.upper), max_size=12).map("".join)


@settings(max_examples=300)
@given(text=TEXTS | st.text(max_size=10))
def test_added_words_have_the_ids_of_transformers(pair: Pair, text: str) -> None:
    ours, theirs = pair
    expected = theirs(text, truncation=False)["input_ids"][1:-1]
    assert [id for chunk in ours.chunks(Prompt(text=text)) for id in chunk.ids] == expected


def test_every_added_word_is_one_token(pair: Pair) -> None:
    ours, _ = pair
    for place, token in enumerate(ADDED):
        (chunk,) = ours.chunks(Prompt(text=f"a {token} on"))
        assert [id for id in chunk.ids if id >= SIZE] == [SIZE + place]


def test_a_chunk_may_end_with_an_added_word(pair: Pair) -> None:
    first, second = pair[0].chunks(Prompt(text="<cat>" * 80))
    assert (len(first.ids), len(second.ids)) == (75, 5)
    first, second = pair[0].chunks(Prompt(text="red " * 73 + "<cat> café"))
    assert first.ids[-1] == SIZE and len(first.ids) == 74


def add_words(checkpoint: Path, encoder: str, kind: Any, **config: Any) -> None:
    """Add the words to a tokenizer and rows to its text encoder, as training scripts do; then change the config."""
    folder = checkpoint / encoder.replace("text_encoder", "tokenizer")
    tokenizer, network = CLIPTokenizer.from_pretrained(folder), kind.from_pretrained(checkpoint / encoder)
    tokenizer.add_tokens(list(ADDED))
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        network.get_input_embeddings().weight[SIZE:].normal_(std=0.5)
    tokenizer.save_pretrained(folder)
    network.save_pretrained(checkpoint / encoder)
    file = checkpoint / encoder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


ENCODERS = (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))


@pytest.fixture(scope="module")
def worded(workshop: Path) -> tuple[Path, Path]:
    """SDXL with added words, and its bundle. Its end of text is 2, as in published configs: CLIP's largest id."""
    checkpoint, bundle = workshop / "sdxl-added-words", workshop / "sdxl-added"
    if not checkpoint.is_dir():
        with tempfile.TemporaryDirectory(dir=workshop) as beside, torch.random.fork_rng():
            torch.manual_seed(4)
            made = save_tiny(Path(beside) / "made", family="sdxl")
            for encoder, kind in ENCODERS:
                add_words(made, encoder, kind, eos_token_id=2)
            made.rename(checkpoint)
    export_checkpoint(str(checkpoint), bundle, precision="fp32")
    return checkpoint, bundle


def sdxl(checkpoint: Path) -> Any:
    return reference(diffusers.StableDiffusionXLPipeline, checkpoint, diffusers.EulerDiscreteScheduler)


@pytest.mark.parametrize("prompt", ["a red <cat>", "Big dog on blue, a <S*> and a <cat>", "a red circle"])
def test_a_checkpoint_draws_its_added_words_as_diffusers_does(worded: tuple[Path, Path], prompt: str) -> None:
    """What stands for a whole text is read at the largest id too, which is the added word's, as in transformers."""
    checkpoint, bundle = worded
    expected = theirs(sdxl(checkpoint), prompt=prompt, guidance_scale=5.0, width=40, height=32)
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        request: dict[str, Any] = {"steps": STEPS, "seed": SEED, **XL}
        assert psnr(pipe(prompt, **request).pixels, expected) >= LEAST
        assert psnr(pipe(prompt.replace("<cat>", "cat").replace("a ", "on "), **request).pixels, expected) < LEAST


def test_a_learned_word_does_not_stand_for_the_whole_text(worded: tuple[Path, Path], tmp_path: Path) -> None:
    """diffusers reads the whole text at a learned word, as its id is the largest; trainers and other interfaces do not.

    Its encoders, told the id of their end of text, give the picture that is drawn here.
    """
    checkpoint, bundle = worded
    generator = np.random.default_rng(5)
    rows = {
        name: generator.normal(0, 0.5, (1, width)).astype(np.float32)
        for name, width in (("clip_l", 32), ("clip_g", 48))
    }
    save_file(rows, tmp_path / "sks.safetensors")
    pipe = sdxl(checkpoint)
    for name, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(
            {"sks": torch.from_numpy(rows[name])}, token="sks", text_encoder=encoder, tokenizer=tokenizer
        )
    call: dict[str, Any] = {"prompt": "a red sks", "guidance_scale": 5.0, "width": 40, "height": 32}
    at_the_word = theirs(pipe, **call)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    at_the_end = theirs(pipe, **call)
    with Pipeline.load(bundle, "cpu", threads=1) as opened:
        opened.add_embedding(tmp_path / "sks.safetensors")
        found = opened("a red sks", steps=STEPS, seed=SEED, **XL).pixels
    assert psnr(found, at_the_end) >= LEAST
    assert psnr(found, at_the_word) < LEAST


def test_rows_that_config_json_does_not_know_of_are_named(sd1_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint")
    add_words(checkpoint, "text_encoder", CLIPTextModel, vocab_size=SIZE)
    with pytest.raises(CheckpointError, match=rf"token_embedding\.weight.*\({SIZE + len(ADDED)}, 32\)"):
        load("text_encoder", checkpoint / "text_encoder")


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_words_and_rows_that_do_not_match_are_refused_before_anything_is_written(
    sd1_checkpoint: Path, tmp_path: Path, part: str
) -> None:
    """Words without rows; and rows that config.json does not know of, which transformers refuses too."""
    checkpoint = shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint")
    add_words(checkpoint, "text_encoder", CLIPTextModel)
    file = checkpoint / "text_encoder" / "config.json"
    if part == "text_encoder":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": SIZE}))
        with pytest.raises(RuntimeError, match=r"mismatch"):
            CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    else:
        shutil.rmtree(checkpoint / "text_encoder")
        shutil.copytree(sd1_checkpoint / "text_encoder", checkpoint / "text_encoder")
    with pytest.raises(CheckpointError, match=f"<cat>s.*{SIZE + len(ADDED) - 1}.*{SIZE}.*vocab_size"):
        export_checkpoint(str(checkpoint), tmp_path / "bundle", precision="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
