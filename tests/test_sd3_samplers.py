"""SD 3 with diffusers' schedulers: their steps, shifts, spacings and strengths give diffusers' pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch

from latentrt import Pipeline
from latentrt.engines.bundle.files import Bundle, write_manifest
from latentrt.engines.spec import Array
from latentrt.export.configs.schedule import training_schedule
from tests.conftest import Make
from tests.sd3 import VAE, diffusers_sd3
from tests.test_families import LEAST, psnr
from tests.test_pipeline_images import left_half, photo

PROMPT, SEED, STEPS, GUIDANCE, SIZE = "a red circle on blue", 3, 8, 4.0, (48, 32)
CALL = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]  # of diffusers, about options that it means to drop

EULER = "FlowMatchEulerDiscreteScheduler"
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"


def solver(name: str, **config: Any) -> dict[str, Any]:
    """Return the config that makes a solver for diffusions follow SD 3's flow."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return {"_class_name": name, **flow, **config}


SAMPLERS: Mapping[str, dict[str, Any]] = {
    "euler": {"_class_name": EULER, "shift": 3.0},
    "euler_karras": {"_class_name": EULER, "shift": 3.0, "use_karras_sigmas": True},
    "euler_exponential": {"_class_name": EULER, "shift": 3.0, "use_exponential_sigmas": True},
    "euler_beta": {"_class_name": EULER, "shift": 3.0, "use_beta_sigmas": True},
    "heun": {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
    "flow_lcm": {"_class_name": "FlowMatchLCMScheduler", "shift": 3.0},
    "dpmpp_2m": solver(MULTI),
    "dpmpp_3m": solver(MULTI, solver_order=3),
    "dpmpp_2m_sde": solver(MULTI, algorithm_type="sde-dpmsolver++"),
    "dpmpp_2s": solver(SINGLE),
    "dpmpp_3s": solver(SINGLE, solver_order=3),
    "unipc": solver("UniPCMultistepScheduler"),
    "unipc_3": solver("UniPCMultistepScheduler", solver_order=3),
    "deis": solver("DEISMultistepScheduler"),
    "sa_solver": solver("SASolverScheduler"),
}
OWN: Mapping[str, dict[str, Any]] = {  # that no name of a sampler says
    "by size": {"use_dynamic_shifting": True},
    "by size, linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "use_karras_sigmas": True},
    "terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "stochastic": {"shift": 3.0, "stochastic_sampling": True},
    "another shift": {"shift": 6.0, "use_beta_sigmas": True},
}


@pytest.fixture(scope="module")
def plain(made: Make) -> tuple[Path, Path]:
    return made("sd3", "")


@pytest.fixture(scope="module")
def opened(plain: tuple[Path, Path]) -> Iterator[Pipeline]:
    with Pipeline.load(plain[1], "cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def reference(plain: tuple[Path, Path]) -> Any:
    return diffusers_sd3(plain[0])


def theirs(reference: Any, config: Mapping[str, Any], **call: Any) -> Array:
    """Return diffusers' picture; schedulers draw their noise after the first latents, from one stream."""
    reference.scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    torch.manual_seed(SEED)  # the pipeline hands its generator to no scheduler: they draw from the default one
    pictures = reference(generator=torch.default_generator, **{**CALL, "width": SIZE[0], "height": SIZE[1], **call})
    return np.asarray((pictures.images * 255).round())


def ours(pipe: Pipeline, **request: Any) -> Array:
    return pipe(
        **{"prompt": PROMPT, "steps": STEPS, "seed": SEED, "guidance": GUIDANCE, "size": SIZE, **request}
    ).pixels


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_the_picture_of_its_class(opened: Pipeline, reference: Any, name: str) -> None:
    assert psnr(ours(opened, sampler=name), theirs(reference, SAMPLERS[name])) >= LEAST


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_the_shift_of_a_request_is_that_of_a_config(opened: Pipeline, reference: Any, name: str) -> None:
    config = {key: 6.0 if "shift" in key else value for key, value in SAMPLERS[name].items()}
    expected = theirs(reference, config)
    assert psnr(ours(opened, sampler=name, shift=6.0), expected) >= LEAST
    assert psnr(ours(opened, sampler=name), expected) < LEAST


def test_sigmas_with_a_shift_are_those_that_diffusers_is_told(opened: Pipeline, reference: Any) -> None:
    sigmas = [1.0, 0.8, 0.5, 0.2]
    expected = theirs(reference, SAMPLERS["euler"], sigmas=sigmas, num_inference_steps=len(sigmas))
    assert psnr(ours(opened, steps=None, sigmas=[*sigmas, 0.0], shift=3.0), expected) >= LEAST


@pytest.mark.parametrize("name", OWN)
def test_the_checkpoints_own_scheduler_is_followed_with_all_it_sets(
    plain: tuple[Path, Path], reference: Any, tmp_path: Path, name: str
) -> None:
    config = {"_class_name": EULER, **OWN[name]}
    bundle = shutil.copytree(plain[1], tmp_path / "bundle")
    schedule = training_schedule(config, where="x", family="sd3")
    write_manifest(bundle, msgspec.structs.replace(Bundle.open(bundle).manifest, schedule=schedule))
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        for width, height in (SIZE, (64, 64)):
            expected = theirs(reference, config, width=width, height=height)
            assert psnr(ours(pipe, size=(width, height)), expected) >= LEAST


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_an_image_is_changed_from_the_same_step(
    plain: tuple[Path, Path], opened: Pipeline, name: str, strength: float
) -> None:
    """Eight steps times 0.3 or 0.6 is no whole number: SD 3's pipelines take the step that the share ends in."""
    pipe = diffusers_sd3(plain[0], "StableDiffusion3Img2ImgPipeline")
    expected = theirs(pipe, SAMPLERS[name], image=photo().resize(SIZE), strength=strength)
    assert psnr(ours(opened, sampler=name, image=photo().resize(SIZE), strength=strength), expected) >= LEAST


def repainted(checkpoint: Path, strength: float) -> Array:
    """Return diffusers' picture; 0.42.1 forgets the shift where its inpainting pipeline decodes: that is done here."""
    pipe = diffusers_sd3(checkpoint, "StableDiffusion3InpaintPipeline")
    images = {"image": photo(), "mask_image": left_half(), "width": 40, "height": 32}
    call = {**CALL, **images, "strength": strength, "output_type": "latent"}
    latents = pipe(generator=torch.Generator().manual_seed(SEED), **call).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / VAE["scaling_factor"] + VAE["shift_factor"]).sample
    return np.asarray((pipe.image_processor.postprocess(decoded, output_type="np") * 255).round())


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.99, 1.0])
def test_a_mask_keeps_the_image_at_the_level_of_every_step(
    plain: tuple[Path, Path], opened: Pipeline, strength: float
) -> None:
    found = ours(opened, image=photo(), mask=left_half(), strength=strength, size=None)
    assert psnr(found, repainted(plain[0], strength)) >= LEAST


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_inpainting_transformer_sees_the_mask_and_the_masked_image(made: Make, strength: float) -> None:
    checkpoint, bundle = made("sd3", "inpainting")
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        found = ours(pipe, image=photo(), mask=left_half(), strength=strength, size=None)
    assert psnr(found, repainted(checkpoint, strength)) >= LEAST
