"""Skip-layer guidance: a third group of model rows, away from what the denoiser gives without some of its layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import SKIP_LAYERS
from latentrt.engines.workspace.contract import STATE, TEXT
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace, contrast_factor
from latentrt.runtime.draw.denoise import Batch, Loop, begin
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.sampling.guidance import Guidance, plan_guidance, skipping_stages
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.refused import about
from tests.sampler_oracle import STABLE_DIFFUSION
from tests.sketch import SIZE, SPACE, TOKENS, WIDTH, shape_for, skipping_unet, unet

STEPS, SCALE, SKIP, PICTURES = 10, 4.0, 2.8, 2
CLOSE = 1e-5  # of the largest: the same float32 sums in another order
ALL = slice(0, PICTURES)
TEXTS = np.random.default_rng(1).standard_normal((3, PICTURES, TOKENS, WIDTH), dtype=np.float32)
NOISE = np.random.default_rng(2).standard_normal((PICTURES, *SIZE), dtype=np.float32)


def plan_of(sampler: str = "euler", steps: int = STEPS) -> SamplingPlan:
    return make_plan(sampler, STABLE_DIFFUSION, steps=steps)


def drawn(plan: SamplingPlan, guidance: Guidance, network: Any = skipping_unet) -> tuple[list[Array], list[int]]:
    """Return the latents before the first stage and after each, and the model rows of each."""
    rows: list[int] = []

    def counting(inputs: Any) -> dict[str, Array]:
        rows.append(len(inputs["sample"]))
        return dict(network(inputs))

    counting.spec = network.spec  # type: ignore[attr-defined]
    engines: Any = {"unet": counting}
    options: Any = {"state_rows": plan.rows, "denoiser": "unet", "decoder": None}
    workspace = NumpyWorkspace(engines, SPACE, shape_for(PICTURES), **options)
    write_rows(workspace, TEXT, np.concatenate(TEXTS[: guidance.most]), ALL)
    write_rows(workspace, SKIP_LAYERS, np.float32([0, 0, 1]).repeat(PICTURES)[: guidance.most * PICTURES], ALL)
    workspace.write(STATE, begin(plan, NOISE, state_rows=plan.rows))
    batch = Batch(plan=plan, guidance=guidance, draw=lambda: NOISE, slots=ALL, stages=range(plan.stages))
    loop, found = Loop(workspace, "unet"), [workspace.read(STATE)[:, 0]]
    loop.join(batch)
    while batch.running:
        loop.advance()
        found.append(workspace.read(STATE)[:, 0])
    return found, rows


def by_hand(plan: SamplingPlan, groups: Array, *, rescale: float = 0.0) -> list[Array]:
    """Return the same latents, each stage by what diffusers' StableDiffusion3Pipeline writes."""
    latents, found = begin(plan, NOISE, state_rows=1)[:, 0], []
    for stage in range(plan.stages):
        found.append(latents)
        given = {"sample": plan.input_rows[stage, 0] * latents, "timestep": np.repeat(plan.timesteps[stage], PICTURES)}
        own, negative, skipped = (
            skipping_unet({**given, "encoder_hidden_states": TEXTS[part], SKIP_LAYERS: np.float32(part == 2)})[
                "out_sample"
            ]
            for part in range(3)
        )
        mixed = own
        if groups[stage] > 1:
            mixed = negative + SCALE * (own - negative)
        if groups[stage] > 2:
            mixed = mixed + (own - skipped) * SKIP
        if groups[stage] > 1 and rescale:
            mixed = np.stack([one * contrast_factor(o, one, rescale) for o, one in zip(own, mixed, strict=True)])
        latents = plan.transitions[stage, 0, 0] * latents + plan.transitions[stage, 0, 1] * mixed
    return [*found, latents]


@given(steps=st.integers(1, 60), ends=st.tuples(st.integers(0, 100), st.integers(0, 100)))
def test_layers_are_skipped_where_diffusers_skips_them(steps: int, ends: tuple[int, int]) -> None:
    start, stop = sorted(end / 100 for end in ends)
    if start == stop:
        return
    found = skipping_stages(plan_of(steps=steps), start, stop)
    assert found.tolist() == [steps * start < i < steps * stop for i in range(steps)]


@pytest.mark.parametrize("sampler", ["heun", "dpm2"])
def test_a_look_ahead_within_a_step_skips_as_the_step_does(sampler: str) -> None:
    plan = plan_of(sampler)
    groups = plan_guidance(plan, SCALE, 1, skip=SKIP, skip_interval=(0.2, 0.6)).groups
    inside = plan.timesteps[groups == 3]
    assert 2 < len(inside) < plan.stages
    assert ((plan.timesteps >= inside.min()) & (plan.timesteps <= inside.max()) == (groups == 3)).all()


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [4] * 10),
        ({"skip": SKIP}, [4, 6, 4, 4, 4, 4, 4, 4, 4, 4]),
        ({"skip": SKIP, "skip_interval": (0.2, 0.6)}, [4, 4, 4, 6, 6, 6, 4, 4, 4, 4]),
        ({"skip": SKIP, "skip_interval": (0.0, 1.0), "interval": (0.3, 0.7)}, [2, 2, 2, 6, 6, 6, 6, 2, 2, 2]),
        ({"skip": SKIP, "skip_interval": (0.0, 0.5), "rescale": 0.7}, [4, 6, 6, 6, 6, 4, 4, 4, 4, 4]),
    ],
)
def test_pictures_are_led_away_from_what_skipped_layers_give(options: dict[str, Any], rows: list[int]) -> None:
    plan = plan_of()
    guidance = plan_guidance(plan, SCALE, PICTURES, **options)
    found, computed = drawn(plan, guidance)
    assert computed == rows
    for mine, expected in zip(found, by_hand(plan, guidance.groups, rescale=guidance.rescale), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=CLOSE * float(np.abs(expected).max()))


def test_a_scale_of_zero_is_no_skip_layer_guidance() -> None:
    plan = plan_of()
    plain, skipping = (
        plan_guidance(plan, SCALE, PICTURES, skip=0.0, **more) for more in ({}, {"skip_interval": (0, 1)})
    )
    (first, rows), (second, others) = drawn(plan, plain), drawn(plan, skipping)
    assert rows == others == [4] * STEPS
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@given(st.lists(st.floats(0, 30, width=32), min_size=1, max_size=5), st.floats(0, 10, width=32))
def test_the_weights_of_a_pictures_rows_add_up_to_one(scales: list[float], skip: float) -> None:
    guidance = Guidance(scales=np.float32(scales), groups=np.array([1, 2, 3]), rescale=0.0, skip=skip)
    for groups in (1, 2, 3):
        weights = guidance.weights(groups)
        np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-4)
        assert not weights[groups:].any()


@pytest.mark.parametrize(
    ("scale", "options", "field"),
    [
        (SCALE, {"skip": -1.0}, "skip_layer_guidance"),
        (1.0, {"skip": SKIP}, "skip_layer_guidance"),  # nothing is guided
        (SCALE, {"skip": SKIP, "skip_interval": (0.41, 0.49)}, "skip_layer_guidance"),  # between two stages
        (SCALE, {"skip": SKIP, "interval": (0.5, 1.0)}, "skip_layer_guidance"),  # nowhere where it is guided
        (SCALE, {"skip_interval": (0.5, 0.2)}, "skip_layer_interval"),
        (SCALE, {"skip_interval": (0.1, 1.5)}, "skip_layer_interval"),
    ],
)
def test_what_would_skip_nothing_is_refused(scale: float, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        plan_guidance(plan_of(), scale, 1, **options)


def test_a_denoiser_that_skips_nothing_has_no_third_group() -> None:
    """Its workspace holds two rows for a picture, and refuses a third."""
    plan = plan_of()
    with pytest.raises(EngineError):
        drawn(plan, plan_guidance(plan, SCALE, PICTURES, skip=SKIP), unet)
