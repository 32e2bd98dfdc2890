"""The linear preview is fitted on any VAE, and shows what the model has in mind long before the latents do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import MANIFEST, LatentSpec
from latentrt.engines.bundle.training import Prediction
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Array
from latentrt.export.demo.drawing import any_scene, draw_scene
from latentrt.export.graphs.preview import GRAPHS, fit_preview, least_squares, made_up_picture, r_squared
from latentrt.runtime.images.preview import predicted_latents, preview
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.noise import TorchCpuNoise
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised
from tests import loop
from tests.sampler_oracle import SHAPE, STABLE_DIFFUSION, network

# The share of the colours' variance that one matrix explains on the demo's drawings; 0.99 was measured.
DEMO = 0.95
# float32 differences divided by the weight of the model's output, which is a twentieth at least.
SOLVED = 5e-3
SPACE = LatentSpec(channels=3, factor=4, scaling_factor=0.5)


# --- the fit ---


def write_vae(root: Path, *, decoder_ends_with: str | None = None) -> None:
    """Write a VAE whose preview is known: its latents are the mean colours, and it decodes them into flat squares."""
    axes = ["batch", 3, "height", "width"]
    encoder = [
        helper.make_node("AveragePool", ["sample"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Concat", ["means", "means"], ["latent_parameters"], axis=1),
    ]
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, 4.0, 4.0])
    large = "large" if decoder_ends_with else "sample"
    decoder = [helper.make_node("Resize", ["latent_sample", "", "scales"], [large], mode="nearest")]
    if decoder_ends_with:
        decoder.append(helper.make_node(decoder_ends_with, [large], ["sample"]))
    ends = (("sample", "latent_parameters"), ("latent_sample", "sample"))
    for name, nodes, (taken, given) in zip(GRAPHS, (encoder, decoder), ends, strict=True):
        inputs = [helper.make_tensor_value_info(taken, TensorProto.FLOAT, axes)]
        outputs = [helper.make_tensor_value_info(given, TensorProto.FLOAT, ["batch", None, "down", "across"])]
        graph = helper.make_graph(nodes, name, inputs, outputs, [scales] if nodes is decoder else [])
        file = root / "onnx" / name / "model.onnx"
        file.parent.mkdir(parents=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(file))


def test_a_vae_whose_preview_is_known_gets_that_preview(tmp_path: Path) -> None:
    write_vae(tmp_path)
    fit = fit_preview(tmp_path, SPACE)
    expected = np.concatenate([np.eye(3) * 127.5 / 0.5, np.full((1, 3), 127.5)])
    np.testing.assert_allclose(fit.weights, expected, atol=1)  # of 255: the ridge takes a little
    assert fit.r_squared > 0.999
    assert fit_preview(tmp_path, SPACE) == fit


def test_a_vae_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    write_vae(tmp_path, decoder_ends_with="Log")  # of a negative number
    with pytest.raises(CheckpointError, match=r"--precision fp32.* --vae"):
        fit_preview(tmp_path, SPACE)


def test_least_squares_are_numpys() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((500, 4)) * 30  # large beside the ridge
    targets = inputs @ generator.standard_normal((4, 3)) + generator.standard_normal((500, 3)) + 5
    expected, *_ = np.linalg.lstsq(np.concatenate([inputs, np.ones((500, 1))], axis=1), targets, rcond=None)
    np.testing.assert_allclose(least_squares(inputs, targets), expected, rtol=1e-4, atol=1e-4)


def test_a_channel_that_never_changes_has_no_weight() -> None:
    inputs = np.random.default_rng(0).standard_normal((200, 3))
    inputs[:, 1] = 7.0
    weights = least_squares(inputs, inputs[:, [0, 2, 0]])
    assert np.abs(weights[1]).max() < 1e-9
    np.testing.assert_allclose(weights[[0, 2]], [[1, 0, 1], [0, 1, 0]], atol=0.01)


def test_r_squared_is_one_for_all_and_nothing_for_the_mean() -> None:
    targets = np.random.default_rng(0).standard_normal((50, 3))
    assert r_squared(targets, targets) == 1
    assert r_squared(np.broadcast_to(targets.mean(axis=0), targets.shape), targets) == pytest.approx(0)
    assert r_squared(np.zeros((5, 3)), np.zeros((5, 3))) == 0


def test_made_up_pictures_are_pictures_in_many_colours() -> None:
    pictures = [made_up_picture(np.random.default_rng(seed), 32) for seed in range(40)]
    for picture in pictures:
        assert (picture.shape, picture.dtype) == ((3, 32, 32), np.float32)
        assert np.abs(picture).max() <= 1
    assert np.stack(pictures).std(axis=(0, 2, 3)).min() > 0.3


@pytest.mark.parametrize("bundle", ["sd1_bundle", "sd2_bundle", "sd1_half_bundle"])
def test_any_checkpoint_has_a_preview(bundle: str, request: pytest.FixtureRequest) -> None:
    space = Bundle.open(request.getfixturevalue(bundle)).manifest.latents
    latents = TorchCpuNoise(0).normal((2, space.channels, 5, 7))
    assert preview(latents, space).shape == (2, 5, 7, 3)


def test_the_demos_preview_is_what_its_vae_decodes_in_small(demo_bundle: Path) -> None:
    bundle, generator = Bundle.open(demo_bundle), np.random.default_rng(1)
    space = bundle.manifest.latents
    drawings = np.stack([draw_scene(any_scene(generator, pairs=0.2)) for _ in range(6)])
    opened = open_engines(bundle, "cpu", components=("vae_encoder", "vae_decoder"), threads=1)
    pixels = (drawings / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32)
    means = opened.engines["vae_encoder"]({"sample": pixels})["latent_parameters"][:, : space.channels].copy()
    decoded = opened.engines["vae_decoder"]({"latent_sample": means})["pixels"]
    small = decoded.reshape(6, 16, 8, 16, 8, 3).mean(axis=(2, 4))
    found = preview(means * np.float32(space.scaling_factor), space)
    assert r_squared(found.reshape(-1, 3).astype(np.float64), small.reshape(-1, 3)) >= DEMO
    opened.close()


# --- the runtime's half ---

KNOWN = msgspec.structs.replace(
    SPACE, preview=((10.0, 0.0, 0.0), (0.0, 20.0, 0.0), (0.0, 0.0, 30.0), (100.0, 110.0, 120.0))
)


def test_a_preview_is_a_matrix_of_each_latent() -> None:
    latents = np.array([[2.0, -1.0, 0.5], [90.0, -90.0, 0.0]], dtype=np.float32).reshape(2, 3, 1, 1)
    found = preview(latents, KNOWN)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found.reshape(2, 3), [[120, 90, 135], [255, 0, 120]])


def test_a_bundle_without_a_preview_says_what_to_do() -> None:
    with pytest.raises(BundleError):
        preview(np.zeros((1, 3, 2, 2)), SPACE)


@pytest.mark.parametrize("rows", [[], [[1.0, 2.0, 3.0]], [[1.0, 2.0]] * 5, [[1.0, 2.0, 3.0]] * 4])
def test_a_preview_of_another_shape_is_refused_with_the_manifest(rows: Any, tmp_path: Path) -> None:
    from tests.test_bundle import write_bundle

    write_bundle(tmp_path)
    document = json.loads((tmp_path / MANIFEST).read_text())
    assert Bundle.open(tmp_path).manifest.latents.preview is None
    document["latents"]["preview"] = rows
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"\$\.latents\.preview: .* 5 "):
        Bundle.open(tmp_path)


# --- what the model has in mind ---


def stages(plan: SamplingPlan) -> list[tuple[Array, Array, Array, Array]]:
    """Return (state before, state after, the model's output, the noise) of each stage."""
    stream, walked = TorchCpuNoise(0), []
    state = np.zeros((1, plan.rows, *SHAPE[1:]), dtype=np.float32)
    state[:, 0] = plan.initial_scale * stream.normal(SHAPE)
    for k in range(plan.stages):
        seen = np.einsum("r,nr...->n...", plan.input_rows[k], state)
        output = network(seen, np.full(1, plan.timesteps[k], dtype=np.float32))
        noise = stream.normal(SHAPE) if plan.draws_noise[k] else np.zeros(SHAPE, dtype=np.float32)
        after = loop.advance(plan.transitions[k], state, output, noise)
        walked.append((state, after, output, noise))
        state = after
    return walked


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_models_picture_is_read_from_two_states(name: str) -> None:
    for prediction in SAMPLERS[name].predictions:
        schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction)
        plan = make_plan(name, schedule, steps=8)
        for k, (before, after, output, noise) in enumerate(stages(plan)):
            level = Level(*map(float, plan.levels[k]))
            expected = denoised(before[:, 0], output, level, prediction)
            found = predicted_latents(before, after, plan, k, schedule, noise=noise)
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(found, expected, atol=SOLVED * scale, err_msg=f"{prediction}, stage {k}")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_last_picture_in_mind_is_the_one_that_is_drawn(prediction: Prediction) -> None:
    schedule = msgspec.structs.replace(STABLE_DIFFUSION, prediction_type=prediction)
    plan = make_plan("euler", schedule, steps=8)
    before, after, _, _ = stages(plan)[-1]
    found = predicted_latents(before, after, plan, plan.stages - 1, schedule)
    np.testing.assert_allclose(found, after[:, 0], atol=1e-4)


def test_noise_that_weighs_something_must_be_given() -> None:
    plan = make_plan("euler_ancestral", STABLE_DIFFUSION, steps=4)
    before, after, _, _ = stages(plan)[0]
    with pytest.raises(ValueError, match=r"\b0 of euler_ancestral\b"):
        predicted_latents(before, after, plan, 0, STABLE_DIFFUSION)
