"""SDXL with its refiner in one bundle draws the pictures of diffusers' two pipelines, one after the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError, RequestError
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.export.cli import inspect
from latentrt.export.export import export_checkpoint
from latentrt.export.networks.loading import load
from latentrt.export.networks.shared_encoder import require_same
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import SharedEncoder
from latentrt.runtime.cli import generate
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import split
from tests.conftest import REFINED, Make
from tests.refused import about
from tests.sampler_oracle import STABLE_DIFFUSION
from tests.test_families import LEAST, NEGATIVE, PROMPT, SEED, ours, psnr, reference, theirs
from tests.test_pipeline_images import left_half, photo
from tests.tiny import save_tiny

STEPS = 6
PAIR = ("unet", "refiner")
SAMPLERS = {"euler": diffusers.EulerDiscreteScheduler, "ddim": diffusers.DDIMScheduler}
KINDS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
}
REQUEST: dict[str, Any] = {"guidance": 5.0, "steps": STEPS, "negative_prompt": NEGATIVE}


def two_pipelines(made: Make, sampler: str, share: float, *, first: Any, scores: Any = (), **start: Any) -> Array:
    """Draw with diffusers: a base pipeline up to a share of the noise, and the refiner's from there.

    first: the class of the base pipeline; scores: what the refiner is asked for, and to avoid
    """
    generator = torch.Generator().manual_seed(SEED)
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": STEPS}
    config = {"clip_sample": False} if sampler == "ddim" else {}
    base = reference(first, made("sdxl", "")[0], SAMPLERS[sampler], **config)
    latents = base(**common, **start, denoising_end=share, output_type="latent", generator=generator).images
    second = reference(
        diffusers.StableDiffusionXLImg2ImgPipeline, made("sdxl", "refiner")[0], SAMPLERS[sampler], **config
    )
    second.vae = base.vae
    told = dict(zip(("aesthetic_score", "negative_aesthetic_score"), scores, strict=False))
    drawn = second(**common, **told, image=latents, denoising_start=share, output_type="np", generator=generator).images
    return np.asarray((drawn * 255).round())


@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_refiner_takes_over_where_diffusers_hands_over(made: Make, sampler: str, share: float) -> None:
    sizes = {"width": 40, "height": 32}
    expected = two_pipelines(made, sampler, share, first=diffusers.StableDiffusionXLPipeline, **sizes)
    request = {**REQUEST, "sampler": sampler, "size": (40, 32)}
    bundle = made("sdxl", REFINED)[1]
    assert psnr(ours(bundle, refine_from=share, **request), expected) >= LEAST
    assert psnr(ours(bundle, **request), expected) < LEAST


def test_a_refined_image_starts_as_in_diffusers(made: Make) -> None:
    image = {"image": photo(), "strength": 0.7}
    expected = two_pipelines(made, "euler", 0.8, first=diffusers.StableDiffusionXLImg2ImgPipeline, **image)
    found = ours(made("sdxl", REFINED)[1], refine_from=0.8, sampler="euler", **REQUEST, **image)
    assert psnr(found, expected) >= LEAST


def test_the_refiner_is_told_how_pictures_were_rated(made: Make) -> None:
    scores = (120.0, 1.0)
    expected = two_pipelines(made, "euler", 0.4, first=diffusers.StableDiffusionXLPipeline, scores=scores)
    request = {**REQUEST, "refine_from": 0.4, "sampler": "euler"}
    bundle = made("sdxl", REFINED)[1]
    told = {"aesthetic_score": scores[0], "negative_aesthetic_score": scores[1]}
    near, far = (psnr(ours(bundle, **more, **request), expected) for more in (told, {}))
    assert near >= LEAST
    assert near > far + 3  # random weights hardly look at the numbers


class Switch:
    """Exchanges the network of a diffusers pipeline within one call, and what that takes of text and sizes."""

    def __init__(self, pipe: Any, refiner: Any, share: float, size: tuple[int, int]) -> None:
        self.refiner, self.cutoff = refiner, round(1000 - share * 1000)
        positive, negative, pooled, negative_pooled = refiner.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
        sizes = [size[1], size[0], 0, 0]
        self.told = {
            "prompt_embeds": torch.cat([negative, positive]),
            "add_text_embeds": torch.cat([negative_pooled, pooled]),
            "add_time_ids": torch.tensor([[*sizes, 2.5], [*sizes, 6.0]]),
        }
        self.times = 0

    def __call__(self, pipe: Any, i: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        left = pipe.scheduler.timesteps[pipe.scheduler.timesteps < timestep]
        if not len(left) or left[0] >= self.cutoff:
            return {}
        self.times += 1
        pipe.unet = self.refiner.unet
        return dict(self.told)


STARTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "mask": (
        diffusers.StableDiffusionXLInpaintPipeline,
        {"image": photo(), "mask_image": left_half(), "width": 40, "height": 32, "strength": 0.8},
        {"image": photo(), "mask": left_half(), "strength": 0.8},
    ),
    "text": (diffusers.StableDiffusionXLPipeline, {"width": 40, "height": 32}, {"size": (40, 32)}),
}


@pytest.mark.parametrize(("start", "sampler"), [("mask", "euler"), ("text", "dpmpp_2m"), ("text", "euler_ancestral")])
def test_the_switch_is_that_of_the_network_alone(made: Make, start: str, sampler: str) -> None:
    """What lies beside the latents goes on: a mask, the noise's stream, and what a sampler remembers.

    Diffusers hands only latents from one pipeline to the next, so its own loop is given the other network on the way.
    """
    kind, asked, request = STARTS[start]
    base = reference(kind, made("sdxl", "")[0], KINDS[sampler])
    refiner = reference(diffusers.StableDiffusionXLImg2ImgPipeline, made("sdxl", "refiner")[0], KINDS[sampler])
    switch = Switch(base, refiner, 0.6, (40, 32))
    drawn = base(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=list(switch.told),
        **asked,
    ).images
    assert switch.times > 1
    found = ours(made("sdxl", REFINED)[1], refine_from=0.6, sampler=sampler, **REQUEST, **request)
    assert psnr(found, np.asarray((drawn * 255).round())) >= LEAST


def test_a_bundle_without_a_refiner_says_how_to_get_one(made: Make) -> None:
    with pytest.raises(RequestError, check=about("refine_from")):
        ours(made("sdxl", "")[1], refine_from=0.8)


def test_every_stage_has_one_denoiser_and_none_goes_back() -> None:
    plan = make_plan("heun", STABLE_DIFFUSION, steps=STEPS)
    for share in np.linspace(0.05, 0.95, 19):
        ranges = split(plan, float(share), PAIR, train_timesteps=1000)
        assert [k for part in ranges for k in part.stages] == list(range(plan.stages))
        assert ranges[-1].denoiser == "refiner"
        assert all(plan.timesteps[k] < 1000 - 1000 * share + 0.5 for k in ranges[-1].stages)
        assert all(plan.timesteps[k] >= 1000 - 1000 * share - 0.5 for part in ranges[:-1] for k in part.stages)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(RequestError, check=about("refine_from")):
        split(make_plan("euler", STABLE_DIFFUSION, steps=STEPS), share, PAIR, train_timesteps=1000)


def test_a_switch_after_the_last_stage_is_refused() -> None:
    plan = make_plan("euler", STABLE_DIFFUSION, steps=2, spacing="trailing")
    with pytest.raises(RequestError, check=about("refine_from")):
        split(plan, 0.8, PAIR, train_timesteps=1000)


def test_an_image_that_keeps_most_is_drawn_by_the_refiner_alone(made: Make) -> None:
    watched: list[int] = []
    pipe = reference(diffusers.StableDiffusionXLImg2ImgPipeline, made("sdxl", "refiner")[0], KINDS["euler"])
    pipe.vae = reference(diffusers.StableDiffusionXLPipeline, made("sdxl", "")[0], KINDS["euler"]).vae
    image = {"image": photo(), "strength": 0.4}
    told = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": STEPS}
    expected = theirs(pipe, **told, **image)
    request = {**REQUEST, **image, "sampler": "euler", "on_step": lambda step: watched.append(step.stage)}
    assert psnr(ours(made("sdxl", REFINED)[1], refine_from=0.5, **request), expected) >= LEAST
    assert watched == [1, 2]


def test_scores_are_for_checkpoints_that_were_told_them(made: Make) -> None:
    with pytest.raises(RequestError, check=about("aesthetic_score")):
        ours(made("sdxl", "")[1], aesthetic_score=7.0)


def export_refined(made: Make, refiner: Path, target: Path, *, base: tuple[str, str] = ("sdxl", "")) -> None:
    options = CheckpointOptions(refiner=str(refiner))
    export_checkpoint(str(made(*base)[0]), target, precision="fp32", backends=(), options=options)


def test_a_refiner_that_reads_with_another_text_encoder_is_refused(made: Make, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", family="sdxl", variant="refiner", seed=1)
    with pytest.raises(CheckpointError, match=r"^text_encoder_2: '.*other'"):
        export_refined(made, other, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_refiner_stored_in_half_precision_is_the_same(made: Make, tmp_path: Path) -> None:
    halved = shutil.copytree(made("sdxl", "refiner")[0], tmp_path / "halved")
    weights = halved / "text_encoder_2" / "model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    own = load("text_encoder_2", made("sdxl", "")[0] / "text_encoder_2")
    require_same("text_encoder_2", own, SharedEncoder(name="halved", folder=str(halved / "text_encoder_2")))


def test_what_is_no_refiner_is_refused(made: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^--refiner '.*': .* sdxl .* sdxl,"):
        export_refined(made, made("sdxl", "")[0], tmp_path / "bundle")
    with pytest.raises(CheckpointError, match=r"^--refiner '.*': .* sdxl_refiner .* sd1,"):
        export_refined(made, made("sdxl", "refiner")[0], tmp_path / "bundle", base=("sd1", ""))


def test_a_refiner_of_another_schedule_is_refused(made: Make, tmp_path: Path) -> None:
    other = shutil.copytree(made("sdxl", "refiner")[0], tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(CheckpointError, match=r"^--refiner .*\(prediction_type\)"):
        export_refined(made, other, tmp_path / "bundle")


def test_a_refined_bundle_is_verified_and_named(made: Make) -> None:
    root = str(made("sdxl", REFINED)[1])
    rows = list(verify(Bundle.open(root)))
    assert all(row.ok for row in rows) and "refiner" in {row.what for row in rows}
    shown = CliRunner().invoke(inspect, [root])
    assert "refiner sdxl-refiner-checkpoint" in shown.output and shown.output.count("│ refiner") == 1


def test_the_command_line_draws_refined_pictures(made: Make, tmp_path: Path) -> None:
    root = str(made("sdxl", REFINED)[1])
    options = ["--steps", "4", "--refine-from", "0.5", "--aesthetic-score", "7", "--seed", "1", "-o", str(tmp_path)]
    drawn = CliRunner().invoke(generate, [root, PROMPT, *options])
    assert drawn.exit_code == 0, drawn.output
    (picture,) = tmp_path.glob("*.png")
    text = Image.open(picture).text["parameters"]
    assert "Refine from: 0.5" in text and "Aesthetic score: 7" in text
