"""The fused denoise stage computes what the NumPy loop computes, for every sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import STATE_ROWS, control_width
from latentrt.runtime.draw.denoise import pack_controls
from latentrt.runtime.sampling.catalogue import SAMPLERS, find, sampler_names
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.loop import denoise
from tests.loop import guided as follow

RANGE = 1e-5  # of the largest latent of a stage: the same float32 sums in another order
STEPS = 6
GUIDANCE = 4.0


@dataclass(frozen=True)
class Workbench:
    """The canonical UNet and the fused stage of one bundle, in ONNX Runtime."""

    unet: Any
    fused: Any
    schedule: TrainingSchedule
    channels: int
    text_shape: tuple[int, int]

    def model(self, latents: Array, timesteps: Array, text: Array) -> Array:
        feeds = {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text}
        return np.asarray(self.unet.run(None, {name: np.float32(array) for name, array in feeds.items()})[0])

    def stage(self, **inputs: Array) -> Array:
        return np.asarray(self.fused.run(None, inputs)[0])

    def nothing_kept(self, pictures: Sequence[object]) -> dict[str, Array]:
        """What keeps no part of any picture."""
        count, size = len(pictures), (self.channels, 8, 8)
        return {
            "keep_mask": np.ones((count, 1, *size[1:]), dtype=np.float32),
            "known": np.zeros((count, 2, *size), dtype=np.float32),
        }

    def normal(self, seed: int, *shape: int) -> Array:
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)

    def noise(self, seed: int) -> Array:
        return self.normal(seed, 1, self.channels, 8, 8)

    def text(self, seed: int) -> Array:
        return self.normal(seed, 1, *self.text_shape)


@pytest.fixture(scope="module")
def bench(sd1_bundle: Path) -> Workbench:
    bundle = Bundle.open(sd1_bundle)
    component = bundle.manifest.components["unet"]
    graph = onnx.load(str(bundle.path(component.graph)))
    _, length, width = component.inputs[2].shape
    return Workbench(
        unet=_session(graph),
        fused=_session(fuse_stage(graph)),
        schedule=bundle.manifest.schedule,
        channels=bundle.manifest.latents.channels,
        text_shape=(length if isinstance(length, int) else 77, int(width)),
    )


def _session(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the networks are tiny: threads would only wait for each other
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def plan_of(name: str, schedule: TrainingSchedule) -> SamplingPlan:
    """Make the plan of any sampler, for a model that predicts what the sampler needs."""
    predictions = SAMPLERS[find(name).sampler].predictions
    if str(schedule.prediction_type) not in predictions:
        schedule = msgspec.structs.replace(schedule, prediction_type=predictions[0])  # type: ignore[arg-type]
    return make_plan(name, schedule, steps=STEPS)


def draws(seed: int, shape: tuple[int, ...]) -> Callable[[], Array]:
    generator = np.random.default_rng(seed)
    return lambda: generator.standard_normal(shape, dtype=np.float32)


class Picture:
    """One picture on its way through the fused stage, with the loop's latents to compare with."""

    def __init__(self, bench: Workbench, plan: SamplingPlan, seed: int, *, guided: bool) -> None:
        start, text, negative = bench.noise(seed), bench.text(seed + 50), bench.text(seed + 60)
        self.plan, self.stage = plan, 0
        self.rows = [text, negative] if guided else [text]
        self.weights = [GUIDANCE, 1 - GUIDANCE] if guided else [1.0]
        self.state = np.zeros((STATE_ROWS, *start.shape[1:]), dtype=np.float32)
        self.state[0] = plan.initial_scale * start[0]
        self.draw = draws(seed, start.shape)
        denoiser = follow(bench.model, text, negative if guided else None, GUIDANCE)
        self.expected: Iterator[Array] = denoise(plan, start, denoiser, draws(seed, start.shape))

    @property
    def running(self) -> bool:
        return self.stage < self.plan.stages

    def take_noise(self) -> Array:
        fresh = self.draw()[0] if self.plan.draws_noise[self.stage] else np.zeros_like(self.state[0])
        return np.asarray(fresh, dtype=np.float32)


def advance_together(bench: Workbench, pictures: list[Picture]) -> float:
    """Advance pictures by one stage each in one call; return the largest difference from the loop, of range."""
    state = bench.stage(
        **bench.nothing_kept(pictures),
        state=np.stack([picture.state for picture in pictures]),
        control=np.stack([pack_controls(picture.plan, STATE_ROWS)[picture.stage] for picture in pictures]),
        noise=np.stack([picture.take_noise() for picture in pictures]),
        **rows_of(pictures),
    )
    worst = 0.0
    for picture, advanced in zip(pictures, state, strict=True):
        picture.state, picture.stage = advanced, picture.stage + 1
        expected = next(picture.expected)[0]
        worst = max(worst, float(np.max(np.abs(advanced[0] - expected)) / np.max(np.abs(expected))))
    return worst


def rows_of(pictures: list[Picture]) -> dict[str, Array]:
    """The prompts of all pictures, then the negative prompts of those that are guided."""
    owners = [(number, part) for part in (0, 1) for number, one in enumerate(pictures) if part < len(one.rows)]
    matrix = np.zeros((len(pictures), len(owners)), dtype=np.float32)
    for row, (number, part) in enumerate(owners):
        matrix[number, row] = pictures[number].weights[part]
    return {
        "guidance": matrix,
        "picture_of_row": np.array([number for number, _ in owners]),
        "encoder_hidden_states": np.concatenate([pictures[number].rows[part] for number, part in owners]),
    }


@pytest.mark.parametrize("name", sampler_names())
def test_the_fused_stage_walks_where_the_loop_walks(bench: Workbench, name: str) -> None:
    """Two pictures in one call, in whole trajectories: one guided, the other not guided and a stage behind."""
    plan = plan_of(name, bench.schedule)
    first, second = Picture(bench, plan, 1, guided=True), Picture(bench, plan, 2, guided=False)
    worst = advance_together(bench, [first])
    while second.running:
        worst = max(worst, advance_together(bench, [picture for picture in (first, second) if picture.running]))
    assert worst <= RANGE


def test_pictures_of_different_samplers_share_a_call(bench: Workbench) -> None:
    names = {"euler": True, "unipc": False, "pndm": True, "euler_ancestral": False}
    pictures = [
        Picture(bench, plan_of(name, bench.schedule), seed, guided=guided)
        for seed, (name, guided) in enumerate(names.items())
    ]
    worst = 0.0
    while running := [picture for picture in pictures if picture.running]:
        worst = max(worst, advance_together(bench, running))
    assert worst <= RANGE


def test_every_sampler_fits_the_fused_stage(bench: Workbench) -> None:
    rows = {name: plan_of(name, bench.schedule).rows for name in sampler_names()}
    assert max(rows.values()) == STATE_ROWS, rows


def test_a_plan_that_keeps_more_than_the_graph_is_refused(bench: Workbench) -> None:
    with pytest.raises(EngineError, match=r"^unipc .* 4 .* 2; .*--state-rows"):
        pack_controls(plan_of("unipc", bench.schedule), 2)


def test_control_rows_pad_smaller_plans_with_zeros(bench: Workbench) -> None:
    plan = plan_of("euler", bench.schedule)
    row = pack_controls(plan, 3)[3]
    assert row.shape == (control_width(3),) and row.dtype == np.float32
    np.testing.assert_array_equal(row[:4], np.float32([plan.timesteps[3], 0, *plan.levels[4]]))
    np.testing.assert_array_equal(row[4:7], np.float32([plan.input_rows[3, 0], 0, 0]))
    transition = row[7:].reshape(3, 5)
    np.testing.assert_array_equal(transition[0, [0, 3, 4]], plan.transitions[3, 0])
    assert np.count_nonzero(transition) == np.count_nonzero(plan.transitions[3])


def test_a_graph_that_is_no_unet_is_refused(sd1_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r" latent_sample .* 1 .* sample, timestep"):
        fuse_stage(load_graph(sd1_bundle / "onnx/vae_decoder/model.onnx"))


def test_the_fused_graph_is_valid_onnx(sd1_bundle: Path) -> None:
    unet = onnx.load(str(sd1_bundle / "onnx/unet/model.onnx"))
    before = unet.SerializeToString()
    onnx.checker.check_model(fuse_stage(unet, state_rows=2))
    assert unet.SerializeToString() == before  # what was given is not changed
