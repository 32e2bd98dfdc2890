"""What configs leave out, and null in them, mean what they mean to diffusers and transformers."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.defaults import KEYS, UNUSED, complete
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.export.sources.diffusers_folder import read_config
from latentrt.export.sources.parts import Part
from tests.sd3 import make_sd3, save_sd3_controlnet
from tests.svd import make_svd
from tests.test_families import LEAST, ours, psnr, reference, theirs
from tests.test_tiny_decoder import save_tiny_vae
from tests.tiny import save_adapter, save_controlnet, save_image_encoder, save_ip_adapter, save_tiny
from tests.tiny_t5 import save_t5

CLASSES: dict[Part, Any] = {
    "unet": diffusers.UNet2DConditionModel,
    "transformer": diffusers.SD3Transformer2DModel,
    "vae": diffusers.AutoencoderKL,
    "controlnet": diffusers.ControlNetModel,
    "transformer_controlnet": diffusers.SD3ControlNetModel,
    "adapter": diffusers.T2IAdapter,
    "tiny_vae": diffusers.AutoencoderTiny,
    "motion_adapter": diffusers.MotionAdapter,
    "video_unet": diffusers.UNetSpatioTemporalConditionModel,
    "video_vae": diffusers.AutoencoderKLTemporalDecoder,
}
CONFIGS: dict[Part, Any] = {"image_encoder": CLIPVisionConfig, "text_encoder_3": T5Config}
# A motion adapter is not for the checkpoint of these tests, an SDXL, which refuses it whatever its config says.
ROWS: list[tuple[Part, str]] = [(part, key) for part, keys in KEYS.items() if part != "motion_adapter" for key in keys]


def alike(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("part", KEYS)
def test_defaults_are_those_of_the_signatures(part: Part) -> None:
    if part in CONFIGS:
        defaults = vars(CONFIGS[part]())
    elif part in CLASSES:
        defaults = {key: row.default for key, row in inspect.signature(CLASSES[part].__init__).parameters.items()}
    else:
        defaults = vars(CLIPTextConfig())
    assert {key: alike(row.default) for key, row in KEYS[part].items()} == {
        key: alike(defaults[key]) for key in KEYS[part]
    }


# --- null ---


@pytest.fixture(scope="module")
def sdxl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sdxl") / "checkpoint", family="sdxl")


@pytest.fixture(scope="module")
def folders(sdxl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Part, Path]:
    """Return a folder of each kind of network that belongs to one tiny SDXL, and the transformer of an SD 3."""
    root, checkpoint = tmp_path_factory.mktemp("parts"), sdxl_checkpoint
    own: tuple[Part, ...] = ("text_encoder", "text_encoder_2", "unet", "vae")
    svd = make_svd(root / "svd")
    return {
        "video_unet": svd / "unet",
        "video_vae": svd / "vae",
        **{part: checkpoint / part for part in own},
        "transformer": make_sd3(root / "sd3") / "transformer",
        "controlnet": save_controlnet(root / "controlnet", family="sdxl"),
        "transformer_controlnet": save_sd3_controlnet(root / "sd3-controlnet", kind="pooled as zeros"),
        "adapter": save_adapter(root / "adapter", family="sdxl"),
        "tiny_vae": save_tiny_vae(root / "tiny_vae"),
        "text_encoder_3": save_t5(root / "t5"),
        "image_encoder": save_image_encoder(root / "image_encoder"),
    }


def use(part: Part, config: dict[str, Any]) -> None:
    """Make a network of a config with the library that owns it, and let it compute what pipelines let it compute."""
    texts = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    if part == "text_encoder_3":
        T5EncoderModel(T5Config(**config))(torch.tensor([[1, 2, 3]]))
        return
    if part in texts:
        known = {key: value for key, value in config.items() if key not in ("architectures", "transformers_version")}
        texts[part](CLIPTextConfig(**known))(torch.tensor([[1, 2, 3]]))
        return
    if part == "image_encoder":
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        vision(torch.zeros(1, 3, vision.config.image_size, vision.config.image_size))
        return
    model = CLASSES[part].from_config(config)
    if part == "adapter":
        model(torch.zeros(1, model.config.in_channels, 64, 64))
    if part == "video_unet":
        model(torch.zeros(1, 2, 8, 4, 4), 1, torch.zeros(1, 1, 24), torch.zeros(1, 3))
    if part == "video_vae":
        model.decode(torch.zeros(1, model.config.latent_channels, 4, 4) / model.config.scaling_factor, num_frames=1)
    if part == "unet":
        told = {"text_embeds": torch.zeros(1, 40), "time_ids": torch.zeros(1, 6)}
        model(torch.zeros(1, 4, 4, 4), 1, torch.zeros(1, 3, 80), added_cond_kwargs=told)
    if part == "transformer":
        model(torch.zeros(1, 16, 4, 4), torch.zeros(1, 3, 64), torch.zeros(1, 64), torch.ones(1))
    if part == "transformer_controlnet":
        text = None if model.config.joint_attention_dim is None else torch.zeros(1, 3, 64)
        model(torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4), 1.0, text, torch.zeros(1, 64), torch.ones(1))
    if part in ("vae", "tiny_vae"):
        model.decode(torch.zeros(1, model.config.latent_channels, 4, 4) / model.config.scaling_factor)


def opened(part: Part, checkpoint: Path, network: Path) -> None:
    """Open a checkpoint with a network that is not its own, or with its own."""
    if part in ("text_encoder_3", "video_unet", "video_vae"):  # the checkpoint is of a family without it
        read_config(part, network)
        return
    if part in ("controlnet", "transformer_controlnet"):
        options = CheckpointOptions(controlnets=(ControlNetOption(name="a", path=str(network)),))
    elif part == "adapter":
        options = CheckpointOptions(adapters=(ControlNetOption(name="a", path=str(network)),))
    elif part == "image_encoder":
        adapter = save_ip_adapter(network / "a.safetensors", family="sdxl", kind="plus")
        adapters = (ControlNetOption(name="a", path=str(adapter)),)
        options = CheckpointOptions(ip_adapters=adapters, image_encoder=str(network))
    else:
        options = CheckpointOptions(tiny_vae=str(network)) if part == "tiny_vae" else CheckpointOptions()
    open_checkpoint(str(checkpoint), options=options)


def fails(call: Callable[[], None], *errors: type[Exception]) -> bool:
    try:
        call()
    except errors:
        return True
    return False


@pytest.mark.parametrize(("part", "key"), ROWS, ids=["-".join(row) for row in ROWS])
def test_null_is_refused_where_the_libraries_fail_on_it(
    folders: dict[Part, Path], part: Part, key: str, tmp_path: Path
) -> None:
    home = folders["transformer" if part.startswith("transformer") else "unet"].parent
    checkpoint = Path(shutil.copytree(home, tmp_path / "checkpoint"))
    network = checkpoint / part
    if not network.is_dir():
        shutil.copytree(folders[part], network)
    config = json.loads((network / "config.json").read_text()) | {key: None}
    (network / "config.json").write_text(json.dumps(config))
    refused = fails(lambda: opened(part, checkpoint, network), CheckpointError)
    others = (
        ("unet", "addition_embed_type"),
        ("controlnet", "addition_embed_type"),
        ("transformer", "pos_embed_max_size"),
        ("transformer_controlnet", "pos_embed_max_size"),
        ("video_unet", "num_frames"),
    )
    if (part, key) in others:
        assert refused  # of another family, or for one size or length, which the libraries make all the same
    else:
        assert refused == fails(lambda: use(part, config), Exception)


@pytest.mark.parametrize("part", KEYS)
def test_a_config_of_nothing_is_that_of_the_class(part: Part) -> None:
    assert complete(part, {}, where="x") == {key: row.default for key, row in KEYS[part].items()}


def test_what_diffusers_wrote_and_does_not_read_is_not_read(folders: dict[Part, Path]) -> None:
    config = json.loads((folders["vae"] / "config.json").read_text()) | {UNUSED: ["scaling_factor"]}
    expected = diffusers.AutoencoderKL.from_config(config).config.scaling_factor
    assert complete("vae", config, where="x")["scaling_factor"] == expected != config["scaling_factor"]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "in_channels", "4"),
        ("unet", "block_out_channels", []),
        ("unet", "block_out_channels", [16, None]),
        ("unet", "cross_attention_dim", [True]),
        ("unet", "sample_size", [8, 8, 8]),
        ("unet", "sample_size", 0),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", float("nan")),
        ("text_encoder", "eos_token_id", [2]),
        ("text_encoder", "hidden_act", 3),
        ("controlnet", "global_pool_conditions", "no"),
    ],
)
def test_what_is_no_such_value_is_refused_by_its_key(part: Part, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^x \$\.{key}: "):
        complete(part, {key: value}, where="x")


# --- the size of pictures ---


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(f"{request.param}_checkpoint"), tmp_path / "checkpoint"))


def edit(path: Path, *absent: str, **keys: Any) -> None:
    document = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in document.items() if key not in absent}))


SIZES: list[tuple[str, Any, str | None]] = [  # the family, sample_size, who wrote it
    ("sd1", 8, None),
    ("sd1", 8, "0.8.1"),
    ("sd1", 66, "0.2.2"),
    ("sd1", 8, "0.9.0.dev0"),
    ("sd1", 8, "0.10.0"),
    ("sd1", [8, 12], "0.6.0"),
    ("sd1", [12, 8], None),
    ("sdxl", 8, "0.6.0"),
]
ZERO_NEGATIVE = "force_zeros_for_empty_prompt"
PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


@pytest.mark.parametrize(("copy", "size", "version"), SIZES, indirect=["copy"])
def test_a_picture_of_no_given_size_is_as_large_as_diffusers(copy: Path, size: Any, version: str | None) -> None:
    edit(copy / "unet" / "config.json", "_diffusers_version", sample_size=size)
    if version:
        edit(copy / "unet" / "config.json", _diffusers_version=version)
    opened = open_checkpoint(str(copy))
    pipe = reference(PIPELINES[opened.family], copy, diffusers.EulerDiscreteScheduler)
    _, height, width, _ = theirs(pipe, num_inference_steps=1, guidance_scale=1.0).shape
    assert opened.default_size == (width, height)


@pytest.mark.parametrize(("copy", "side"), [("sd1", 64), ("sd2", 96), ("sdxl", 128)], indirect=["copy"])
def test_where_diffusers_has_no_size_the_published_one_is_taken(copy: Path, side: int) -> None:
    edit(copy / "unet" / "config.json", sample_size=None)
    opened = open_checkpoint(str(copy))
    if opened.family in PIPELINES:
        with pytest.raises(TypeError):
            theirs(reference(PIPELINES[opened.family], copy, diffusers.EulerDiscreteScheduler))
    factor = opened.latents.factor
    assert opened.default_size == (side * factor, side * factor)


# --- model_index.json ---


@pytest.mark.parametrize("copy", ["sdxl", "sd1"], indirect=True)
@pytest.mark.parametrize("given", [{}, {ZERO_NEGATIVE: None}, {ZERO_NEGATIVE: False}, {ZERO_NEGATIVE: True}])
def test_an_absent_negative_prompt_is_what_it_is_to_diffusers(copy: Path, given: dict[str, Any]) -> None:
    edit(copy / "model_index.json", ZERO_NEGATIVE)
    edit(copy / "model_index.json", **given)
    opened = open_checkpoint(str(copy))
    pipe = PIPELINES[opened.family].from_pretrained(copy)
    knows = ZERO_NEGATIVE in inspect.signature(type(pipe).__init__).parameters
    assert opened.zero_negative == (knows and bool(pipe.config[ZERO_NEGATIVE]))


# --- a whole checkpoint ---


def test_a_checkpoint_in_bfloat16_whose_configs_say_the_least_draws_diffusers_picture(
    sd1_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(copy).to(torch.bfloat16)
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    pipe.save_pretrained(copy, variant="bf16")
    for part in ("unet", "vae", "text_encoder"):
        config = json.loads((copy / part / "config.json").read_text())
        signature = inspect.signature(CLASSES[part].__init__).parameters if part in CLASSES else {}
        defaults = {key: row.default for key, row in signature.items()} or vars(CLIPTextConfig())
        idle = [key for key, value in config.items() if key in defaults and alike(defaults[key]) == alike(value)]
        edit(copy / part / "config.json", *idle, "architectures", "_class_name", "torch_dtype", "dtype")
    edit(copy / "unet" / "config.json", sample_size=[8, 10])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(copy, variant="bf16").to(torch.float32)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    export_checkpoint(str(copy), tmp_path / "bundle", precision="fp32")
    assert Bundle.open(tmp_path / "bundle").manifest.default_size == (40, 32)
    assert psnr(ours(tmp_path / "bundle", guidance=3.0, sampler="euler"), theirs(pipe, guidance_scale=3.0)) >= LEAST
