"""The loop executes any plan, and guidance is a matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.denoise import denoise
from latentrt.runtime.guidance import classifier_free
from latentrt.runtime.noise import TorchCpuNoise
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
