"""Pictures that follow others: what ControlNets add is what they add in diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.controls import followed_stages
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control
from tests.conftest import Controlled, Make, MakeControlled
from tests.refused import about
from tests.test_families import LEAST, PROMPT, SEED, STEPS, psnr, theirs
from tests.test_pipeline_images import left_half, photo

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE: dict[str, Any] = {"width": 40, "height": 32}
PIPELINES = {
    ("sd1", "text"): diffusers.StableDiffusionControlNetPipeline,
    ("sd1", "image"): diffusers.StableDiffusionControlNetImg2ImgPipeline,
    ("sd1", "mask"): diffusers.StableDiffusionControlNetInpaintPipeline,
    ("sdxl", "text"): diffusers.StableDiffusionXLControlNetPipeline,
    ("sdxl", "image"): diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    ("sdxl", "mask"): diffusers.StableDiffusionXLControlNetInpaintPipeline,
}


def hint(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture to follow, all noise: nothing of it can be lost without a trace."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference(kind: Any, controlled: Controlled, *names: str, scheduler: Any = diffusers.EulerDiscreteScheduler) -> Any:
    networks = [diffusers.ControlNetModel.from_pretrained(controlled.networks[name]) for name in names]
    pipe = kind.from_pretrained(controlled.checkpoint, controlnet=networks if len(networks) > 1 else networks[0])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(controlled: Controlled, *controls: Control, **request: Any) -> Array:
    defaults = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "sampler": "euler", "guidance": 3.0}
    with Pipeline.load(controlled.bundle, "cpu", threads=1) as pipe:
        return pipe(**defaults | request, controls=controls).pixels


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_controlnet_draws_the_picture_of_diffusers(controlled: MakeControlled, family: str) -> None:
    made = controlled(family, "")
    pipe = reference(PIPELINES[family, "text"], made, "edges")
    expected = theirs(pipe, image=hint(), guidance_scale=3.0, controlnet_conditioning_scale=0.7, **SIZE)
    found = ours(made, Control(name="edges", image=hint(), scale=0.7))
    assert psnr(found, expected) >= LEAST
    assert psnr(ours(made, size=(40, 32)), expected) < 30  # and without it, another picture


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_controlnets_at_different_parts_of_the_steps(controlled: MakeControlled, family: str) -> None:
    made = controlled(family, "")
    pipe = reference(PIPELINES[family, "text"], made, "edges", "depth")
    expected = theirs(
        pipe,
        image=[hint(0), hint(1)],
        guidance_scale=3.0,
        controlnet_conditioning_scale=[0.6, 1.3],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.7, 1.0],
        num_inference_steps=6,
        **SIZE,
    )
    edges = Control(name="edges", image=hint(0), scale=0.6, stop=0.7)
    depth = Control(name="depth", image=hint(1), scale=1.3, start=0.4)
    assert psnr(ours(made, edges, depth, steps=6), expected) >= LEAST
    assert psnr(ours(made, depth, edges, steps=6), expected) >= LEAST
    assert psnr(ours(made, edges, steps=6), expected) < LEAST


@pytest.mark.parametrize("start", ["image", "mask"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_image_to_start_from_and_one_to_follow(controlled: MakeControlled, family: str, start: str) -> None:
    made = controlled(family, "")
    pipe = reference(PIPELINES[family, start], made, "edges")
    masked = {"mask_image": left_half()} if start == "mask" else {}
    expected = theirs(
        pipe, image=photo(), control_image=hint(), strength=0.6, guidance_scale=3.0, num_inference_steps=6,
        control_guidance_end=0.8, controlnet_conditioning_scale=0.9, **masked, **SIZE,
    )  # fmt: skip
    request = {"mask": left_half()} if start == "mask" else {}
    control = Control(name="edges", image=hint(), scale=0.9, stop=0.8)
    found = ours(made, control, image=photo(), strength=0.6, steps=6, **request)
    assert psnr(found, expected) >= LEAST
    assert psnr(ours(made, image=photo(), strength=0.6, steps=6, **request), expected) < LEAST


def test_a_solver_that_evaluates_twice_a_step_follows_as_diffusers_does(controlled: MakeControlled) -> None:
    made = controlled("sd1", "")
    pipe = reference(PIPELINES["sd1", "text"], made, "edges", scheduler=diffusers.HeunDiscreteScheduler)
    expected = theirs(pipe, image=hint(), guidance_scale=3.0, control_guidance_end=0.5, **SIZE)
    assert psnr(ours(made, Control(name="edges", image=hint(), stop=0.5), sampler="heun"), expected) >= LEAST


def test_a_hint_of_another_size_is_resized_as_diffusers_does(controlled: MakeControlled) -> None:
    made = controlled("sd1", "")
    pipe = reference(PIPELINES["sd1", "text"], made, "edges")
    expected = theirs(pipe, image=hint(size=(90, 50)), guidance_scale=3.0, **SIZE)
    assert psnr(ours(made, Control(name="edges", image=hint(size=(90, 50))), size=(40, 32)), expected) >= LEAST


def test_sides_that_no_level_halves_evenly(controlled: MakeControlled) -> None:
    made = controlled("sd1", "")
    pipe = reference(PIPELINES["sd1", "text"], made, "edges")
    odd = hint(size=(36, 28))  # 9 by 7 latents
    expected = theirs(pipe, image=odd, guidance_scale=3.0, width=36, height=28)
    assert psnr(ours(made, Control(name="edges", image=odd)), expected) >= LEAST


def test_an_inpainting_unet_and_a_consistency_model_follow(controlled: MakeControlled) -> None:
    made = controlled("sd1", "inpainting")
    pipe = reference(PIPELINES["sd1", "mask"], made, "edges")
    images = {"image": photo(), "mask_image": left_half(), "control_image": hint()}
    expected = theirs(pipe, **images, controlnet_conditioning_scale=1.0, strength=1.0, guidance_scale=3.0, **SIZE)
    control = Control(name="edges", image=hint())
    assert psnr(ours(made, control, image=photo(), mask=left_half(), size=(40, 32)), expected) >= LEAST
    made = controlled("sd1", "lcm")
    pipe = reference(PIPELINES["sd1", "text"], made, "edges", scheduler=diffusers.LCMScheduler)
    expected = theirs(pipe, image=hint(), guidance_scale=4.0, **SIZE)
    assert psnr(ours(made, control, sampler="lcm", guidance=4.0), expected) >= LEAST


def test_each_picture_of_a_batch_follows_its_own(controlled: MakeControlled) -> None:
    made = controlled("sd1", "")
    together = ours(made, Control(name="edges", image=[hint(0), hint(1)]), n=2, seed=[5, 6])
    for picture, (seed, image) in enumerate([(5, hint(0)), (6, hint(1))]):
        alone = ours(made, Control(name="edges", image=image), seed=seed)[0]
        assert np.abs(together[picture].astype(int) - alone.astype(int)).max() <= 1


def test_a_bundle_with_controlnets_draws_without_them_as_one_without(controlled: MakeControlled, made: Make) -> None:
    bundle = controlled("sdxl", "")
    plain = made("sdxl", "")[1]
    with Pipeline.load(plain, "cpu", threads=1) as pipe:
        expected = pipe(PROMPT, steps=STEPS, seed=SEED, sampler="euler", guidance=3.0).pixels
    assert np.abs(ours(bundle).astype(int) - expected.astype(int)).max() <= 1
    nothing = ours(bundle, Control(name="edges", image=hint(), scale=0), size=None)
    assert nothing.shape == (1, 32, 40, 3)  # the size is still the image's


def test_a_bundle_without_controlnets_pays_nothing(made: Make) -> None:
    with Pipeline.load(made("sd1", "")[1], "cpu") as pipe:
        assert not any("residual" in spec.name for spec in pipe.manifest.components["unet"].inputs)
        assert not any("controlnet" in name for name in pipe.manifest.components)


@pytest.mark.parametrize(
    "controls",
    [
        [Control(name="pose", image=hint())],
        [Control(name="edges", image="nowhere.png")],
        [Control(name="edges", image=3)],  # type: ignore[arg-type]
        [Control(name="edges", image=np.zeros((8, 8, 2)))],
        [Control(name="edges", image=[hint(), hint(), hint()])],
        [Control(name="edges", image=hint(), scale="strong")],  # type: ignore[arg-type]
        [Control(name="edges", image=hint(), scale=float("nan"))],
        [Control(name="edges", image=hint(), start=0.5, stop=0.5)],
        [Control(name="edges", image=hint(), start=0.4, stop=0.45)],
        [Control(name="edges", image=hint())] * 2,
        ["edges"],
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_in_a_sentence(controlled: MakeControlled, controls: Any) -> None:
    with pytest.raises(RequestError, check=about("controls")):
        ours(controlled("sd1", ""), *controls)


def test_a_bundle_without_any_says_how_to_export_one(made: Make) -> None:
    with Pipeline.load(made("sd1", "")[1], "cpu") as pipe, pytest.raises(RequestError, check=about("controls")):
        pipe(PROMPT, controls=[Control(name="edges", image=hint())])


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.8), (0.5, 1.0), (0.0, 0.34)])
def test_the_followed_stages_are_diffusers(bounds: tuple[float, float]) -> None:
    for stages in (3, 5, 20):
        keep = [1.0 - float(i / stages < bounds[0] or (i + 1) / stages > bounds[1]) for i in range(stages)]
        assert followed_stages(*bounds, stages, where="edges").tolist() == [bool(one) for one in keep]
