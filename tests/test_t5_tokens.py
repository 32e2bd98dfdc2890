"""How many tokens of a prompt T5 reads is the request's to say: diffusers' max_sequence_length, from 1 to 512."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt import Batcher, BatcherOptions, Pipeline, Request
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError, RequestError
from latentrt.runtime.verify.stages import verify_stages
from tests.conftest import Make
from tests.refused import about
from tests.stand_in import install
from tests.test_batcher import NEAR_DB
from tests.test_families import LEAST, psnr
from tests.test_sd3 import SEED, SIZE, STEPS, theirs

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = "a red circle on blue and a square, " * 40  # more than 512 tokens
ASKED: dict[str, Any] = {
    "prompt": LONG,
    "steps": STEPS,
    "seed": SEED,
    "guidance": 4.0,
    "size": SIZE,
    "overflow": "truncate",
}
CALL: dict[str, Any] = {"prompt": LONG, "guidance_scale": 4.0, "width": SIZE[0], "height": SIZE[1]}


@pytest.fixture(scope="module")
def whole(made: Make) -> tuple[Path, Path]:
    return made("sd3", "dual t5")


@pytest.fixture(scope="module")
def pipe(whole: tuple[Path, Path]) -> Iterator[Pipeline]:
    with Pipeline.load(whole[1], "cpu", threads=1) as opened:
        yield opened


@pytest.mark.parametrize("tokens", [77, 256, 512])
def test_pictures_are_those_of_diffusers(whole: tuple[Path, Path], pipe: Pipeline, tokens: int) -> None:
    expected = theirs(whole[0], **CALL, max_sequence_length=tokens)
    found = pipe(**ASKED, t5_tokens=tokens)
    assert psnr(found.pixels, expected) >= LEAST
    assert found.settings[0].further["t5_tokens"] == tokens
    assert psnr(pipe(**ASKED, t5_tokens=300).pixels, expected) < LEAST  # each token says something


def test_zeros_are_as_many(whole: tuple[Path, Path], made: Make, pipe: Pipeline) -> None:
    """Where T5 is left out of a request, and where a bundle holds none."""
    expected = theirs(whole[0], **CALL, t5=False, max_sequence_length=77)
    assert psnr(pipe(**ASKED, t5=False, t5_tokens=77).pixels, expected) >= LEAST
    checkpoint, bundle = made("sd3", "")
    with Pipeline.load(bundle, "cpu", threads=1) as without:
        found = without(**ASKED, t5_tokens=77).pixels
    assert psnr(found, theirs(checkpoint, **CALL, max_sequence_length=77)) >= LEAST


def test_requests_of_different_lengths_at_a_time(pipe: Pipeline) -> None:
    requests = [
        Request(**ASKED | {"seed": seed, "t5_tokens": tokens}) for seed, tokens in enumerate((77, None, 300, 77))
    ]
    alone = [pipe.draw(request).pixels for request in requests]
    with Batcher(pipe, BatcherOptions(slots=4)) as batcher:
        found = [future.result(120).pixels for future in [batcher.submit(one)[0] for one in requests]]
    for one, other in zip(alone, found, strict=True):
        assert psnr(one, other) >= NEAR_DB


@pytest.mark.parametrize("tokens", [0, 513, -1, True, 77.0, "many"])
def test_other_numbers_are_refused(pipe: Pipeline, tokens: Any) -> None:
    with pytest.raises(RequestError, check=about("t5_tokens")):
        pipe(**ASKED, t5_tokens=tokens)


def test_a_checkpoint_that_reads_no_t5_refuses_it(sd1_bundle: Path) -> None:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as pipe, pytest.raises(RequestError, check=about("t5_tokens")):
        pipe("a circle", t5_tokens=77)


def test_a_device_draws_the_lengths_that_it_is_compiled_for(
    whole: tuple[Path, Path], pipe: Pipeline, tmp_path: Path
) -> None:
    """77 tokens of CLIP's beside T5's; a length that it is not compiled for is refused with the command."""
    root = shutil.copytree(whole[1], tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(root), "tensorrt", options=BuildOptions(sizes=(SIZE,), tokens=(154, 589)))
        with Pipeline.load(root) as compiled:
            for tokens in (77, 512):
                asked = ASKED | {"t5_tokens": tokens}
                assert psnr(compiled(**asked).pixels, pipe(**asked).pixels) >= LEAST
            with pytest.raises(EngineError, match="--tokens 333"):
                compiled(**ASKED)
        rows = list(verify_stages(Bundle.open(root), backend="tensorrt"))
    assert rows and all(row.ok for row in rows), [row.message for row in rows]


@pytest.mark.parametrize(
    ("tokens", "made_of"), [(333, (1, 256)), (410, (2, 256)), (589, (1, 512)), (590, (2, 436)), (78, (1, 1))]
)
def test_a_length_is_made_of_chunks_and_of_t5s_row(
    whole: tuple[Path, Path], tokens: int, made_of: tuple[int, int]
) -> None:
    manifest = Bundle.open(whole[1]).manifest
    found = {(one.tokens, one.chunks, one.fixed_tokens) for one in BuildOptions(tokens=(tokens,)).profiles(manifest)}
    assert found == {(tokens, *made_of)}


def test_a_length_that_no_text_has_is_refused(whole: tuple[Path, Path], sd1_bundle: Path) -> None:
    for bundle, tokens in ((whole[1], 77), (sd1_bundle, 100)):
        with pytest.raises(RequestError, match="--tokens"):
            BuildOptions(tokens=(tokens,)).profiles(Bundle.open(bundle).manifest)
