"""Images as prompts (IP-Adapter): what they change is what they change in diffusers' own pipelines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from transformers import CLIPTextModel

from latentrt import Control, ImagePrompt, Lora, Pipeline
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import IMAGE_SCALE, IMAGE_TOKENS
from latentrt.engines.verify.verify import verify
from latentrt.export.export import export_checkpoint
from latentrt.export.networks.conversion import written
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.export.sources.diffusers_folder import to_weight_source
from latentrt.export.sources.parts import LoraFusion
from latentrt.runtime.image_prompts.resolve import layer_scales
from latentrt.runtime.images.clip import normalise, read_for_clip
from latentrt.runtime.verify.stages import verify_stages
from tests.conftest import Controlled, Make
from tests.lora_files import kohya, make_factors, save
from tests.refused import about
from tests.test_batcher import shared
from tests.test_control_stage import LEVELS, canonical, request_of
from tests.test_controlnets import hint
from tests.test_families import LEAST, PROMPT, SEED, STEPS, psnr, theirs
from tests.test_family_stages import on_other_workspaces
from tests.test_pipeline_images import left_half, photo

pytestmark = pytest.mark.usefixtures("one_thread")

Shown = Callable[[str], Controlled]
SIZE: dict[str, Any] = {"width": 40, "height": 32}
PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
EVERY = [("sd1", "plain"), ("sd1", "plus"), ("sd1", "full"), ("sdxl", "plain"), ("sdxl", "plus")]
# A part of what InstantStyle names: one attention of an up block, and a down block where a family's has one.
STYLE: Mapping[str, dict[str, Any]] = {
    "sd1": {"up": {"block_1": [0.0, 0.8]}},
    "sdxl": {"up": {"block_0": [0.9, 0.0]}, "down": {"block_1": [0.4]}},
}


@pytest.fixture(scope="module")
def pipes(shown: Shown) -> Iterator[Callable[[str], Pipeline]]:
    """Give a pipeline on each family's bundle with IP-Adapters, opened once."""
    opened = dict[str, Pipeline]()

    def pipe(family: str) -> Pipeline:
        if family not in opened:
            opened[family] = Pipeline.load(shown(family).bundle, "cpu", threads=1)
        return opened[family]

    with canonical():
        yield pipe
    for one in opened.values():
        one.close()


def reference(made: Controlled, family: str, *names: str, kind: Any = None, **networks: Any) -> Any:
    """Return diffusers' pipeline with IP-Adapters, which it loads from the published layout."""
    pipe = (kind or PIPELINES[family]).from_pretrained(made.checkpoint, **networks)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if names:
        files = [made.networks[name] for name in names]
        pipe.load_ip_adapter(
            str(files[0].parent.parent),
            subfolder=files[0].parent.name,
            weight_name=[file.name for file in files],
            image_encoder_folder="models/image_encoder",
        )
    return pipe


def ours(pipe: Pipeline, *images: ImagePrompt, **request: Any) -> Array:
    defaults = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "sampler": "euler", "guidance": 3.0, "size": (40, 32)}
    return pipe(**defaults | request, image_prompts=images).pixels


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_an_image_prompt_draws_the_picture_of_diffusers(
    shown: Shown, pipes: Callable[[str], Pipeline], family: str, kind: str
) -> None:
    made, pipe, seen = shown(family), pipes(family), hint(5, (50, 37))
    other = reference(made, family, kind)
    for scale in (0.7, STYLE[family]):
        other.set_ip_adapter_scale(scale)
        expected = theirs(other, ip_adapter_image=seen, guidance_scale=3.0, **SIZE)
        assert psnr(ours(pipe, ImagePrompt(name=kind, image=seen, scale=scale)), expected) >= LEAST
        assert psnr(ours(pipe), expected) < LEAST  # and without it, another picture


@pytest.mark.parametrize("family", PIPELINES)
def test_several_add_up_as_in_diffusers(shown: Shown, pipes: Callable[[str], Pipeline], family: str) -> None:
    names = [kind for known, kind in EVERY if known == family]
    scales: list[Any] = [0.4, STYLE[family], 0.6][: len(names)]
    other = reference(shown(family), family, *names)
    other.set_ip_adapter_scale(scales)
    images = [hint(number) for number in range(len(names))]
    expected = theirs(other, ip_adapter_image=images, guidance_scale=3.0, **SIZE)
    asked = [
        ImagePrompt(name=name, image=image, scale=scale)
        for name, image, scale in zip(names, images, scales, strict=True)
    ]
    assert psnr(ours(pipes(family), *asked[::-1]), expected) >= LEAST


@pytest.mark.parametrize("family", PIPELINES)
def test_off_is_the_picture_of_a_bundle_without_any(made: Make, pipes: Callable[[str], Pipeline], family: str) -> None:
    with Pipeline.load(made(family, "")[1], "cpu", threads=1) as plain:
        expected = ours(plain)
        taken = {tensor.name for tensor in plain.manifest.components["unet"].inputs}
        assert not taken & {IMAGE_TOKENS, IMAGE_SCALE}
    assert np.array_equal(ours(pipes(family)), expected)
    assert np.array_equal(ours(pipes(family), ImagePrompt(name="plain", image=hint(), scale=0)), expected)
    nowhere = ImagePrompt(name="plus", image=hint(), scale={"mid": 0.0})
    assert np.array_equal(ours(pipes(family), nowhere), expected)


def test_without_guidance_and_with_an_image_or_a_mask(shown: Shown, pipes: Callable[[str], Pipeline]) -> None:
    made, pipe, prompt = shown("sd1"), pipes("sd1"), ImagePrompt(name="plus", image=hint(), scale=0.7)
    other = reference(made, "sd1", "plus")
    other.set_ip_adapter_scale(0.7)
    expected = theirs(other, ip_adapter_image=hint(), guidance_scale=1.0, **SIZE)
    assert psnr(ours(pipe, prompt, guidance=1.0), expected) >= LEAST
    other = reference(made, "sd1", "plus", kind=diffusers.StableDiffusionImg2ImgPipeline)
    other.set_ip_adapter_scale(0.7)
    common = {"image": photo(), "strength": 0.6, "num_inference_steps": 6, "guidance_scale": 3.0}
    expected = theirs(other, ip_adapter_image=hint(), **common)
    request = {"image": photo(), "strength": 0.6, "steps": 6, "size": None}
    assert psnr(ours(pipe, prompt, **request), expected) >= LEAST
    other = reference(made, "sd1", "plus", kind=diffusers.StableDiffusionInpaintPipeline)
    other.set_ip_adapter_scale(0.7)
    masked = {**common, "mask_image": left_half(), **SIZE}
    expected = theirs(other, ip_adapter_image=hint(), **masked)
    assert psnr(ours(pipe, prompt, **request | {"mask": left_half(), "size": (40, 32)}), expected) >= LEAST


def test_beside_a_controlnet(shown: Shown, pipes: Callable[[str], Pipeline]) -> None:
    made = shown("sd1")
    network = diffusers.ControlNetModel.from_pretrained(made.networks["edges"])
    other = reference(made, "sd1", "plain", kind=diffusers.StableDiffusionControlNetPipeline, controlnet=network)
    other.set_ip_adapter_scale(0.5)
    expected = theirs(other, image=hint(1), ip_adapter_image=hint(), guidance_scale=3.0, **SIZE)
    control = Control(name="edges", image=hint(1))
    assert (
        psnr(ours(pipes("sd1"), ImagePrompt(name="plain", image=hint(), scale=0.5), controls=[control]), expected)
        >= LEAST
    )


def test_each_picture_of_a_batch_has_its_own_image(pipes: Callable[[str], Pipeline]) -> None:
    pipe = pipes("sd1")
    both = ours(pipe, ImagePrompt(name="plus", image=[hint(0), hint(1)]), n=2, seed=[5, 6])
    for picture, (seed, image) in enumerate([(5, hint(0)), (6, hint(1))]):
        alone = ours(pipe, ImagePrompt(name="plus", image=image), seed=seed)[0]
        assert np.abs(both[picture].astype(int) - alone.astype(int)).max() <= 1


REQUESTS: dict[str, dict[str, Any]] = {
    "one": {"image_prompts": [ImagePrompt(name="plain", image=hint(0), scale=0.8)]},
    "none, after one": {},
    "two": {
        "image_prompts": [
            ImagePrompt(name="plus", image=hint(1), scale={"up": 0.7}),
            ImagePrompt(name="plain", image=hint(0), scale=0.3),
        ]
    },
    "another image": {"image_prompts": [ImagePrompt(name="plain", image=hint(3), scale=0.8)]},
    "guided for a while": {
        "image_prompts": [ImagePrompt(name="plus", image=hint(0))],
        "guidance_interval": (0.3, 0.8),
    },
    "with a ControlNet": {
        "image_prompts": [ImagePrompt(name="plain", image=hint(0))],
        "controls": [Control(name="edges", image=hint(2), stop=0.75)],
    },
    "tiled, a sampler that looks twice": {
        "image_prompts": [ImagePrompt(name="plain", image=hint(0))],
        "tile": 64,
        "sampler": "heun",
    },
    "two pictures, each with its own": {
        "image_prompts": [ImagePrompt(name="plus", image=[hint(0), hint(1)])],
        "n": 2,
    },
}


def draw(pipe: Pipeline, name: str) -> Array:
    return pipe.draw(request_of(pipe, **REQUESTS[name])).pixels


@pytest.mark.parametrize("family", PIPELINES)
def test_every_workspace_draws_what_numpy_draws(
    shown: Shown, pipes: Callable[[str], Pipeline], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shown(family).bundle
    expected = {name: draw(pipes(family), name) for name in REQUESTS}
    assert len({picture.tobytes() for picture in expected.values()}) == len(REQUESTS)
    for pipe in on_other_workspaces(bundle, tmp_path, monkeypatch, size=(40, 32)):
        for name, wanted in expected.items():
            assert np.abs(draw(pipe, name).astype(int) - wanted.astype(int)).max() <= LEVELS, name
    opened = Bundle.open(tmp_path / "compiled")
    assert all(row.ok for row in verify(opened, backend="tensorrt"))
    assert all(row.ok for row in verify_stages(opened, backend="tensorrt"))


@pytest.mark.parametrize("order", [1, 2])
def test_pictures_with_images_share_stages_with_those_without(
    pipes: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    pipe = pipes("sd1")
    wishes = [options for options in REQUESTS.values() if options.get("n", 1) == 1]
    requests = [request_of(pipe, **{"steps": 4 + i % 3, "seed": i, **wish}) for i, wish in enumerate(wishes)]
    random.Random(order).shuffle(requests)
    alone = [pipe.draw(request).pixels[0] for request in requests]
    assert shared(pipe, requests, alone, monkeypatch, slots=4) == 4


def test_an_image_is_encoded_once(shown: Shown) -> None:
    ran = list[str]()
    with canonical(), Pipeline.load(shown("sd1").bundle, "cpu", threads=1) as pipe:
        run = pipe.loaded.images._run

        def counted(component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            ran.append(component)
            return run(component, inputs)

        pipe.loaded.images._run = counted
        first = ours(pipe, ImagePrompt(name="plus", image=hint(0)))
        once = list(ran)
        again = ours(pipe, ImagePrompt(name="plus", image=np.asarray(hint(0)), scale=1.0))
        assert ran == once and np.array_equal(first, again)
        assert sorted(once) == ["image_encoder"] * 2 + ["image_projection_plus"] * 2  # its own, and the negative's
        ours(pipe, ImagePrompt(name="plus", image=hint(1)))
        assert ran[len(once) :] == ["image_encoder", "image_projection_plus"]


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (200, 301), (64, 511), (17, 23), (225, 1000)])
@pytest.mark.parametrize("side", [28, 224])
def test_images_are_prepared_as_transformers_does(size: tuple[int, int], side: int) -> None:
    from transformers import CLIPImageProcessor

    image = hint(7, size)
    expected = CLIPImageProcessor(size=side, crop_size=side)(image, return_tensors="np").pixel_values
    found = normalise(read_for_clip(image, side=side, name="image"))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)  # of -1.8 to 2.2: the same sums in another order


def test_scales_by_layer_and_by_block() -> None:
    layers = [f"{at}.transformer_blocks.0" for at in (
        "down_blocks.1.attentions.0", "down_blocks.1.attentions.1", "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1", "mid_block.attentions.0",
    )]  # fmt: skip

    def scales(scale: Any) -> list[float]:
        return [round(float(one), 3) for one in layer_scales(scale, layers, where="image_prompts")]

    assert scales(0.5) == [0.5] * 5
    assert scales([0.1, 0.2, 0.3, 0.4, 0.5]) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert scales({"up": {"block_0": [0.0, 1.0]}}) == [0, 0, 0, 1, 0]
    assert scales({"down": 0.3, "mid": [0.2]}) == [0.3, 0.3, 0, 0, 0.2]
    assert scales({"down_blocks.1.attentions.1": 2, "down": 1}) == [1, 2, 0, 0, 0]
    assert scales({"up": {"block_0": [0.5]}}) == [0, 0, 0.5, 0.5, 0]
    for wrong in ([1.0], {"up": {"block_1": 1.0}}, {"up": {"block_0": [1, 2, 3]}}, {"sideways": 1}, "much", True):
        with pytest.raises(RequestError, check=about("image_prompts")):
            layer_scales(wrong, layers, where="image_prompts")


@pytest.mark.parametrize(
    "prompts",
    [
        [ImagePrompt(name="other", image=hint())],
        [ImagePrompt(name="plain", image="nowhere.png")],
        [ImagePrompt(name="plain", image=3)],  # type: ignore[arg-type]
        [ImagePrompt(name="plain", image=[hint(), hint(), hint()])],
        [ImagePrompt(name="plain", image=hint(), scale=float("nan"))],
        [ImagePrompt(name="plain", image=hint(), scale={"middle": 1.0})],
        [ImagePrompt(name="plain", image=hint())] * 2,
        ["plain"],
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(pipes: Callable[[str], Pipeline], prompts: Any) -> None:
    with pytest.raises(RequestError, check=about("image_prompts")):
        ours(pipes("sd1"), *prompts)


def test_a_bundle_without_any_says_how_to_export_one(made: Make) -> None:
    with Pipeline.load(made("sd1", "")[1], "cpu") as pipe, pytest.raises(RequestError, check=about("image_prompts")):
        ours(pipe, ImagePrompt(name="plain", image=hint()))


def test_with_a_lora_for_one_call(shown: Shown, pipes: Callable[[str], Pipeline], tmp_path: Path) -> None:
    made, pipe, prompt = shown("sd1"), pipes("sd1"), ImagePrompt(name="plus", image=hint(), scale=0.7)
    file = save(tmp_path / "style.safetensors", kohya(make_factors(made.checkpoint, seed=4)))
    merged: dict[str, Any] = {}
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        source = replace(
            to_weight_source(part, made.checkpoint / part), loras=(LoraFusion(path=str(file), strength=0.8),)
        )
        with written(source, tmp_path / part) as folder:
            merged[part] = kind.from_pretrained(folder)
    other = reference(made, "sd1", "plus", **merged)
    other.set_ip_adapter_scale(0.7)
    expected = theirs(other, ip_adapter_image=hint(), guidance_scale=3.0, **SIZE)
    lora = Lora(file=file, scale=0.8)
    assert psnr(ours(pipe, prompt, loras=[lora]), expected) >= LEAST
    assert psnr(ours(pipe, prompt), expected) < LEAST


VARIANTS: Mapping[str, Any] = {
    "inpainting": diffusers.StableDiffusionInpaintPipeline,
    "lcm": diffusers.StableDiffusionPipeline,
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_unets_attend_to_images(shown: Shown, made: Make, workshop: Path, variant: str) -> None:
    networks, (checkpoint, _) = shown("sd1").networks, made("sd1", variant)
    bundle = workshop / f"sd1-{variant}-shown"
    options = CheckpointOptions(ip_adapters=(ControlNetOption(name="plus", path=str(networks["plus"])),))
    export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options)
    found = Controlled(checkpoint=checkpoint, networks=networks, bundle=bundle)
    other = reference(found, "sd1", "plus", kind=VARIANTS[variant])
    other.set_ip_adapter_scale(0.7)
    prompt = ImagePrompt(name="plus", image=hint(), scale=0.7)
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        if variant == "lcm":
            other.scheduler = diffusers.LCMScheduler.from_config(other.scheduler.config)
            expected = theirs(other, ip_adapter_image=hint(), guidance_scale=4.0, **SIZE)
            assert psnr(ours(pipe, prompt, sampler="lcm", guidance=4.0), expected) >= LEAST
        else:
            images = {"image": photo(), "mask_image": left_half(), "strength": 1.0}
            expected = theirs(other, ip_adapter_image=hint(), guidance_scale=3.0, **images, **SIZE)
            assert psnr(ours(pipe, prompt, image=photo(), mask=left_half()), expected) >= LEAST


@pytest.mark.slow
def test_a_refiner_takes_over_what_an_image_prompted(shown: Shown, made: Make, workshop: Path) -> None:
    networks, (checkpoint, _), (refiner, _) = shown("sdxl").networks, made("sdxl", ""), made("sdxl", "refiner")
    bundle = workshop / "sdxl-refined-shown"
    adapters = (ControlNetOption(name="plain", path=str(networks["plain"])),)
    options = CheckpointOptions(ip_adapters=adapters, refiner=str(refiner))
    export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options)
    prompt = ImagePrompt(name="plain", image=hint(), scale=0.7)
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        refined, plain = (ours(pipe, prompt, steps=8, refine_from=share) for share in (0.5, None))
        assert psnr(refined, plain) < LEAST  # the refiner had a part in it
        assert psnr(refined, ours(pipe, steps=8, refine_from=0.5)) < LEAST  # and so had the image
