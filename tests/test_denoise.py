"""A workspace walks where a plan says, and guidance is a matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.spec import Array, EngineSpec, Inputs, TensorSpec
from latentrt.engines.workspace.contract import ALL, WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.runtime.draw.denoise import begin
from latentrt.runtime.sampling.catalogue import SAMPLERS, find, sampler_names
from latentrt.runtime.sampling.guidance import Guidance, guidance_rows, guided_stages, plan_guidance
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.noise import TorchCpuNoise
from latentrt.runtime.sampling.plan import SamplingPlan
from tests import loop
from tests.refused import about
from tests.sampler_oracle import SHAPE, STABLE_DIFFUSION, network
from tests.whole_plan import denoise

EXACT = 1e-5  # a weighted sum in float32, of numbers of order one
WALKED = 1e-4  # of range: the same sums in another order, amplified by guidance over a whole trajectory
_, CHANNELS, HEIGHT, WIDTH = SHAPE
SPACE = LatentSpec(channels=CHANNELS, factor=8, scaling_factor=0.5)


def prompted(latents: Array, timesteps: Array, text: Array) -> Array:
    """Stand in for a UNet that reads its prompt, one row at a time."""
    return network(latents, timesteps) * text.mean(axis=(1, 2), dtype=np.float32)[:, None, None, None]


class Unet:
    """`prompted` as an engine that notes how many rows it was given."""

    def __init__(self) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        tensors = tuple(TensorSpec(name=name, dtype="float32", shape=("batch",)) for name in names)
        self.spec = EngineSpec(component="unet", inputs=tensors, outputs=())
        self.rows: list[int] = []
        self.samples: list[Array] = []

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        self.rows.append(len(arrays["sample"]))
        self.samples.append(arrays["sample"])
        return {"out_sample": prompted(arrays["sample"], arrays["timestep"], arrays["encoder_hidden_states"])}


def text(*means: float) -> Array:
    return np.stack([np.full((3, 2), mean, dtype=np.float32) for mean in means])


def latents(count: int, seed: int = 0) -> Array:
    return TorchCpuNoise(seed).normal((count, *SHAPE[1:]))


def workspace_for(plan: SamplingPlan, unet: Any, *, pictures: int = 2, prompts: Array | None = None) -> NumpyWorkspace:
    shape = WorkspaceShape(pictures=pictures, tokens=3, width=8 * WIDTH, height=8 * HEIGHT)
    workspace = NumpyWorkspace({"unet": unet}, SPACE, shape, state_rows=plan.rows, denoiser="unet", decoder=None)
    workspace.write("encoder_hidden_states", text(1, 2, 0.5, 0.25) if prompts is None else prompts)
    return workspace


def follow(workspace: NumpyWorkspace, plan: SamplingPlan, guidance: Guidance, draws: Iterator[Array]) -> list[Array]:
    """Return the latents after each stage."""
    draw = partial(next, draws)
    workspace.write("state", begin(plan, draw(), state_rows=plan.rows))
    return [workspace.read("state")[:, 0] for _ in denoise(workspace, plan, guidance, draw, denoiser="unet")]


def noises(count: int) -> Iterator[Array]:
    generator = TorchCpuNoise(3)
    while True:
        yield generator.normal((count, *SHAPE[1:]))


@pytest.mark.parametrize("scale", [1.0, 2.0])  # the stand-in is chaotic: more would amplify rounding without end
@pytest.mark.parametrize("name", sampler_names())
def test_a_workspace_walks_where_the_plan_says(name: str, scale: float) -> None:
    prediction = SAMPLERS[find(name).sampler].predictions[0]
    plan = make_plan(name, msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction), steps=5)  # type: ignore[arg-type]
    found = follow(workspace_for(plan, Unet()), plan, plan_guidance(plan, scale, 2), noises(2))
    draws = noises(2)
    guided = loop.guided(prompted, text(1, 2), text(0.5, 0.25), scale)
    for mine, expected in zip(found, loop.denoise(plan, next(draws), guided, lambda: next(draws)), strict=True):
        np.testing.assert_allclose(mine, expected, atol=WALKED * float(np.abs(expected).max()))


def test_without_guidance_the_model_sees_one_row_a_picture() -> None:
    plan, unet = make_plan("euler", STABLE_DIFFUSION, steps=3), Unet()
    follow(workspace_for(plan, unet), plan, plan_guidance(plan, 1.0, 2), noises(2))
    assert unet.rows == [2, 2, 2]


def test_outside_its_interval_guidance_costs_nothing() -> None:
    plan, unet = make_plan("dpmpp_2m_karras", STABLE_DIFFUSION, steps=10), Unet()
    follow(workspace_for(plan, unet), plan, plan_guidance(plan, 7.5, 2, interval=(0.2, 0.75)), noises(2))
    assert unet.rows == [2, 2, 4, 4, 4, 4, 4, 4, 2, 2]


def test_only_what_changed_is_written_before_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of model rows: where guidance begins and ends; noise: where it has a weight; one control a stage."""
    plan, written = make_plan("euler_ancestral", STABLE_DIFFUSION, steps=10), list[str]()
    workspace = workspace_for(plan, Unet())
    write = workspace.write

    def note(name: str, array: Any, rows: slice = ALL) -> None:
        written.append(name)
        write(name, array, rows)

    monkeypatch.setattr(workspace, "write", note)
    follow(workspace, plan, plan_guidance(plan, 7.5, 2, interval=(0.2, 0.75)), noises(2))
    assert Counter(written) == {"state": 1, "control": 10, "guidance": 3, "picture_of_row": 3, "noise": 9}


def test_outside_its_interval_the_prompt_alone_is_followed() -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=4)
    found = follow(workspace_for(plan, Unet()), plan, plan_guidance(plan, 7.5, 2, interval=(0, 0.5)), noises(2))
    draws = noises(2)

    def half_guided(x: Array, t: Array) -> Array:
        on = t[0] >= plan.timesteps[1]
        return loop.guided(prompted, text(1, 2), text(0.5, 0.25) if on else None, 7.5)(x, t)

    *_, expected = loop.denoise(plan, next(draws), half_guided, lambda: next(draws))
    np.testing.assert_allclose(found[-1], expected, atol=WALKED * float(np.abs(expected).max()))


def test_a_look_ahead_within_a_guided_step_is_guided() -> None:
    plan = make_plan("heun", STABLE_DIFFUSION, steps=6)
    for start, stop in ((0.0, 0.5), (0.2, 0.8)):
        inside = guided_stages(plan, start, stop)
        assert len(set(inside[1:-1:2] == inside[2::2])) == 1  # the two evaluations of a step stay together


def test_pictures_of_one_batch_do_not_touch_each_other() -> None:
    plan, together = make_plan("dpmpp_2m", STABLE_DIFFUSION, steps=4), latents(3)
    prompts = text(1, 2, 3, 0.5, 0.25, 0.1)

    def last(part: slice) -> Array:
        rows = np.concatenate([prompts[:3][part], prompts[3:][part]])
        workspace = workspace_for(plan, Unet(), pictures=len(rows) // 2, prompts=rows)
        guidance = plan_guidance(plan, 3.0, len(rows) // 2)
        return follow(workspace, plan, guidance, iter([together[part]]))[-1]

    batch = last(slice(None))
    for i in range(3):
        np.testing.assert_allclose(batch[i], last(slice(i, i + 1))[0], atol=EXACT)


def test_noise_is_drawn_only_where_the_sampler_draws() -> None:
    for name, expected in (("euler", 0), ("euler_ancestral", 5)):
        plan, drawn = make_plan(name, STABLE_DIFFUSION, steps=5), []

        def draw(drawn: list[int] = drawn) -> Array:
            drawn.append(1)
            return latents(2)

        workspace = workspace_for(plan, Unet())
        workspace.write("state", begin(plan, latents(2), state_rows=plan.rows))
        list(denoise(workspace, plan, plan_guidance(plan, 1.0, 2), draw, denoiser="unet"))
        assert len(drawn) == expected, name


def test_a_model_that_predicts_the_picture_is_believed_by_the_last_step() -> None:
    picture = latents(2, seed=7)

    class Sure(Unet):
        def __call__(self, inputs: Inputs) -> dict[str, Array]:
            return {"out_sample": picture}

    for name in ("euler", "dpmpp_2m", "euler_ancestral", "ddim"):
        schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type="sample", set_alpha_to_one=True)
        plan = make_plan(name, schedule, steps=6)
        last = follow(workspace_for(plan, Sure()), plan, plan_guidance(plan, 1.0, 2), noises(2))[-1]
        np.testing.assert_allclose(last, picture, atol=EXACT, err_msg=name)


def test_an_image_starts_with_the_noise_of_the_first_stage() -> None:
    image, noise = latents(2, seed=1), latents(2, seed=2)
    plan, unet = make_plan("euler", STABLE_DIFFUSION, steps=3), Unet()
    workspace = workspace_for(plan, unet)
    workspace.write("state", begin(plan, noise, state_rows=plan.rows, image=image))
    next(denoise(workspace, plan, plan_guidance(plan, 1.0, 2), lambda: noise, denoiser="unet"))
    sigma = plan.sigmas[0]
    np.testing.assert_allclose(unet.samples[0], (image + sigma * noise) / np.hypot(sigma, 1), atol=EXACT)


def test_what_is_masked_stays_the_known_picture_at_every_level() -> None:
    plan, image, noise = make_plan("dpmpp_2m", STABLE_DIFFUSION, steps=5), latents(2, seed=1), latents(2, seed=2)
    mask = np.zeros((2, 1, HEIGHT, WIDTH), dtype=np.float32)
    mask[:, :, : HEIGHT // 2] = 1
    workspace = workspace_for(plan, Unet())
    workspace.write("state", begin(plan, noise, state_rows=plan.rows, image=image))
    workspace.write("keep_mask", mask)
    workspace.write("known", np.stack([image, noise], axis=1))
    for k in denoise(workspace, plan, plan_guidance(plan, 1.0, 2), lambda: noise, denoiser="unet"):
        found = workspace.read("state")[:, 0, :, HEIGHT // 2 :]
        level = plan.levels[k]
        np.testing.assert_allclose(found, (level[0] * image + level[1] * noise)[:, :, HEIGHT // 2 :], atol=EXACT)
        assert np.abs(workspace.read("state")[:, 0] - image).max() > 0.1
    np.testing.assert_allclose(found, image[:, :, HEIGHT // 2 :], atol=EXACT)


def test_a_unet_with_more_channels_sees_the_condition_after_the_latents() -> None:
    class Inpainting(Unet):
        def __call__(self, inputs: Inputs) -> dict[str, Array]:
            sample = np.asarray(inputs["sample"])
            self.samples.append(sample)
            return {"out_sample": sample[:, :CHANNELS]}

    plan, unet = make_plan("euler", STABLE_DIFFUSION, steps=2), Inpainting()
    workspace = workspace_for(plan, unet)
    condition = np.random.default_rng(0).standard_normal((2, 5, HEIGHT, WIDTH), dtype=np.float32)
    workspace.write("condition", condition)
    follow(workspace, plan, plan_guidance(plan, 2.0, 2), noises(2))
    assert unet.samples[0].shape == (4, CHANNELS + 5, HEIGHT, WIDTH)
    np.testing.assert_array_equal(unet.samples[0][:, CHANNELS:], np.concatenate([condition, condition]))


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(rescale: float) -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=1)
    x, seen = latents(2), []

    class Noting(Unet):
        def __call__(self, inputs: Inputs) -> dict[str, Array]:
            outputs = super().__call__(inputs)
            seen.append(outputs["out_sample"])
            return outputs

    workspace = workspace_for(plan, Noting())
    last = follow(workspace, plan, plan_guidance(plan, 7.5, 2, rescale=rescale), iter([x]))[-1]
    positive, negative = seen[0][:2], seen[0][2:]
    mixed = torch.from_numpy(negative + 7.5 * (positive - negative))
    output = rescale_noise_cfg(mixed, torch.from_numpy(positive), guidance_rescale=rescale).numpy()
    state = begin(plan, x, state_rows=plan.rows)
    expected = loop.advance(plan.transitions[0], state, output, np.zeros_like(x))[:, 0]
    np.testing.assert_allclose(last, expected, atol=WALKED * float(np.abs(expected).max()))


@given(st.lists(st.floats(0, 30, width=32), min_size=1, max_size=5), st.integers(0, 3))
def test_the_weights_of_a_pictures_rows_add_up_to_one(scales: list[float], padding: int) -> None:
    own, slots = np.array(scales, dtype=np.float32), len(scales)
    matrix, picture_of_row = guidance_rows(np.stack([own, 1 - own]), 2 * slots + padding)
    assert matrix.shape == (slots, 2 * slots + padding) and not matrix[:, 2 * slots :].any()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    assert all(matrix[picture, row] == 0 or picture == picture_of_row[row] for picture, row in np.ndindex(matrix.shape))


def test_each_picture_may_have_its_own_scale_and_slots_may_be_empty() -> None:
    matrix, _ = guidance_rows(np.float32([[1, 5, 0], [0, -4, 0]]), 5)
    np.testing.assert_array_equal(matrix, [[1, 0, 0, 0, 0], [0, 5, 0, 0, -4], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_impossible_guidance_interval_is_refused(start: float, stop: float) -> None:
    with pytest.raises(RequestError, check=about("guidance_interval")):
        guided_stages(make_plan("euler", STABLE_DIFFUSION, steps=4), start, stop)


def test_a_guidance_interval_between_two_stages_is_refused() -> None:
    with pytest.raises(RequestError, check=about("guidance_interval")):
        guided_stages(make_plan("euler", STABLE_DIFFUSION, steps=4), 0.3, 0.4)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, np.ones(3, dtype=np.float32)])
def test_a_guidance_scale_that_is_no_number_or_not_one_a_picture_is_refused(scale: float | Array) -> None:
    with pytest.raises(RequestError, check=about("guidance")):
        plan_guidance(make_plan("euler", STABLE_DIFFUSION, steps=4), scale, 2)


@pytest.mark.parametrize("rescale", [-0.1, 1.5, float("nan")])
def test_an_impossible_guidance_rescale_is_refused(rescale: float) -> None:
    with pytest.raises(RequestError, check=about("guidance_rescale")):
        plan_guidance(make_plan("euler", STABLE_DIFFUSION, steps=4), 7.5, 2, rescale=rescale)


def test_what_was_never_written_is_named() -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=2)
    workspace = workspace_for(plan, Unet())
    with pytest.raises(EngineError, match=r"^state\b"):
        list(denoise(workspace, plan, plan_guidance(plan, 1.0, 2), lambda: latents(2), denoiser="unet"))
    with pytest.raises(EngineError, match=r"^state: .*\(1, 2\).*\(1, 1, 4"):
        workspace.write("state", np.zeros((1, 2), dtype=np.float32))
    with pytest.raises(EngineError, match=r"^pixels\b"):
        workspace.read("pixels")
