"""LoRAs in compiled engines: refitted from the base's weights always, and never left half done. On the stand-in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.weight_map import BuiltWeights, read_weights
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Lora
from tests.conftest import Make
from tests.host_device import HostDevice
from tests.lora_files import every_layer, kohya, save
from tests.lora_mixture import every_kind
from tests.refused import about
from tests.stand_in import install
from tests.test_tensorrt_pipeline import assert_close

SIZES = ((32, 32), (40, 32))
ASKED: dict[str, Any] = {"prompt": "a red circle", "sampler": "euler", "steps": 3, "seed": 3, "size": (32, 32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    root: Path
    device: HostDevice
    loras: tuple[Path, ...]

    @property
    def library(self) -> Any:
        import sys

        return sys.modules["tensorrt"]

    def draw(self, pipe: Pipeline, *scales: float, **more: Any) -> Array:
        chosen = [Lora(file=file, scale=scale) for file, scale in zip(self.loras, scales, strict=False)]
        return pipe(**ASKED | more, loras=chosen).pixels


@pytest.fixture(params=[("sd1", ""), ("sdxl", "")], ids="-".join)
def place(request: pytest.FixtureRequest, made: Make, tmp_path: Path) -> Iterator[Workplace]:
    checkpoint, bundle = made(*request.param)
    root = shutil.copytree(bundle, tmp_path / "bundle")
    loras = [save(tmp_path / f"{seed}.safetensors", kohya(every_layer(checkpoint, seed=seed))) for seed in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        for refit in (False, True):
            options = BuildOptions(sizes=SIZES, batches=(1,), references=False, refit=refit)
            build_engines(Bundle.open(root), "tensorrt", options=options)
        yield Workplace(root=root, device=device, loras=tuple(loras))
    assert device.leftovers() == {}


def test_what_a_refitted_device_draws_is_what_numpy_draws(place: Workplace) -> None:
    """Several choices in turn, one size after another, and the base again: each from the base's weights."""
    with Pipeline.load(place.root, "tensorrt") as compiled, Pipeline.load(place.root, "cpu", threads=1) as plain:
        pictures = {}
        for scales in ((), (0.8,), (0.0, 1.0), (0.8,), (0.5, -0.5), ()):
            for size in SIZES:
                found = place.draw(compiled, *scales, size=size)
                assert_close(found, place.draw(plain, *scales, size=size))
                np.testing.assert_array_equal(pictures.setdefault((scales, size), found), found)
        assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)


def test_every_kind_of_change_is_refitted(place: Workplace, made: Make, tmp_path: Path) -> None:
    """LoHa, LoKr, DoRA, biases and normalizations; of those that fit the tiny SDXL too, the first layer's."""
    tensors, _ = every_kind(made("sd1", "")[0], seed=1, strength=1.0)
    first = "conv_in" if Bundle.open(place.root).manifest.family == "sdxl" else ""
    untrained = "resnets_0_norm1"  # whose ones the plain engine cannot tell from others
    tensors = {key: array for key, array in tensors.items() if first in key and untrained not in key}
    chosen = [Lora(file=save(tmp_path / "a.safetensors", tensors), scale=0.7)]
    with Pipeline.load(place.root, "tensorrt") as compiled, Pipeline.load(place.root, "cpu", threads=1) as plain:
        found, base = (compiled(**ASKED, loras=loras).pixels for loras in (chosen, []))
        assert_close(found, plain(**ASKED, loras=chosen).pixels)
    assert not np.array_equal(found, base)


def test_text_that_is_encoded_on_the_device_is_encoded_with_the_changed_weights(place: Workplace) -> None:
    prompts = [f"a red circle number {number}" for number in range(3)]
    with Pipeline.load(place.root, "tensorrt") as compiled, Pipeline.load(place.root, "cpu", threads=1) as plain:
        for prompt, scales in zip(prompts, ((0.8,), (), (0.0, 1.0)), strict=True):
            found, expected = (place.draw(pipe, *scales, prompt=prompt) for pipe in (compiled, plain))
            assert_close(found, expected)


def test_a_change_takes_time_once(place: Workplace) -> None:
    with Pipeline.load(place.root, "tensorrt") as pipe:
        chosen = [Lora(file=place.loras[0])]
        seconds = [pipe(**ASKED, loras=loras).seconds["adapt"] for loras in ([], chosen, chosen, [])]
    assert [one > 0 for one in seconds] == [False, True, False, True]


def test_a_failed_refit_leaves_the_base(place: Workplace) -> None:
    """It may have exchanged half of the weights: they are brought back, and the error is the library's."""
    with Pipeline.load(place.root, "tensorrt") as pipe:
        plain = place.draw(pipe)
        fails, library = {"refit_cuda_engine_async"}, place.library
        library.refuses = _Once(fails)
        with pytest.raises(EngineError, match="refit_cuda_engine_async"):
            place.draw(pipe, 0.8)
        np.testing.assert_array_equal(place.draw(pipe), plain)
        assert not np.array_equal(place.draw(pipe, 0.8), plain)


class _Once(set[str]):
    """Names of calls that fail once."""

    def __contains__(self, call: object) -> bool:
        found = super().__contains__(call)
        self.discard(str(call))
        return found


def test_mixed_weights_draw_nothing(place: Workplace) -> None:
    """Where the base cannot be brought back either, every call fails until it can."""
    with Pipeline.load(place.root, "tensorrt") as pipe:
        plain = place.draw(pipe)
        place.library.refuses = {"refit_cuda_engine_async"}
        for scales in ((0.8,), (), ()):
            with pytest.raises(EngineError, match="refit_cuda_engine_async"):
                place.draw(pipe, *scales)
        place.library.refuses = set()
        np.testing.assert_array_equal(place.draw(pipe), plain)


def test_weights_that_were_put_together_are_supplied_together(place: Workplace) -> None:
    (note,) = place.root.glob("engines/tensorrt*/unet.weights.json")
    built = read_weights(note, BuiltWeights)
    initializers = [weight.initializer for weight in built.weights.values()]
    bias = next(name for name in initializers if name.endswith("conv_in.bias"))
    place.library.combined = {initializers[0]: [bias, initializers[1]]}
    with Pipeline.load(place.root, "tensorrt") as compiled, Pipeline.load(place.root, "cpu", threads=1) as plain:
        assert_close(place.draw(compiled, 0.8), place.draw(plain, 0.8))
        place.library.combined = {initializers[0]: ["stage.nobody"]}
        with pytest.raises(EngineError, match=r"'stage\.nobody'"):
            place.draw(compiled, 0.5)
        place.library.combined = {}
        assert_close(place.draw(compiled), place.draw(plain))


def test_engines_that_were_not_built_for_it_are_refused(place: Workplace) -> None:
    for record in list(place.root.glob("engines/tensorrt*/engine.json")):
        if "refit True" in record.read_text():
            shutil.rmtree(record.parent)
    with Pipeline.load(place.root, "tensorrt") as pipe:
        plain = place.draw(pipe)
        with pytest.raises(EngineError, match=r"`latentrt build .* --backend tensorrt --refittable`"):
            place.draw(pipe, 0.8)
        np.testing.assert_array_equal(place.draw(pipe), plain)


def test_what_does_not_fit_is_refused_before_a_refit(place: Workplace, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_9_attentions_0_proj_in"
    tensors = {f"{name}.lora_{half}.weight": np.ones((2, 2), np.float32) for half in ("down", "up")}
    strange = save(tmp_path / "strange.safetensors", tensors)
    with Pipeline.load(place.root, "tensorrt") as pipe:
        place.library.refuses = {"set_named_weights"}
        with pytest.raises(RequestError, check=about("loras")):
            pipe(**ASKED, loras=[Lora(file=strange)])
