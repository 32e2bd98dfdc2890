"""Text encoders that are loaded for new prompts alone, and freed before anything is drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, RequestError
from latentrt.engines.open import OpenEngines
from latentrt.engines.spec import Array
from latentrt.runtime.batching.batcher import Batcher
from latentrt.runtime.cli import generate
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import KeyFrame, Lora, Request
from tests.conftest import Make
from tests.host_device import HostDevice
from tests.lora_files import every_layer, kohya, save
from tests.stand_in import install

CALL: dict[str, Any] = {"sampler": "euler", "steps": 3, "seed": 3, "size": (32, 32)}
Load = Callable[..., Pipeline]


@pytest.fixture(params=["cpu", "tensorrt"])
def load(request: pytest.FixtureRequest, made: Make, tmp_path: Path) -> Iterator[Load]:
    """Return what loads a tiny SDXL on the CPU, or on the stand-in for a device."""
    _, bundle = made("sdxl", "")
    if request.param == "cpu":
        yield lambda **options: Pipeline.load(bundle, "cpu", threads=1, **options)
        return
    root = shutil.copytree(bundle, tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device: HostDevice = install(patch, tensorrt="11.4.0.106")
        options = BuildOptions(sizes=((32, 32),), batches=(1,), references=False, refit=True)
        build_engines(Bundle.open(root), "tensorrt", options=options)
        yield lambda **options: Pipeline.load(root, "tensorrt", **options)
    assert device.leftovers() == {}


@contextmanager
def watched(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give the components that are opened while the block runs."""
    opened, before = list[str](), OpenEngines._open_components

    def opening(self: OpenEngines, directory: Path, record: Any, components: tuple[str, ...], **more: Any) -> Any:
        opened.extend(components)
        return before(self, directory, record, components, **more)

    with monkeypatch.context() as patch:
        patch.setattr(OpenEngines, "_open_components", opening)
        yield opened


def held(pipe: Pipeline) -> list[str]:
    """Return the text encoders that are in memory."""
    return [name for name, engine in pipe.loaded.opened._on_demand.items() if engine._opened is not None]


def test_pictures_are_the_same_and_the_encoders_are_loaded_for_new_prompts_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load() as kept, load(free_text_encoders=True) as freeing:
        encoders = list(freeing.manifest.of_role("text_encoder"))
        assert not held(freeing)
        for prompt in ("a red circle", "a blue star"):
            for again in (False, True):
                with watched(freeing, monkeypatch) as opened:
                    found = freeing(prompt, **CALL).pixels
                np.testing.assert_array_equal(found, kept(prompt, **CALL).pixels)
                assert sorted(opened) == ([] if again else sorted(encoders))
                assert not held(freeing)


def test_nothing_of_them_is_held_while_a_picture_is_drawn(load: Load) -> None:
    with load(free_text_encoders=True) as pipe:
        seen = [held(pipe) for _ in pipe.stream(Request(prompt="a red circle", **CALL))]
        assert seen == [[], [], []]


def test_they_are_loaded_with_the_weights_of_the_call(load: Load, made: Make, tmp_path: Path) -> None:
    lora = Lora(file=save(tmp_path / "a.safetensors", kohya(every_layer(made("sdxl", "")[0], seed=1))), scale=0.8)
    with load() as kept, load(free_text_encoders=True) as freeing:
        for loras in ([lora], [], [lora]):
            pair = [pipe("a red circle", **CALL, loras=loras).pixels for pipe in (kept, freeing)]
            np.testing.assert_array_equal(*pair)


def test_batches_animations_and_verification_load_and_free_them_too(made: Make) -> None:
    bundle = made("sdxl", "")[1]
    keys = [KeyFrame(prompt="a red circle", seed=1), KeyFrame(prompt="a blue star", seed=2)]
    options: dict[str, Any] = {"steps": 2, "size": (32, 32)}
    pictures = list[list[Array]]()
    for free in (False, True):
        with Pipeline.load(bundle, "cpu", threads=1, free_text_encoders=free) as pipe:
            frames = [frame for part in pipe.animate(keys, 3, **options) for frame in part.pixels]
            with Batcher(pipe) as batcher:
                requests = [Request(prompt=f"star {number}", seed=number, **options) for number in range(3)]
                drawn = [future.result().pixels[0] for one in requests for future in batcher.submit(one)]
            assert not held(pipe)
            pictures.append([*frames, *drawn])
    for kept, freed in zip(*pictures, strict=True):
        np.testing.assert_array_equal(kept, freed)


def test_a_prompt_that_cannot_be_read_and_a_file_that_is_gone_are_errors_as_ever(made: Make, tmp_path: Path) -> None:
    root = shutil.copytree(made("sdxl", "")[1], tmp_path / "bundle")
    with Pipeline.load(root, "cpu", threads=1, free_text_encoders=True) as pipe:
        with pytest.raises(RequestError):
            pipe("a red circle", **CALL, clip_skip=99)
        (record,) = root.glob("engines/*/engine.json")
        files = pipe.loaded.opened.home[1].entries
        (record.parent / files["text_encoder_2"]).unlink()
        with pytest.raises(BundleError):
            pipe("a red circle", **CALL)
        assert not held(pipe)


def test_the_command_draws_the_same_picture(made: Make, tmp_path: Path) -> None:
    files = [tmp_path / "kept.png", tmp_path / "freed.png"]
    for file, more in zip(files, ([], ["--free-text-encoders"]), strict=True):
        arguments = [str(made("sdxl", "")[1]), "a red circle", "--steps", "2", "--seed", "1", "--backend", "cpu"]
        done = CliRunner().invoke(generate, [*arguments, "--output", str(file), *more], catch_exceptions=False)
        assert done.exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
