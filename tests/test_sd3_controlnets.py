"""ControlNets of SD 3 and 3.5 follow latents: what they add is what they add in diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latentrt import Batcher, BatcherOptions, Control, Pipeline, Request
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.inspection import inspect_checkpoint
from latentrt.runtime.batching.observer import Event, StageDone
from latentrt.runtime.verify.stages import verify_stages
from tests.conftest import Controlled, MakeControlled
from tests.sd3 import VAE, diffusers_sd3
from tests.stand_in import install
from tests.test_batcher import NEAR_DB, together
from tests.test_controlnet_export import options
from tests.test_controlnets import hint
from tests.test_families import LEAST, psnr
from tests.test_family_stages import LEVELS, engines_of_a_gpu
from tests.test_pipeline_images import left_half, photo
from tests.test_sd3 import PROMPT, SEED, SIZE, STEPS, drawn

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"width": SIZE[0], "height": SIZE[1]}
ASKED: dict[str, Any] = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "guidance": 4.0, "size": SIZE}
SCALES = {"edges": 0.6, "pose": 0.9, "large": 0.7}  # one of each kind
SKIPPING: dict[str, Any] = {"skip_layer_guidance": 2.8, "skip_layer_interval": (0.01, 0.7)}


def following(*names: str, **bounds: float) -> tuple[Control, ...]:
    """Return controls that follow an image each."""
    return tuple(
        Control(name=name, image=hint(seed, size=SIZE), scale=SCALES[name], **bounds) for seed, name in enumerate(names)
    )


# Ways to follow, for what must be the same wherever it is drawn.
WAYS: dict[str, dict[str, Any]] = {
    "one": {"controls": following("edges")},
    "nothing": {},
    "all, at a part of the steps": {"controls": following("large", "pose", "edges", start=0.2, stop=0.8)},
    "and layers are skipped": {"controls": following("pose"), **SKIPPING},
    "an image and a mask": {
        "controls": following("large"),
        "image": photo().resize(SIZE),
        "mask": left_half().resize(SIZE),
        "strength": 0.7,
    },
}


@pytest.fixture(autouse=True)
def most_likely_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws what is followed from the encoder's distribution, by no seed; here it is the likeliest."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture(scope="module")
def pipe(followed: Controlled) -> Iterator[Pipeline]:
    with Pipeline.load(followed.bundle, "cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(pipe: Pipeline) -> dict[str, Array]:
    """Return each way as NumPy draws it around the canonical networks."""
    return {name: pipe.draw(Request(**ASKED | way)).pixels for name, way in WAYS.items()}


def networks_of(followed: Controlled, *names: str) -> list[Any]:
    return [SD3ControlNetModel.from_pretrained(followed.networks[name]) for name in names]


def pixels_of(images: Any) -> Array:
    return np.asarray((images * 255).round())


def theirs(followed: Controlled, *names: str, **request: Any) -> Array:
    networks = networks_of(followed, *names)
    controlnet = networks if len(networks) > 1 else networks[0]
    opened = diffusers_sd3(followed.checkpoint, "StableDiffusion3ControlNetPipeline", controlnet=controlnet)
    return pixels_of(drawn(opened, **{"guidance_scale": 4.0, **SIZES} | request, output_type="np"))


@pytest.mark.parametrize("name", SCALES)
def test_one_of_each_kind_draws_the_picture_of_diffusers(followed: Controlled, pipe: Pipeline, name: str) -> None:
    """One that was trained without pooled text, one with it, and one that reads no text and has no positions."""
    expected = theirs(followed, name, control_image=hint(size=SIZE), controlnet_conditioning_scale=SCALES[name])
    assert psnr(pipe(**ASKED, controls=following(name)).pixels, expected) >= LEAST
    assert psnr(pipe(**ASKED).pixels, expected) < 30  # and without it, another picture


def test_two_at_different_parts_of_the_steps(followed: Controlled, pipe: Pipeline) -> None:
    expected = theirs(
        followed,
        "edges",
        "depth",
        control_image=[hint(0, size=SIZE), hint(1, size=(90, 50))],
        controlnet_conditioning_scale=[0.6, 1.3],
        control_guidance_start=[0.0, 0.4],
        control_guidance_end=[0.7, 1.0],
        num_inference_steps=6,
    )
    edges = Control(name="edges", image=hint(0, size=SIZE), scale=0.6, stop=0.7)
    depth = Control(name="depth", image=hint(1, size=(90, 50)), scale=1.3, start=0.4)
    asked = ASKED | {"steps": 6}
    assert psnr(pipe(**asked, controls=[depth, edges]).pixels, expected) >= LEAST
    assert psnr(pipe(**asked, controls=[edges]).pixels, expected) < LEAST


def follow(opened: Any, followed: Controlled, names: tuple[str, ...]) -> None:
    """Have the transformer of a plain pipeline follow ControlNets as each asks, whatever it shares with the others."""
    transformer, networks = opened.transformer, networks_of(followed, *names)
    forward, blocks = transformer.forward, len(transformer.transformer_blocks)
    latents = {}
    for seed, (name, network) in enumerate(zip(names, networks, strict=True)):
        if not network.config.use_pos_embed:
            network.pos_embed = network._get_pos_embed_from_transformer(transformer)
        pixels = opened.image_processor.preprocess(hint(seed, size=SIZE))
        shift = 0 if network.config.force_zeros_for_pooled_projection else VAE["shift_factor"]
        latents[name] = (opened.vae.encode(pixels).latent_dist.mode() - shift) * VAE["scaling_factor"]

    def followed_forward(**given: Any) -> Any:
        total = [torch.zeros(())] * blocks
        for name, network in zip(names, networks, strict=True):
            pooled, text = given["pooled_projections"], given["encoder_hidden_states"]
            zeros = network.config.force_zeros_for_pooled_projection
            samples = network(
                hidden_states=given["hidden_states"],
                controlnet_cond=latents[name].expand(len(pooled), -1, -1, -1),
                conditioning_scale=SCALES[name],
                encoder_hidden_states=None if network.config.joint_attention_dim is None else text,
                pooled_projections=torch.zeros_like(pooled) if zeros else pooled,
                timestep=given["timestep"],
                return_dict=False,
            )[0]
            total = [part + samples[int(i / (blocks / len(samples)))] for i, part in enumerate(total)]
        return forward(**given, block_controlnet_hidden_states=total)

    transformer.forward = followed_forward


@pytest.mark.parametrize("names", [("edges", "pose", "large"), ("edges",), ("large",)], ids="-".join)
def test_kinds_with_different_numbers_of_blocks_add_up_and_layers_are_skipped(
    followed: Controlled, pipe: Pipeline, names: tuple[str, ...]
) -> None:
    """diffusers cuts the longer ones off, and skips no layers where something is followed: so its parts are used."""
    opened = diffusers_sd3(followed.checkpoint)
    follow(opened, followed, names)
    skips = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_scale": 2.8,
        "skip_layer_guidance_start": SKIPPING["skip_layer_interval"][0],
        "skip_layer_guidance_stop": SKIPPING["skip_layer_interval"][1],
    }
    expected = pixels_of(drawn(opened, guidance_scale=4.0, **SIZES, **skips, output_type="np"))
    assert psnr(pipe(**ASKED, **SKIPPING, controls=following(*names)).pixels, expected) >= LEAST
    assert psnr(pipe(**ASKED, controls=following(*names)).pixels, expected) < LEAST


def test_each_picture_of_a_batch_follows_its_own(pipe: Pipeline) -> None:
    images = [hint(0, size=SIZE), hint(1, size=SIZE)]
    together_ = pipe(**ASKED | {"seed": [5, 6]}, n=2, controls=[Control(name="pose", image=images)]).pixels
    for picture, (seed, image) in enumerate(zip((5, 6), images, strict=True)):
        alone = pipe(**ASKED | {"seed": seed}, controls=[Control(name="pose", image=image)]).pixels[0]
        assert np.abs(together_[picture].astype(int) - alone.astype(int)).max() <= LEVELS


def test_pictures_that_follow_and_that_do_not_share_their_stages(
    pipe: Pipeline, plain: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, told = [Request(**ASKED | way) for way in WAYS.values()], list[Event]()
    with Batcher(pipe, BatcherOptions(slots=len(WAYS)), observer=told.append) as batcher:
        found = [result.pixels for result in together(monkeypatch, batcher, requests)]
    for (name, alone), shared in zip(plain.items(), found, strict=True):
        assert psnr(shared, alone) >= NEAR_DB, name
    assert max(event.pictures for event in told if isinstance(event, StageDone)) > 2


def test_the_fused_stage_draws_it_alike(followed: Controlled, plain: dict[str, Array], tmp_path: Path) -> None:
    copy = shutil.copytree(followed.bundle, tmp_path / "bundle")
    with engines_of_a_gpu():
        build_engines(Bundle.open(copy), "cpu", force=True)
        with Pipeline.load(copy, "cpu", threads=1) as fused:
            found = {name: fused.draw(Request(**ASKED | way)).pixels for name, way in WAYS.items()}
    assert_alike(found, plain)


def assert_alike(found: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, pixels in found.items():
        assert np.abs(pixels.astype(int) - expected[name].astype(int)).max() <= LEVELS, name


def test_a_device_draws_it_alike_alone_and_with_others(
    followed: Controlled, plain: dict[str, Array], tmp_path: Path
) -> None:
    """And verify compares every stage of it with the float32 graphs."""
    root = shutil.copytree(followed.bundle, tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(root), "tensorrt", options=BuildOptions(sizes=(SIZE,), batches=(1, 2)))
        with Pipeline.load(root) as compiled:
            asked = {name: Request(**ASKED | way) for name, way in WAYS.items()}
            for _ in range(2):  # graphs are launched as well as recorded
                assert_alike({name: compiled.draw(request).pixels for name, request in asked.items()}, plain)
            with Batcher(compiled, BatcherOptions(slots=2)) as batcher:
                futures = {name: batcher.submit(request)[0] for name, request in asked.items()}
                assert_alike({name: future.result(300).pixels for name, future in futures.items()}, plain)
        rows = [*verify(Bundle.open(root), backend="tensorrt"), *verify_stages(Bundle.open(root), backend="tensorrt")]
        assert device.leftovers() == {}
    assert {"controlnet_edges", "controlnet_large", "transformer"} <= {row.what for row in rows}
    assert all(row.ok for row in rows), [row.message for row in rows if not row.ok]


def test_what_each_kind_takes(followed: Controlled) -> None:
    components = Bundle.open(followed.bundle).manifest.components
    takes = {name: {tensor.name for tensor in spec.inputs} for name, spec in components.items()}
    both = {"encoder_hidden_states", "pooled_projections"}
    assert takes["controlnet_edges"] & both == {"encoder_hidden_states"}
    assert takes["controlnet_pose"] & both == both
    assert takes["controlnet_large"] & both == {"pooled_projections"}
    assert {spec.of for spec in components.values() if spec.role == "controlnet"} == {"transformer"}
    assert all(components[f"controlnet_{name}"].follows_latents for name in SCALES)
    residuals = [name for name in takes["transformer"] if name.startswith("block_residual_")]
    assert len(residuals) == 3  # of 2, 1 and 3 blocks, and as many as the transformer has


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"extra_conditioning_channels": 1}, "extra_conditioning_channels: 1"),
        ({"num_attention_heads": 3}, r"\bwidth .* 24 .* 32\b"),
        ({"joint_attention_dim": 48}, r"\bjoint_attention_dim .* 48 .* 64\b"),
        ({"pooled_projection_dim": 48}, r"\bpooled_projection_dim .* 48 .* 64\b"),
        ({"pos_embed_max_size": 8}, r"\bpos_embed_max_size .* 8 .* 16\b"),
        ({"in_channels": 4}, r"\bin_channels .* 4 .* 16\b"),
        ({"_class_name": "FluxControlNetModel"}, "FluxControlNetModel"),
    ],
)  # fmt: skip
def test_another_checkpoints_controlnet_is_refused(
    followed: Controlled, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    config = json.loads((followed.networks["edges"] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (weights,) = followed.networks["edges"].glob("*.safetensors")
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(str(followed.checkpoint), options=options(f"edges={tmp_path}"))
    with pytest.raises(CheckpointError, match=r"^--controlnet edges='.*\.safetensors' .*SD3ControlNetModel"):
        open_checkpoint(str(followed.checkpoint), options=options(f"edges={weights}"))


def test_a_unets_controlnet_and_a_transformers_are_told_apart(followed: Controlled, controlled: MakeControlled) -> None:
    unets = controlled("sd1", "")
    for checkpoint, network in (
        (followed.checkpoint, unets.networks["edges"]),
        (unets.checkpoint, followed.networks["edges"]),
    ):
        with pytest.raises(CheckpointError, match=r"ControlNetModel\b.*ControlNetModel\b"):
            open_checkpoint(str(checkpoint), options=options(f"edges={network}"))


def test_inspect_names_it_and_says_what_to_do(followed: Controlled) -> None:
    path = followed.networks["large"]
    inspection = inspect_checkpoint(str(path))
    assert inspection.model == "SD3ControlNetModel"
    command = f"latentrt export CHECKPOINT BUNDLE --controlnet NAME={path}"
    assert f"Stable Diffusion 3.x with: {command}" in (inspection.problem or "")
