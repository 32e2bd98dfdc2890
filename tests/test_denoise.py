"""The loop executes any plan, and guidance is a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.denoise import denoise
from latentrt.runtime.guidance import Denoiser, Interval, Model, classifier_free, guidance_interval
from latentrt.runtime.noise import TorchCpuNoise
from latentrt.runtime.plan import SamplingPlan
from latentrt.runtime.samplers import make_plan
from tests.sampler_oracle import SHAPE, STABLE_DIFFUSION, network

EXACT = 1e-5  # a weighted sum in float32, of numbers of order one


def prompted(latents: Array, timesteps: Array, text: Array) -> Array:
    """Stand in for a UNet that reads its prompt, one row at a time."""
    return network(latents, timesteps) * text.mean(axis=(1, 2), dtype=np.float32)[:, None, None, None]


def text(*means: float) -> Array:
    return np.stack([np.full((3, 2), mean, dtype=np.float32) for mean in means])


def latents(count: int, seed: int = 0) -> Array:
    return TorchCpuNoise(seed).normal((count, *SHAPE[1:]))


def test_guidance_goes_from_the_negative_output_through_the_prompts() -> None:
    x, t = latents(2), np.full(2, 10, dtype=np.float32)
    positive, negative = prompted(x, t, text(1, 2)), prompted(x, t, text(0.5, 0.25))
    guided = classifier_free(prompted, text(1, 2), text(0.5, 0.25), 7.5)(x, t)
    np.testing.assert_allclose(guided, negative + 7.5 * (positive - negative), atol=EXACT)


@pytest.mark.parametrize(("negative", "guidance"), [(None, 7.5), (text(0.5, 0.5), 1.0)])
def test_without_guidance_the_model_sees_one_row_a_picture(negative: Array | None, guidance: float) -> None:
    seen: list[int] = []

    def counting(x: Array, t: Array, prompt: Array) -> Array:
        seen.append(len(x))
        return prompted(x, t, prompt)

    x, t = latents(2), np.full(2, 10, dtype=np.float32)
    guided = classifier_free(counting, text(1, 2), negative, guidance)(x, t)
    assert seen == [2]
    np.testing.assert_array_equal(guided, prompted(x, t, text(1, 2)))


def test_a_negative_prompt_of_another_shape_is_refused() -> None:
    with pytest.raises(RequestError, match=r"found shape \(1, 3, 2\), expected \(2, 3, 2\)"):
        classifier_free(prompted, text(1, 2), text(0.5), 7.5)


def test_pictures_of_one_batch_do_not_touch_each_other() -> None:
    plan, together = make_plan("dpmpp_2m", STABLE_DIFFUSION, steps=4), latents(3)
    *_, batch = denoise(plan, together, network, lambda: together)
    for picture, alone in zip(batch, together, strict=True):
        *_, single = denoise(plan, alone[None], network, lambda: together)
        np.testing.assert_allclose(single[0], picture, atol=EXACT)


def test_noise_is_drawn_only_where_the_sampler_draws() -> None:
    drawn: list[int] = []

    def draw() -> Array:
        drawn.append(1)
        return latents(1)

    for name, expected in (("euler", 0), ("euler_ancestral", 5)):
        drawn.clear()
        list(denoise(make_plan(name, STABLE_DIFFUSION, steps=5), latents(1), network, draw))
        assert len(drawn) == expected, name


def test_every_yielded_array_is_the_callers_to_keep() -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=3)
    kept = [(x, x.copy()) for x in denoise(plan, latents(1), network, lambda: latents(1))]
    assert all(np.array_equal(x, copy) for x, copy in kept)


def test_a_model_that_predicts_the_picture_is_believed_by_the_last_step() -> None:
    picture = latents(1, seed=7)
    for name in ("euler", "dpmpp_2m", "euler_ancestral", "ddim"):
        schedule = replace(STABLE_DIFFUSION, prediction_type="sample", set_alpha_to_one=True)
        plan = make_plan(name, schedule, steps=6)
        *_, last = denoise(plan, latents(1), lambda x, t: picture, lambda: latents(1))
        np.testing.assert_allclose(last, picture, atol=EXACT, err_msg=name)


def test_an_image_starts_with_the_noise_of_the_first_stage() -> None:
    image, noise = latents(1, seed=1), latents(1, seed=2)
    plan = make_plan("euler", STABLE_DIFFUSION, steps=3)
    seen: list[Array] = []

    def look(x: Array, t: Array) -> Array:
        seen.append(x)
        return network(x, t)

    next(denoise(plan, noise, look, lambda: noise, image=image))
    sigma = plan.sigmas[0]
    np.testing.assert_allclose(seen[0], (image + sigma * noise) / np.hypot(sigma, 1), atol=EXACT)


def rows_seen(plan: SamplingPlan, denoiser_of: Callable[[Model], Denoiser]) -> list[int]:
    """Return how many rows the model computes at each stage."""
    seen: list[int] = []

    def counting(x: Array, t: Array, prompt: Array) -> Array:
        seen.append(len(x))
        return prompted(x, t, prompt)

    list(denoise(plan, latents(2), denoiser_of(counting), lambda: latents(2)))
    return seen


def test_outside_its_interval_guidance_costs_nothing() -> None:
    plan = make_plan("dpmpp_2m_karras", STABLE_DIFFUSION, steps=10)
    interval = guidance_interval(plan, 0.2, 0.75)
    seen = rows_seen(plan, lambda m: classifier_free(m, text(1, 2), text(0.5, 0.5), 7.5, interval=interval))
    assert seen == [2, 2, 4, 4, 4, 4, 4, 4, 2, 2]


def test_outside_its_interval_the_output_is_the_prompts_own() -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=4)
    guided = classifier_free(prompted, text(1, 2), text(0.5, 0.5), 7.5, interval=guidance_interval(plan, 0, 0.5))
    everywhere = classifier_free(prompted, text(1, 2), text(0.5, 0.5), 7.5)
    for k, timestep in enumerate(plan.timesteps):
        x, t = latents(2), np.full(2, timestep, dtype=np.float32)
        expected = everywhere(x, t) if k < 2 else prompted(x, t, text(1, 2))
        np.testing.assert_array_equal(guided(x, t), expected)


def test_pictures_at_different_timesteps_are_guided_each_for_itself() -> None:
    denoiser = classifier_free(prompted, text(1, 2), text(0.5, 0.25), 3.0, interval=Interval(500, 900))
    x, t = latents(2), np.array([600, 100], dtype=np.float32)
    found, plain = denoiser(x, t), prompted(x, t, text(1, 2))
    negative = prompted(x, t, text(0.5, 0.25))
    np.testing.assert_allclose(found[0], negative[0] + 3 * (plain[0] - negative[0]), atol=EXACT)
    np.testing.assert_allclose(found[1], plain[1], atol=EXACT)


def test_each_picture_may_have_its_own_scale_and_at_one_costs_one_row() -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=3)
    scales = np.array([1.0, 5.0], dtype=np.float32)
    assert rows_seen(plan, lambda m: classifier_free(m, text(1, 2), text(0.5, 0.5), scales)) == [3, 3, 3]
    x, t = latents(2), np.full(2, 7, dtype=np.float32)
    found = classifier_free(prompted, text(1, 2), text(0.5, 0.5), scales)(x, t)
    for i, scale in enumerate((1.0, 5.0)):
        alone = classifier_free(prompted, text(1, 2)[i : i + 1], text(0.5, 0.5)[:1], scale)(x[i : i + 1], t[:1])
        np.testing.assert_allclose(found[i], alone[0], atol=EXACT)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(rescale: float) -> None:
    x, t = latents(2), np.full(2, 10, dtype=np.float32)
    positive, negative = prompted(x, t, text(1, 2)), prompted(x, t, text(0.5, 0.25))
    mixed = torch.from_numpy(negative + 7.5 * (positive - negative))
    expected = rescale_noise_cfg(mixed, torch.from_numpy(positive), guidance_rescale=rescale).numpy()
    found = classifier_free(prompted, text(1, 2), text(0.5, 0.25), 7.5, rescale=rescale)(x, t)
    np.testing.assert_allclose(found, expected, atol=EXACT)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_impossible_guidance_interval_is_refused(start: float, stop: float) -> None:
    with pytest.raises(RequestError, match=r"guidance interval: .* expected 0 <= start < stop <= 1"):
        guidance_interval(make_plan("euler", STABLE_DIFFUSION, steps=4), start, stop)


def test_a_guidance_interval_between_two_stages_is_refused() -> None:
    with pytest.raises(RequestError, match=r"no one of 4 stages lies from 0\.3 to 0\.4"):
        guidance_interval(make_plan("euler", STABLE_DIFFUSION, steps=4), 0.3, 0.4)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), np.ones(3, dtype=np.float32)])
def test_a_guidance_scale_that_is_no_number_or_not_one_a_picture_is_refused(guidance: float | Array) -> None:
    with pytest.raises(RequestError, match="guidance: found"):
        classifier_free(prompted, text(1, 2), text(0.5, 0.25), guidance)


@pytest.mark.parametrize("rescale", [-0.1, 1.5, float("nan")])
def test_an_impossible_guidance_rescale_is_refused(rescale: float) -> None:
    with pytest.raises(RequestError, match="guidance rescale: found"):
        classifier_free(prompted, text(1, 2), text(0.5, 0.25), 7.5, rescale=rescale)
