"""A tiny decoder in a bundle: diffusers' AutoencoderTiny in the VAE's place, on every workspace, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.cli import show_bundle
from latentrt.engines.compare import to_pixels
from latentrt.engines.errors import BundleError, CheckpointError, EngineError, RequestError
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime import keys, session
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions
from latentrt.engines.onnxruntime.workspace import OnnxRuntimeWorkspace
from latentrt.engines.open import open_engines
from latentrt.engines.progress import silent
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions
from latentrt.runtime.cli import generate
from latentrt.runtime.draw.decode import through_engine
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.noise import TorchCpuNoise
from tests.refused import about
from tests.stand_in import install
from tests.test_parity import LIMITS, NEGATIVE, PROMPT, Reference, psnr

CALL: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance": 2.0, "seed": 5, "sampler": "euler"}
SHAPE = WorkspaceShape(pictures=2, tokens=77, width=40, height=32)
FACTOR = 4
UNET, DECODER, TINY_DECODER = "unet", "vae_decoder", "tiny_decoder"


def save_tiny_vae(folder: Path, **config: Any) -> Path:
    """Write an AutoencoderTiny with random weights for the tiny checkpoint of SD 1.x."""
    torch.manual_seed(0)
    channels = config.pop("channels", (8, 8, 8))
    blocks = tuple(1 for _ in channels)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        **config,
    )
    for parameter in vae.parameters():
        parameter.data *= 1.5  # random weights as they come give a flat picture
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[1.0, 0.5], ids=["unscaled", "scaled"])
def tiny_vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAESD is said to have a scaling factor of 1, which is to be read all the same."""
    return save_tiny_vae(tmp_path_factory.mktemp("tiny") / "vae", scaling_factor=request.param)


@pytest.fixture(scope="module")
def bundle(tiny_vae: Path, sd1_checkpoint: Path) -> Bundle:
    options = CheckpointOptions(tiny_vae=str(tiny_vae))
    export_checkpoint(str(sd1_checkpoint), tiny_vae.parent / "bundle", precision="fp32", options=options)
    return Bundle.open(tiny_vae.parent / "bundle")


@pytest.fixture
def pipe(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle.root, "cpu", threads=1) as opened:
        yield opened


def theirs(tiny_vae: Path, latents: Array) -> Array:
    """Decode latents, as the UNet sees them, as diffusers' pipelines do."""
    vae = diffusers.AutoencoderTiny.from_pretrained(tiny_vae)
    with torch.no_grad():
        return to_pixels(vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample.numpy())


def assert_close(found: Array, expected: Array, *, levels: int = 1) -> None:
    assert found.shape == expected.shape and len(np.unique(expected)) > 16
    assert np.abs(found.astype(int) - expected).max() <= levels


# --- against diffusers ---


def test_pictures_are_those_of_diffusers_pipeline_with_the_tiny_vae(
    pipe: Pipeline, tiny_vae: Path, sd1_checkpoint: Path
) -> None:
    reference = Reference(sd1_checkpoint)
    reference.pipe.vae = diffusers.AutoencoderTiny.from_pretrained(tiny_vae)
    size = {"width": 40, "height": 32}
    expected = reference("euler", [5, 6], num_inference_steps=5, guidance_scale=2.0, **size)
    found = pipe(**CALL, n=2, steps=5, size=(40, 32), decoder="tiny")
    assert found.settings[0].further == {"decoder": "tiny"}
    for ours, other in zip(found.pixels, expected, strict=True):
        assert len(np.unique(other)) > 16
        assert psnr(ours, other) >= LIMITS["random"]


def test_the_decoder_takes_what_the_vaes_decoder_takes(bundle: Bundle, tiny_vae: Path) -> None:
    manifest = bundle.manifest
    assert manifest.components[TINY_DECODER].inputs == manifest.components[DECODER].inputs
    opened = open_engines(bundle, "cpu", threads=1)
    latents = TorchCpuNoise(3).normal((2, 4, 7, 5))
    found = through_engine(opened.engines[TINY_DECODER], manifest.latents)(latents)
    opened.close()
    assert_close(found, theirs(tiny_vae, latents))


# --- in a bundle ---


def test_a_bundle_with_a_tiny_decoder_is_verified_and_shows_it(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row.what: row for row in verify(bundle)}
    assert rows[TINY_DECODER].ok
    show_bundle(bundle.root, as_json=False)
    assert TINY_DECODER in capsys.readouterr().out
    assert {f"{TINY_DECODER}/config.json", f"{TINY_DECODER}/diffusion_pytorch_model.safetensors"} <= set(
        bundle.manifest.provenance.files
    )


def test_it_is_narrowed_to_fp16_as_the_others_are(tmp_path: Path, sd1_checkpoint: Path) -> None:
    vae = save_tiny_vae(tmp_path / "vae")
    options = CheckpointOptions(tiny_vae=str(vae))
    export_checkpoint(str(sd1_checkpoint), tmp_path / "bundle", precision="fp16", options=options)
    bundle = Bundle.open(tmp_path / "bundle")
    spec = bundle.manifest.components[TINY_DECODER]
    assert spec.inputs[0].dtype == "float16" and spec.error is not None and spec.error < 1e-2
    with Pipeline.load(bundle.root, "cpu", threads=1) as pipe:
        latents: list[Array] = []
        found = pipe(**CALL, steps=2, decoder="tiny", on_step=lambda step: latents.append(step.latents))
    assert_close(found.pixels, theirs(vae, latents[-1]), levels=6)


# --- on every workspace ---


def decoded_on(workspace: Workspace, latents: Array, decoder: str = DECODER) -> Array:
    state = np.zeros((len(latents), workspace.state_rows, *latents.shape[1:]), dtype=np.float32)
    state[:, 0] = latents
    workspace.write("state", state)
    workspace.run(decoder)
    return workspace.read("pixels")


def test_bound_buffers_decode_with_either_decoder_and_with_none(bundle: Bundle, tiny_vae: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "FUSED", {"cpu"})
        built = onnxruntime.build(bundle, tmp_path, "cpu", silent)
    one = OnnxRuntimeOptions(threads=1)
    engines = {name: session.load(tmp_path / file, spec, "cpu", one) for name, (file, spec) in built.items()}
    workspace = OnnxRuntimeWorkspace(engines, bundle.manifest.latents, SHAPE, device="cpu", denoiser=UNET)
    workspace.reset(decoder=DECODER)
    latents = TorchCpuNoise(1).normal((2, 4, 8, 10))
    full = decoded_on(workspace, latents)
    workspace.reset(decoder=TINY_DECODER)
    assert_close(decoded_on(workspace, latents, TINY_DECODER), theirs(tiny_vae, latents))
    workspace.reset(decoder=DECODER)
    assert np.array_equal(decoded_on(workspace, latents), full)
    workspace.reset()
    with pytest.raises(EngineError):
        decoded_on(workspace, latents)
    del engines[TINY_DECODER]
    with pytest.raises(EngineError):
        workspace.reset(decoder=TINY_DECODER)


def test_the_workspace_in_numpy_has_the_decoder_it_was_asked_for_with(bundle: Bundle, tiny_vae: Path) -> None:
    opened, space = open_engines(bundle, "cpu", threads=1), bundle.manifest.latents
    latents = TorchCpuNoise(1).normal((2, 4, 8, 10))
    tiny = opened.workspace(space, SHAPE, state_rows=1, denoiser=UNET, decoder=TINY_DECODER)
    assert_close(decoded_on(tiny, latents, TINY_DECODER), theirs(tiny_vae, latents))
    with pytest.raises(EngineError):
        decoded_on(opened.workspace(space, SHAPE, state_rows=1, denoiser=UNET, decoder=None), latents)
    opened.close()


class Compiled:
    """A bundle built for the stand-in of TensorRT, beside the same one on the CPU."""

    def __init__(self, bundle: Bundle, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = shutil.copytree(bundle.root, root)
        self.device = install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(self.root), "tensorrt", options=BuildOptions(sizes=((40, 32), (16, 16))))


@pytest.fixture
def compiled(bundle: Bundle, tmp_path: Path) -> Iterator[Compiled]:
    with pytest.MonkeyPatch.context() as patch:
        made = Compiled(bundle, tmp_path / "compiled", patch)
        yield made
        assert made.device.leftovers() == {}


def test_compiled_engines_decode_and_draft_with_it(compiled: Compiled) -> None:
    request: dict[str, Any] = {**CALL, "steps": 3, "size": (40, 32)}
    drafts: dict[str, list[Array]] = {"tensorrt": [], "cpu": []}
    pictures = {}
    for backend, seen in drafts.items():
        with Pipeline.load(compiled.root, backend, threads=1) as pipe:
            full = pipe(**request)
            pictures[backend] = [full, pipe(**request, decoder="tiny"), pipe(**request, decoder="tiny", tile=16)]
            pipe(**request, on_step=lambda step, seen=seen: seen.append(step.draft))
            assert np.array_equal(pipe(**request).pixels, full.pixels)
    for found, expected in zip(pictures["tensorrt"], pictures["cpu"], strict=True):
        assert_close(found.pixels, expected.pixels, levels=2)
    for draft, wanted in zip(drafts["tensorrt"], drafts["cpu"], strict=True):
        assert_close(draft, wanted, levels=3)  # predicted from two states: their rounding over a small weight


def test_compiled_engines_are_verified_and_a_workspace_takes_memory_for_the_decoder_it_has(compiled: Compiled) -> None:
    rows = [row for row in verify(Bundle.open(compiled.root), backend="tensorrt") if row.what == TINY_DECODER]
    assert len(rows) == 2 and all(row.ok for row in rows)
    opened = open_engines(Bundle.open(compiled.root), "tensorrt")
    space, shape = (
        Bundle.open(compiled.root).manifest.latents,
        WorkspaceShape(pictures=1, tokens=77, width=40, height=32),
    )
    workspace: Any = opened.workspace(space, shape, state_rows=1, denoiser=UNET, decoder=None)
    passes = [run.name for run in workspace._executions]
    assert not [name for name in passes if "decoder" in name]
    with pytest.raises(EngineError):
        workspace.run(TINY_DECODER)
    opened.workspace(space, shape, state_rows=1, denoiser=UNET, decoder=TINY_DECODER)
    opened.workspace(space, shape, state_rows=1, denoiser=UNET, decoder=TINY_DECODER)
    assert [run.name.split(",")[0] for run in workspace._executions[len(passes) :]] == [TINY_DECODER]
    opened.close()


# --- drafts ---


def test_the_last_draft_is_the_tiny_decoders_picture(pipe: Pipeline) -> None:
    drafts: list[Array] = []
    request: dict[str, Any] = {**CALL, "steps": 4, "n": 2, "size": (40, 32)}
    found = pipe(**request, decoder="tiny", on_step=lambda step: drafts.append(step.draft))
    assert len(drafts) == 4
    assert_close(drafts[-1], found.pixels, levels=2)


def test_a_draft_of_a_large_picture_is_made_in_tiles_too(pipe: Pipeline) -> None:
    drafts: list[Array] = []
    request: dict[str, Any] = {**CALL, "steps": 2, "size": (64, 32)}
    tiled = pipe(**request, decoder="tiny", tile=32, on_step=lambda step: drafts.append(step.draft))
    assert_close(drafts[-1], tiled.pixels, levels=2)


def test_the_command_line_decodes_with_it(bundle: Bundle, tmp_path: Path, pipe: Pipeline) -> None:
    from PIL import Image

    args = [str(bundle.root), PROMPT, "--steps", "2", "--seed", "4", "--decoder", "tiny", "--backend", "cpu"]
    ran = CliRunner().invoke(generate, [*args, "-o", str(tmp_path / "drawn.png"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["decoder"] == "tiny"
    image = Image.open(tmp_path / "drawn.png")
    assert "Decoder: tiny" in image.info["parameters"]
    expected = pipe(PROMPT, steps=2, seed=4, decoder="tiny").pixels[0]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


# --- what is refused ---


def test_a_bundle_without_one_says_so_in_a_sentence(sd1_bundle: Path) -> None:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as pipe:
        with pytest.raises(RequestError, check=about("decoder")):
            pipe(**CALL, steps=1, decoder="tiny")
        with pytest.raises(BundleError, match=r"--tiny-vae DIRECTORY$"):
            pipe(**CALL, steps=1, on_step=lambda step: np.asarray(step.draft).sum())
        with pytest.raises(RequestError, check=about("decoder")):
            pipe(**CALL, steps=1, decoder="small")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"latent_channels": 6}, "^--tiny-vae: .* 6 .* 4 .* 4 .* 4 "),
        ({"channels": (8, 8)}, "^--tiny-vae: .* 4 .* 2 .* 4 .* 4 "),
    ],
)
def test_one_that_was_made_for_other_latents_is_refused(
    config: dict[str, Any], told: str, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    vae = save_tiny_vae(tmp_path / "vae", **config)
    with pytest.raises(CheckpointError, match=told):
        export_checkpoint(str(sd1_checkpoint), tmp_path / "b", options=CheckpointOptions(tiny_vae=str(vae)))


def test_what_is_no_tiny_vae_is_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    for given, told in (
        (sd1_checkpoint / "vae", r" \$\._class_name: .*'AutoencoderKL', .* AutoencoderTiny; .* --vae$"),
        (tmp_path / "nothing", "^--tiny-vae '.*/nothing'"),
        (tmp_path, r"/config\.json\b"),
    ):
        with pytest.raises(CheckpointError, match=told):
            export_checkpoint(str(sd1_checkpoint), tmp_path / "b", options=CheckpointOptions(tiny_vae=str(given)))
