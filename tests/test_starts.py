"""A start from an image, with a mask or without, leads to the latents and the picture of diffusers' pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import RequestError
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Array, Engine, EngineSpec, Inputs, TensorSpec
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.runtime.draw.denoise import blend
from latentrt.runtime.draw.start import (
    Start,
    check_latents,
    latent_mask,
    masked_pixels,
    sample_latents,
    start_from_image,
    start_inpainting,
)
from latentrt.runtime.images.read import read_mask, read_pictures
from latentrt.runtime.sampling.guidance import plan_guidance
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.noise import TorchCpuNoise
from latentrt.runtime.sampling.plan import SamplingPlan
from tests.refused import about
from tests.sampler_oracle import STABLE_DIFFUSION, network
from tests.studio import DRAWN
from tests.whole_plan import denoise

# dB of the final latents over their range, and of the pixels over theirs: float32 sums in another order, and random
# weights that amplify them. A start or a blend that is off by a draw or a level is below 30.
LEAST = 50.0
SIZE, STEPS, GUIDANCE, SEED = (32, 24), 7, 2.0, 5
PROMPT = "a red circle on blue"
TCD_ETA = 0.3  # the sampler's own

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}),
    "tcd": (diffusers.TCDScheduler, {"clip_sample": False}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "kdpm2_ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
}
# Their stages in the middle of a step: diffusers puts the image back at the level of the step's end, where the model
# is told the level of its middle. We put it back at the level that the model is told.
OTHER_MIDDLE = {"kdpm2", "kdpm2_ancestral"}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def psnr(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    error = np.mean((found.astype(np.float64) - expected) ** 2)
    return math.inf if error == 0 else 20 * math.log10(float(np.ptp(expected))) - 10 * math.log10(error)


def photo(width: int = 40, height: int = 40) -> Image.Image:
    rows, columns = np.indices((height, width)) / np.array([[[height]], [[width]]])
    colours = np.stack([rows, columns, (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.1], axis=-1)
    return Image.fromarray((colours * 255).astype(np.uint8))


def right_half(width: int = 40, height: int = 40) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 :, width // 2 :] = 255
    return Image.fromarray(mask)


@dataclass(frozen=True, kw_only=True)
class Ours:
    """The engines of the tiny bundle, and the prompts as the reference encodes them."""

    engines: dict[str, Engine]
    space: LatentSpec
    text: Array

    def encode(self, pixels: Array) -> Array:
        return self.engines["vae_encoder"]({"sample": pixels})["latent_parameters"]


@pytest.fixture(scope="module")
def components(sd1_checkpoint: Path) -> dict[str, Any]:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd1_checkpoint, safety_checker=None)
    return dict(pipe.components)


@pytest.fixture(scope="module")
def ours(sd1_bundle: Path, components: dict[str, Any]) -> Iterator[Ours]:
    pipe = reference(diffusers.StableDiffusionPipeline, components, "ddim")
    with torch.no_grad():
        text = np.concatenate([part.numpy() for part in pipe.encode_prompt(PROMPT, "cpu", 1, True)])
    bundle = Bundle.open(sd1_bundle)
    opened = open_engines(bundle, "cpu", components=("unet", "vae_encoder", "vae_decoder"), threads=1)
    yield Ours(engines=opened.engines, space=bundle.manifest.latents, text=text)
    opened.close()


def reference(kind: Any, components: dict[str, Any], sampler: str) -> Any:
    name, options = SAMPLERS[sampler]
    scheduler = name.from_config(components["scheduler"].config, **options)
    pipe = kind(**components | {"scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, **request: Any) -> tuple[Array, Array]:
    """Return diffusers' final latents, and its picture: (1, height, width, 3), uint8."""
    generator = torch.Generator().manual_seed(SEED)
    # diffusers' pipelines give every scheduler that takes it an eta of 0, whatever is that scheduler's own
    eta = TCD_ETA if isinstance(pipe.scheduler, diffusers.TCDScheduler) else 0.0
    call = {"eta": eta, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent", **request}
    latents = pipe(PROMPT, generator=generator, **call).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    picture = pipe.image_processor.postprocess(decoded, output_type="np")
    return latents.numpy(), (picture * 255).round().astype(np.uint8)


def draw_from(seed: int, shape: tuple[int, ...]) -> Callable[[], Array]:
    stream = TorchCpuNoise(seed)
    return lambda: stream.normal(shape)


def follow(
    plan: SamplingPlan, start: Start, ours: Ours, draw: Callable[[], Array], unet: Any = None
) -> tuple[Array, Array]:
    """Return the final latents, and the pictures."""
    width, height = (side * ours.space.factor for side in start.noise.shape[:1:-1])
    shape = WorkspaceShape(pictures=len(start.noise), tokens=ours.text.shape[1], width=width, height=height)
    engines = {**ours.engines, "unet": unet or ours.engines["unet"]}
    workspace = NumpyWorkspace(engines, ours.space, shape, state_rows=plan.rows, **DRAWN)
    for name, array in {"encoder_hidden_states": ours.text, **start.inputs(plan, state_rows=plan.rows)}.items():
        workspace.write(name, array)
    guidance = plan_guidance(plan, GUIDANCE, len(start.noise))
    for _ in denoise(workspace, plan, guidance, draw, denoiser="unet"):
        pass
    workspace.run("vae_decoder")
    return workspace.read("state")[:, 0], workspace.read("pixels")


def latent_shape(space: LatentSpec, size: tuple[int, int]) -> tuple[int, ...]:
    return (1, space.channels, size[1] // space.factor, size[0] // space.factor)


def agrees(found: tuple[Array, Array], expected: tuple[Array, Array]) -> None:
    assert psnr(found[0], expected[0]) >= LEAST
    assert psnr(found[1], expected[1].astype(np.float64)) >= LEAST


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_changed_as_diffusers_changes_it(
    sampler: str, strength: float, ours: Ours, components: dict[str, Any]
) -> None:
    pipe = reference(diffusers.StableDiffusionImg2ImgPipeline, components, sampler)
    expected = theirs(pipe, image=photo(*SIZE), strength=strength)

    plan = make_plan(sampler, STABLE_DIFFUSION, steps=STEPS, strength=strength)
    draw = draw_from(SEED, latent_shape(ours.space, SIZE))
    pixels = read_pictures(photo(*SIZE), factor=ours.space.factor)
    start = start_from_image(pixels, ours.encode, draw, space=ours.space)
    agrees(follow(plan, start, ours, draw), expected)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - OTHER_MIDDLE))
def test_any_checkpoint_inpaints_as_diffusers_does(
    sampler: str, strength: float, ours: Ours, components: dict[str, Any]
) -> None:
    pipe = reference(diffusers.StableDiffusionInpaintPipeline, components, sampler)
    width, height = SIZE
    request = {"image": photo(), "mask_image": right_half(), "width": width, "height": height}
    expected = theirs(pipe, strength=strength, **request)

    plan = make_plan(sampler, STABLE_DIFFUSION, steps=STEPS, strength=strength)
    draw = draw_from(SEED, latent_shape(ours.space, SIZE))
    start = inpainting(ours, draw, strength=strength)
    agrees(follow(plan, start, ours, draw), expected)


def inpainting(ours: Ours, draw: Callable[[], Array], **options: Any) -> Start:
    image = photo()
    return start_inpainting(
        read_pictures(image, factor=ours.space.factor, size=SIZE),
        read_mask(right_half(), size=SIZE, picture_size=image.size),
        ours.encode,
        draw,
        space=ours.space,
        **options,
    )


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_karras", "heun"])
def test_an_inpainting_unet_sees_what_diffusers_shows_it(
    sampler: str, strength: float, ours: Ours, components: dict[str, Any]
) -> None:
    unet = nine_channels(components["unet"])
    pipe = reference(diffusers.StableDiffusionInpaintPipeline, components | {"unet": unet}, sampler)
    width, height = SIZE
    request = {"image": photo(), "mask_image": right_half(), "width": width, "height": height}
    expected = theirs(pipe, strength=strength, **request)

    plan = make_plan(sampler, STABLE_DIFFUSION, steps=STEPS, strength=strength)
    draw = draw_from(SEED, latent_shape(ours.space, SIZE))
    start = inpainting(ours, draw, strength=strength, inpainting_model=True)
    assert start.condition is not None
    agrees(follow(plan, start, ours, draw, TorchUnet(unet)), expected)


class TorchUnet:
    """A torch UNet as an engine."""

    names = ("sample", "timestep", "encoder_hidden_states")
    spec = EngineSpec(
        component="unet",
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=("rows",)) for name in names),
        outputs=(),
    )

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        with torch.no_grad():
            sample = self.unet(*(torch.from_numpy(np.asarray(inputs[name])) for name in self.names)).sample
        return {"out_sample": sample.numpy()}


class StrangeUnet(TorchUnet):
    """A function as an engine that remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        sample = np.array(inputs["sample"])
        self.seen.append(sample)
        return {"out_sample": network(sample, np.asarray(inputs["timestep"]))}


def nine_channels(unet: Any) -> Any:
    """Return a UNet with the same configuration but for the channels it takes, with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return type(unet).from_config({**unet.config, "in_channels": 9}).eval()


@pytest.mark.parametrize("name", [*SAMPLERS, "plms", "lms", "dpmpp_sde", "sa_solver", "dpmpp_3m"])
def test_the_kept_part_is_always_the_image_at_the_level_that_the_model_is_told(name: str, ours: Ours) -> None:
    """What the model sees outside the mask is image and noise in the shares of its timestep, of unit variance."""
    plan = make_plan(name, STABLE_DIFFUSION, steps=8, strength=0.7)
    image, noise = (TorchCpuNoise(seed).normal((1, 4, 4, 4)) for seed in (1, 2))
    mask = np.zeros((1, 1, 4, 4), dtype=np.float32)
    mask[..., 2:] = 1
    start, unet = Start(noise=noise, image=image, kept=image, mask=mask), StrangeUnet()
    last, _ = follow(plan, start, ours, lambda: noise, unet)
    np.testing.assert_array_equal(last[..., :2], image[..., :2])
    for stage, latents in enumerate(unet.seen):
        level = plan.levels[stage] / np.hypot(*plan.levels[stage])
        expected = blend(level, image, noise)
        np.testing.assert_allclose(latents[:1, ..., :2], expected[..., :2], atol=2e-5, err_msg=str(stage))
        assert stage == 0 or np.abs(latents[:1] - expected)[..., 2:].max() > 0.01  # the rest is drawn


@pytest.mark.parametrize("shift", [0.0, 0.0609])
def test_latents_of_an_image_are_those_of_diffusers_distribution(shift: float) -> None:
    space = LatentSpec(channels=4, factor=8, scaling_factor=0.5, shift=shift)
    parameters = torch.randn(1, 8, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    parameters[0, 4:, 0] = torch.tensor([-99.0, 99.0, -30.0, 20.0, 0.0])  # beyond its limits
    sample = DiagonalGaussianDistribution(parameters).sample(torch.Generator().manual_seed(9))
    found = sample_latents(parameters.numpy(), TorchCpuNoise(9).normal((1, 4, 3, 5)), space=space)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.5 * (sample.numpy() - shift), rtol=1e-5, atol=1e-5)


def test_the_latent_mask_is_the_one_of_diffusers() -> None:
    mask = (np.random.default_rng(0).random((1, 24, 40)) > 0.5).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[:, None], size=(6, 10)).numpy()
    np.testing.assert_array_equal(latent_mask(mask, 4), expected)


def test_a_mask_between_the_latents_is_refused() -> None:
    mask = np.zeros((1, 16, 16), dtype=np.float32)
    mask[0, 5:7, 5:7] = 1
    with pytest.raises(RequestError, check=about("mask")):
        latent_mask(mask, 4)


def test_a_masked_image_is_grey_where_it_is_repainted() -> None:
    pixels = np.random.default_rng(0).random((1, 4, 6, 3), dtype=np.float32) * 2 - 1
    mask = np.zeros((1, 4, 6), dtype=np.float32)
    mask[:, 1:3, 2:] = 1
    theirs = torch.from_numpy(pixels.transpose(0, 3, 1, 2)) * (torch.from_numpy(mask)[:, None] < 0.5)
    np.testing.assert_array_equal(masked_pixels(pixels, mask), theirs.numpy().transpose(0, 2, 3, 1))


def test_one_image_starts_every_picture_with_its_own_seed(ours: Ours) -> None:
    pixels = read_pictures(photo(*SIZE), factor=ours.space.factor)
    shape = latent_shape(ours.space, SIZE)
    draws = [draw_from(seed, shape) for seed in (4, 8)]
    both = start_from_image(pixels, ours.encode, lambda: np.concatenate([d() for d in draws]), space=ours.space)
    for i, seed in enumerate((4, 8)):
        alone = start_from_image(pixels, ours.encode, draw_from(seed, shape), space=ours.space)
        assert both.image is not None
        np.testing.assert_array_equal(both.image[i : i + 1], alone.image)
        np.testing.assert_array_equal(both.noise[i : i + 1], alone.noise)


def test_a_start_writes_what_it_has_and_no_more() -> None:
    plan, noise = make_plan("euler", STABLE_DIFFUSION, steps=4, strength=0.5), TorchCpuNoise(0).normal((2, 4, 3, 3))
    image, mask = np.ones_like(noise), np.ones((1, 1, 3, 3), dtype=np.float32)
    assert set(Start(noise=noise).inputs(plan, state_rows=2)) == {"state"}
    written = Start(noise=noise, image=image, kept=image, mask=mask).inputs(plan, state_rows=2)
    assert {name: array.shape for name, array in written.items()} == {
        "state": (2, 2, 4, 3, 3),
        "keep_mask": (2, 1, 3, 3),
        "known": (2, 2, 4, 3, 3),
    }
    np.testing.assert_array_equal(written["state"][:, 0], blend(plan.levels[0], image, noise))
    np.testing.assert_array_equal(written["known"][1], [image[1], noise[1]])


# --- latents of the caller ---


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 4, 3, 5), (2, 4, 3, 5)])
def test_latents_of_the_caller_serve_every_picture(shape: tuple[int, ...]) -> None:
    latents = TorchCpuNoise(0).normal(shape).astype(np.float64)
    found = check_latents(latents, pictures=2, shape=(4, 3, 5))
    assert (found.shape, found.dtype) == ((2, 4, 3, 5), np.float32)
    np.testing.assert_allclose(found[1], latents.reshape(-1, 4, 3, 5)[-1], rtol=1e-6)


@pytest.mark.parametrize(
    "latents",
    [
        np.zeros((3, 4, 3, 5)),
        np.zeros((4, 5, 3)),
        np.zeros((2, 4, 3, 5), dtype=np.int64),
        np.full((4, 3, 5), np.inf),
    ],
)
def test_what_are_no_latents_is_refused_in_one_sentence(latents: Array) -> None:
    with pytest.raises(RequestError, check=about("latents")):
        check_latents(latents, pictures=2, shape=(4, 3, 5))
