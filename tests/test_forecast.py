"""A forecast is the long plan whose missing outputs lie on a line through those before, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt import Batcher, Control, Pipeline, Request
from latentrt.engines.bundle.training import EdmRange, TrainingSchedule
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import STATE_ROWS
from latentrt.runtime.images.preview import predicted_latents
from latentrt.runtime.images.read_parameters import parse
from latentrt.runtime.images.write_png import parameters
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.forecast import LEAST, called_stages, forecast
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised
from tests.refused import about
from tests.sampler_oracle import STABLE_DIFFUSION

EXACT = 1e-6  # of the largest latent: the plan's own numbers are float32
SHARED_DB = 60  # kernels differ by how many rows there are
MORE_THAN_ONCE = {"heun", "plms", "pndm"}  # call the model twice at one noise level
TOO_WIDE = {"unipc_3"}
WISHED: dict[str, Any] = {"prompt": "a red circle", "steps": 12, "forecast": 8, "sampler": "dpmpp_2m", "seed": 3}

Model = Callable[[Array, float], Array]


def schedule_for(name: str, prediction: str) -> TrainingSchedule:
    if prediction == "edm":
        edm = EdmRange(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
        return msgspec.structs.replace(STABLE_DIFFUSION, prediction_type="v_prediction", edm=edm)
    return msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction)  # type: ignore[arg-type]


def walked(plan: SamplingPlan, noise: Array, output_at: Callable[[int, Array], Array]) -> list[Array]:
    """Return the latents after each stage of a plan in float64. output_at: of a stage and what the model sees"""
    state = np.zeros((plan.rows, *noise.shape))
    state[0], found = plan.initial_scale * noise, list[Array]()
    for stage in range(plan.stages):
        output = output_at(stage, np.tensordot(plan.input_rows[stage].astype(np.float64), state, 1))
        stack = np.concatenate([state, output[None], np.zeros((1, *noise.shape))])
        state = np.tensordot(plan.transitions[stage].astype(np.float64), stack, 1)
        found.append(state[0])
    return found


def extrapolating(plan: SamplingPlan, model: Model, called: list[int]) -> Callable[[int, Array], Array]:
    """Return a model that is called at some stages; at the others, the line through its last two outputs goes on."""
    with np.errstate(divide="ignore"):
        at = [float(np.log(np.float64(sigma) / alpha)) for alpha, sigma in plan.levels[:-1]]
    outputs: dict[int, Array] = {}

    def output_at(stage: int, seen: Array) -> Array:
        if stage in called:
            outputs[stage] = model(seen, float(plan.timesteps[stage]))
            return outputs[stage]
        early, late = sorted(outputs)[-2:]
        slope = (outputs[late] - outputs[early]) / (at[late] - at[early])
        return np.asarray(outputs[late] + slope * (at[stage] - at[late]))

    return output_at


def model_of(seed: int) -> Model:
    """Return some nonlinear denoiser."""
    weights = np.random.default_rng(seed).standard_normal((6, 6)) / 3
    return lambda latents, timestep: np.tanh(latents @ weights) + 0.3 * np.sin(timestep / 200 + seed)


KINDS = [(name, prediction) for name, row in SAMPLERS.items() for prediction in row.predictions] + [
    (name, "edm") for name, row in SAMPLERS.items() if row.measured and "v_prediction" in row.predictions
]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    spacing=st.sampled_from([None, "karras", "exponential"]),
    steps=st.integers(8, 60),
    share=st.floats(0, 1),
    strength=st.sampled_from([1.0, 1.0, 0.6]),
    seed=st.integers(0, 99),
)
def test_a_forecast_is_the_long_plan_with_some_outputs_extrapolated(
    kind: tuple[str, str], spacing: str | None, steps: int, share: float, strength: float, seed: int
) -> None:
    name, prediction = kind
    assume(SAMPLERS[name].spaced or spacing is None)
    schedule = schedule_for(name, prediction)
    plan = make_plan(name, schedule, steps=min(steps, 50), spacing=spacing, strength=strength)
    assume(plan.stages > LEAST)
    calls = LEAST + round(share * (plan.stages - 1 - LEAST))
    if plan.draws_noise.any() or name in MORE_THAN_ONCE | TOO_WIDE:
        with pytest.raises(RequestError, check=about("forecast")):
            forecast(plan, calls)
        return
    short, model = forecast(plan, calls), model_of(seed)
    assert (short.stages, short.steps, short.sampler) == (calls, plan.steps, plan.sampler)
    called = called_stages(plan.stages, calls)
    noise = np.random.default_rng(seed).standard_normal((4, 6))
    long = walked(plan, noise, extrapolating(plan, model, called))
    found = walked(short, noise, lambda stage, seen: model(seen, float(short.timesteps[stage])))
    ends = [long[stage - 1] for stage in [*called[1:], plan.stages]]
    for one, other in zip(found, ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=EXACT * largest([noise, *long]))


def largest(path: list[Array]) -> float:
    return max(float(np.abs(one).max()) for one in path)


@given(stages=st.integers(LEAST + 1, 1000), data=st.data())
def test_calls_are_at_both_ends_and_even_between(stages: int, data: st.DataObject) -> None:
    calls = data.draw(st.integers(LEAST, stages - 1))
    called = called_stages(stages, calls)
    assert (len(called), called[:3], called[-1]) == (calls, [0, 1, 2], stages - 1)
    gaps = np.diff(called[2:])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_is_forecast_or_refused(name: str) -> None:
    """Those that draw fresh noise, or call the model twice at a level, cannot be, nor what engines do not hold."""
    plan = make_plan(name, schedule_for(name, SAMPLERS[name].predictions[0]), steps=20)
    if plan.draws_noise.any() or name in MORE_THAN_ONCE | TOO_WIDE:
        with pytest.raises(RequestError, check=about("forecast")):
            forecast(plan, 10)
    else:
        assert forecast(plan, 10).rows <= STATE_ROWS


@pytest.mark.parametrize("calls", [0, LEAST - 1, 20, 21, -8, 8.0, True, "8"])
def test_a_number_of_calls_that_is_none_is_refused(calls: Any) -> None:
    with pytest.raises(RequestError, check=about("forecast")):
        forecast(make_plan("euler", STABLE_DIFFUSION, steps=20), calls)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc", "lms"])
def test_the_models_picture_is_read_from_two_states_of_a_forecast(name: str) -> None:
    plan, model = forecast(make_plan(name, STABLE_DIFFUSION, steps=30), 12), model_of(1)
    state = np.zeros((1, plan.rows, 1, 4, 6), dtype=np.float32)
    state[0, 0] = plan.initial_scale * np.random.default_rng(0).standard_normal((1, 4, 6))
    for stage in range(plan.stages):
        output = model(np.einsum("r,nr...->n...", plan.input_rows[stage], state), float(plan.timesteps[stage]))
        stack = np.concatenate([state, output[:, None], np.zeros_like(output)[:, None]], axis=1)
        after = np.einsum("or,nr...->no...", plan.transitions[stage], stack).astype(np.float32)
        expected = denoised(state[:, 0], output, Level(*map(float, plan.levels[stage])), "epsilon")
        found = predicted_latents(state, after, plan, stage, STABLE_DIFFUSION)
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))
        state = after


# --- what is asked for ---


@pytest.fixture(scope="module")
def pipe(demo_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(demo_bundle, "cpu", threads=2, build=True) as opened:
        yield opened


def psnr(one: Array, other: Array) -> float:
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def test_a_forecast_calls_the_denoiser_so_often_and_is_written_into_the_picture(pipe: Pipeline) -> None:
    result = pipe.draw(Request(**WISHED))
    assert len(result.step_seconds) == 8 and result.settings[0].steps == 12
    assert result.settings[0].further == {"forecast": 8}
    written = parse(parameters(result.settings[0], 3))
    assert (written.steps, written.pairs["Forecast"]) == (12, "8")


def test_a_forecast_shares_its_stages_with_others(pipe: Pipeline) -> None:
    width, height = pipe.manifest.default_size
    image, mask = np.full((height, width, 3), 90, dtype=np.uint8), np.zeros((height, width), dtype=np.uint8)
    mask[: height // 2] = 255
    requests = [
        Request(**WISHED),
        Request(**WISHED | {"forecast": None, "seed": 4}),
        Request(**WISHED | {"sampler": "unipc", "image": image, "mask": mask, "steps": 16}),
    ]
    alone = [pipe.draw(request).pixels[0] for request in requests]
    with Batcher(pipe) as batcher:
        futures = [batcher.submit(request)[0] for request in requests]
        found = [future.result(300).pixels[0] for future in futures]
    for one, other in zip(alone, found, strict=True):
        assert psnr(one, other) >= SHARED_DB


def test_a_mask_keeps_the_image_of_a_forecast(pipe: Pipeline) -> None:
    """What lies outside is what all steps leave there: each kept stage ends at the level that the next begins at."""
    width, height = pipe.manifest.default_size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[: height // 2] = 255
    ends = list[Array]()
    for calls in (8, None):
        seen = list[Array]()
        asked = Request(**WISHED | {"forecast": calls, "image": image, "mask": mask})
        pipe.draw(asked, on_step=lambda step, seen=seen: seen.append(step.latents))  # type: ignore[misc]
        ends.append(seen[-1])
    rows = ends[0].shape[2] // 2
    assert np.array_equal(ends[0][:, :, rows:], ends[1][:, :, rows:])
    assert not np.array_equal(ends[0][:, :, :rows], ends[1][:, :, :rows])


@pytest.mark.parametrize(
    "other",
    [
        {"guidance_interval": (0.2, 0.8)},
        {"skip_layer_guidance": 2.8},
        {"refine_from": 0.8},
        {"controls": [Control(name="edges", image=np.zeros((64, 64, 3), np.uint8), stop=0.5)]},
        {"sampler": "euler_ancestral"},
        {"sampler": "ddim", "eta": 0.5},
        {"steps": 8},
    ],
)
def test_what_changes_midway_and_what_draws_noise_is_refused(pipe: Pipeline, other: dict[str, Any]) -> None:
    with pytest.raises(RequestError, check=about("forecast")):
        pipe.draw(Request(**WISHED | other))


def test_a_forecast_is_nearer_to_the_long_run_than_its_own_few_steps(pipe: Pipeline) -> None:
    common: dict[str, Any] = {"sampler": "euler", "guidance": 3.0, "seed": 0}
    long, forecasted, plain = (
        pipe("a red circle", **common, **how).pixels
        for how in ({"steps": 30}, {"steps": 30, "forecast": 15}, {"steps": 15})
    )
    assert psnr(forecasted, long) > psnr(plain, long) + 3
