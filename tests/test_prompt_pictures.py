"""However a prompt is read, the picture is the one that diffusers draws from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline
from tests.test_parity import LIMITS, psnr
from tests.test_prompt_text import mend_clip_skip

SHARED = {"width": 24, "height": 32}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "empty": ({"prompt": "", "negative_prompt": ""}, {}),
    "signs": ({"prompt": "a (red:1.4) [circle] BREAK \\(x", "negative_prompt": "((blue))"}, {}),
    "clip-skip": ({"prompt": "a red circle", "negative_prompt": "a blue square", "clip_skip": 2}, {}),
    "learned": ({"prompt": "a <cat>, a red <long-cat>", "negative_prompt": "<cat>"}, {}),
    "cut": ({"prompt": "a red circle, " * 30, "negative_prompt": "blue " * 90}, {"overflow": "truncate"}),
}


@pytest.fixture(scope="module")
def reference(sd2_checkpoint: Path, files: list[Path]) -> Any:
    from diffusers import StableDiffusionPipeline

    mend_clip_skip()
    pipe = StableDiffusionPipeline.from_pretrained(sd2_checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for file in files:
        pipe.load_textual_inversion(str(file.parent), weight_name=file.name)
    return pipe


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two learned words, of one vector and of three."""
    from safetensors.numpy import save_file

    folder, generator = tmp_path_factory.mktemp("embeddings"), np.random.default_rng(3)
    for name, vectors in (("<cat>", 1), ("<long-cat>", 3)):
        rows = generator.normal(0, 0.05, (vectors, 48)).astype(np.float16)
        save_file({name: rows}, folder / f"{vectors}.safetensors")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def pipeline(sd2_bundle: Path, files: list[Path]) -> Iterator[Pipeline]:
    with Pipeline.load(sd2_bundle, "cpu") as pipe:
        for file in files:
            pipe.add_embedding(file)
        yield pipe


def draw_with_diffusers(pipe: Any, **request: Any) -> Array:
    import torch

    pictures = pipe(
        **request,
        **SHARED,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images
    return np.asarray((pictures * 255).round().astype(np.uint8))


@pytest.mark.parametrize("case", CASES)
def test_prompts_draw_the_pictures_of_diffusers(pipeline: Pipeline, reference: Any, case: str) -> None:
    request, own = CASES[case]
    expected = draw_with_diffusers(reference, **request)
    found = pipeline(**request, **own, steps=5, guidance=3.0, seed=7, size=(24, 32)).pixels
    assert psnr(found, expected) >= LIMITS["random"]


def test_the_cases_draw_different_pictures(pipeline: Pipeline) -> None:
    """A difference between two cases is larger than the limit allows: the limit can tell them apart."""
    request, _ = CASES["clip-skip"]
    plain = {name: value for name, value in request.items() if name != "clip_skip"}
    first, second = (pipeline(**one, steps=5, guidance=3.0, seed=7, size=(24, 32)).pixels for one in (request, plain))
    assert not math.isinf(psnr(first, second))
    assert psnr(first, second) < LIMITS["random"]
