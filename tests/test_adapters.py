"""Pictures that follow others through T2I-Adapters: what they add is what they add in diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError, RequestError
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.export.additions.t2i_adapters import adapter_features, block_features
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.defaults import complete
from latentrt.export.inspection import inspect_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control
from tests.conftest import Controlled
from tests.refused import about
from tests.test_control_stage import LEVELS, canonical
from tests.test_controlnets import hint, ours
from tests.test_families import LEAST, theirs
from tests.test_family_stages import on_other_workspaces

pytestmark = pytest.mark.usefixtures("one_thread")

Adapted = Callable[[str], Controlled]
SIZE: dict[str, Any] = {"width": 40, "height": 32}
ATTENDING, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
PIPELINES = {
    "sd1": diffusers.StableDiffusionAdapterPipeline,
    "sdxl": diffusers.StableDiffusionXLAdapterPipeline,
}


def reference(made: Controlled, family: str, *names: str) -> Any:
    networks = [diffusers.T2IAdapter.from_pretrained(made.networks[name]) for name in names]
    adapter = diffusers.MultiAdapter(networks) if len(networks) > 1 else networks[0]
    pipe = PIPELINES[family].from_pretrained(made.checkpoint, adapter=adapter)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(found: Array, expected: Array) -> float:
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return float("inf") if error == 0 else 20 * np.log10(255) - 10 * np.log10(error)


@pytest.mark.parametrize("family", PIPELINES)
def test_one_adapter_draws_the_picture_of_diffusers(adapted: Adapted, family: str) -> None:
    made = adapted(family)
    pipe = reference(made, family, "sketch")
    expected = theirs(pipe, image=hint(), guidance_scale=3.0, adapter_conditioning_scale=0.7, **SIZE)
    assert psnr(ours(made, Control(name="sketch", image=hint(), scale=0.7)), expected) >= LEAST
    assert psnr(ours(made, size=(40, 32)), expected) < LEAST  # and without it, another picture


def test_an_adapter_stops_where_diffusers_does(adapted: Adapted) -> None:
    made = adapted("sdxl")
    pipe = reference(made, "sdxl", "sketch")
    expected = theirs(
        pipe, image=hint(), guidance_scale=3.0, adapter_conditioning_factor=0.5, num_inference_steps=5, **SIZE
    )
    assert psnr(ours(made, Control(name="sketch", image=hint(), stop=0.5), steps=5), expected) >= LEAST
    assert psnr(ours(made, Control(name="sketch", image=hint()), steps=5), expected) < LEAST


def test_two_adapters_add_up_as_in_diffusers(adapted: Adapted) -> None:
    made = adapted("sdxl")
    pipe = reference(made, "sdxl", "sketch", "outline")
    expected = theirs(pipe, image=[hint(0), hint(1)], guidance_scale=3.0, adapter_conditioning_scale=[0.6, 1.2], **SIZE)
    controls = [Control(name="sketch", image=hint(0), scale=0.6), Control(name="outline", image=hint(1), scale=1.2)]
    assert psnr(ours(made, *controls), expected) >= LEAST


def test_an_adapter_of_grey_pictures_reads_them(adapted: Adapted) -> None:
    made = adapted("sd1")
    pipe = reference(made, "sd1", "outline")
    expected = theirs(pipe, image=hint().convert("L"), guidance_scale=3.0, **SIZE)
    assert psnr(ours(made, Control(name="outline", image=hint().convert("L"))), expected) >= LEAST


REQUESTS: dict[str, dict[str, Any]] = {
    "one": {"controls": [Control(name="sketch", image=hint(0))]},
    "none, after one": {},
    "each at a part of the steps": {
        "controls": [
            Control(name="sketch", image=hint(0), stop=0.5),
            Control(name="outline", image=hint(1), start=0.25),
        ]
    },
    "with a ControlNet": {
        "controls": [Control(name="edges", image=hint(2), stop=0.75), Control(name="sketch", image=hint(0), scale=0.5)]
    },
    "guided for a while": {"controls": [Control(name="sketch", image=hint(0))], "guidance_interval": (0.3, 0.8)},
    "two pictures, each with its own": {"controls": [Control(name="sketch", image=[hint(0), hint(1)])], "n": 2},
}


def draw(pipe: Pipeline, name: str) -> Array:
    common = {"prompt": "a red circle", "sampler": "euler", "size": (40, 32), "steps": 4, "seed": 3, "guidance": 3.0}
    return pipe(**common | REQUESTS[name]).pixels


@pytest.mark.parametrize("family", PIPELINES)
def test_every_workspace_draws_what_numpy_draws(
    adapted: Adapted, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = adapted(family).bundle
    with canonical(), Pipeline.load(bundle, "cpu", threads=1) as pipe:
        expected = {name: draw(pipe, name) for name in REQUESTS}
    assert not np.array_equal(expected["one"], expected["none, after one"])
    for pipe in on_other_workspaces(bundle, tmp_path, monkeypatch, size=(40, 32)):
        for name, wanted in expected.items():
            assert np.abs(draw(pipe, name).astype(int) - wanted.astype(int)).max() <= LEVELS, name
    assert all(row.ok for row in verify(Bundle.open(tmp_path / "compiled"), backend="tensorrt"))


@pytest.mark.parametrize(
    ("config", "unet"),
    [
        (
            {"adapter_type": "full_adapter", "channels": [32, 64, 96, 96]},
            {"block_out_channels": [32, 64, 96, 96], "down_block_types": [ATTENDING] * 3 + [PLAIN]},
        ),
        (
            {"adapter_type": "light_adapter", "channels": [32, 64, 96], "num_res_blocks": 4},
            {"block_out_channels": [32, 64, 96, 96], "down_block_types": [ATTENDING] * 3 + [PLAIN]},
        ),
        (
            {"adapter_type": "full_adapter_xl", "channels": [32, 64, 96, 96], "downscale_factor": 16},
            {"block_out_channels": [32, 64, 96], "down_block_types": [PLAIN] + [ATTENDING] * 2},
        ),
    ],
)  # fmt: skip
def test_features_of_the_published_kinds_are_what_the_blocks_take(config: dict[str, Any], unet: dict[str, Any]) -> None:
    """Against a run of diffusers' own adapter, 96x64 pixels at eight pixels a latent."""
    found = diffusers.T2IAdapter(**config)(torch.zeros(1, 3, 64, 96))
    sizes = adapter_features(complete("adapter", config, where="x"), factor=8)
    assert [tensor.shape for tensor in found] == [(1, width, -(-8 // n), -(-12 // n)) for width, n in sizes]
    assert sizes in (block_features(unet), block_features(unet)[:-1])


def test_what_cannot_be_followed_is_refused_in_a_sentence(adapted: Adapted) -> None:
    made = adapted("sdxl")
    with pytest.raises(RequestError, check=about("controls")):
        ours(made, Control(name="sketch", image=hint()), size=(36, 28))
    with pytest.raises(RequestError, check=about("controls")):
        ours(made, Control(name="pose", image=hint()))


def test_another_checkpoints_adapter_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    made = adapted("sd1")

    def open_with(path: Path | str) -> None:
        options = CheckpointOptions(adapters=(ControlNetOption(name="a", path=str(path)),))
        open_checkpoint(str(made.checkpoint), options=options)

    with pytest.raises(CheckpointError, match="--adapter a='nowhere'"):
        open_with("nowhere")
    with pytest.raises(CheckpointError, match=r" 16 .* 1/2\b"):
        open_with(adapted("sdxl").networks["sketch"])
    with pytest.raises(CheckpointError, match=r"ControlNetModel.*T2IAdapter"):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
        open_with(tmp_path)
    network = ControlNetOption(name="a", path=str(made.networks["sketch"]))
    with pytest.raises(CheckpointError, match=r"^--adapter: .*'a'"):
        open_checkpoint(str(made.checkpoint), options=CheckpointOptions(adapters=(network, network)))
    assert "--adapter NAME=" in (inspect_checkpoint(str(made.networks["sketch"])).problem or "")
