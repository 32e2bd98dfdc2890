"""IP-Adapters that are exported with a checkpoint: recognised, and checked against the UNet and the image encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.engines.bundle.manifest import ImagePromptSpec
from latentrt.engines.bundle.safetensors_header import StoredTensor, TensorFile
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.defaults import per_level
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.export.sources.diffusers_folder import network_files, open_network, read_config
from latentrt.export.sources.parts import ImageAdapter, Parts, WeightSource
from latentrt.export.sources.places import absent, find_place
from latentrt.export.sources.single_file import read_weights_header

if TYPE_CHECKING:
    from latentrt.export.checkpoint import Checkpoint

IMAGE_ENCODER, IMAGE_PROJECTION = "image_encoder", "image_projection"
ENCODER_KIND = "CLIPVisionModelWithProjection"
PLAIN_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of IP-Adapter, by a weight that it alone has.

    reads: the output of the image encoder; input_at, output_at: a weight and its axis that have the width of what
        it reads, and of what it gives
    """

    mark: str
    reads: str
    input_at: tuple[str, int]
    output_at: tuple[str, int]


# In diffusers' order of asking.
KINDS: Mapping[str, Kind] = {
    "IP-Adapter": Kind(
        mark="proj.weight", reads="image_embeds", input_at=("proj.weight", 1), output_at=("norm.weight", 0)
    ),
    "IP-Adapter Full": Kind(
        mark="proj.3.weight",
        reads="penultimate_hidden_state",
        input_at=("proj.0.weight", 0),
        output_at=("proj.3.weight", 0),
    ),
    "IP-Adapter Plus": Kind(
        mark="latents",
        reads="penultimate_hidden_state",
        input_at=("proj_in.weight", 1),
        output_at=("proj_out.weight", 0),
    ),
}


def add_ip_adapters(parts: Parts, options: CheckpointOptions) -> Parts:
    """Add IP-Adapters and their image encoder to a checkpoint's networks.

    Raises CheckpointError if one is missing, is of a kind that is not supported, or was made for another checkpoint.
    """
    if parts.source == "onnx":
        raise CheckpointError(
            "--ip-adapter needs a UNet with inputs for it, and optimum exported this one without; "
            "give the checkpoint that it came from"
        )
    if "unet" not in parts.configs:
        raise CheckpointError(
            "--ip-adapter: there are none for this family here; give a checkpoint of SD 1.x, 2.x or XL"
        )
    if options.motion_adapter:
        raise CheckpointError(
            "--ip-adapter goes with pictures, and --motion-adapter makes videos; export a bundle for each"
        )
    chosen = sorted(options.ip_adapters, key=lambda option: option.name)
    names = [option.name for option in chosen]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CheckpointError(f"--ip-adapter: the name '{twice}' was given twice; give each a name of its own")
    files = {option.name: _read(option, allow_pickle=options.allow_pickle) for option in chosen}
    folder, encoder = _find_encoder(options, [(option, files[option.name]) for option in chosen])
    parts = _with_encoder(parts, folder, encoder, allow_pickle=options.allow_pickle)
    for option in chosen:
        parts = _with_adapter(parts, option, files[option.name], encoder)
    return parts


def _where(option: ControlNetOption) -> str:
    return f"--ip-adapter {option.name}='{option.path}'"


def _read(option: ControlNetOption, *, allow_pickle: bool) -> TensorFile:
    path, where = find_place(option.path), _where(option)
    if not path.is_file():
        raise CheckpointError(f"{where} {absent(option.path)}; give a safetensors file")
    file = read_weights_header(path, allow_pickle=allow_pickle)
    if _reads_faces(file):
        raise CheckpointError(
            f"{where} was recognised as IP-Adapter FaceID, which reads faces with a network that is not part of it and "
            "is not supported; give a plain one, Plus or Full, such as ip-adapter-plus-face"
        )
    strangers = [key for key in file.tensors if not key.startswith(("image_proj.", "ip_adapter."))]
    if _kind(file) is None or strangers:
        found = f"holds {strangers[0]}" if strangers else "holds no projection that is known here"
        raise CheckpointError(f"{where} is no IP-Adapter as it is published: it {found}; `latentrt inspect` says more")
    return file


def _reads_faces(file: TensorFile) -> bool:
    """Tell whether an adapter reads faces with a network of another maker, which is not there to be exported."""
    own = _kind(file) is None and {"image_proj.proj.0.weight", "image_proj.norm.weight"} <= file.tensors.keys()
    return own or any("perceiver_resampler" in key or "_lora." in key for key in file.tensors)


def _kind(file: TensorFile) -> Kind | None:
    return next((kind for kind in KINDS.values() if f"image_proj.{kind.mark}" in file.tensors), None)


def _size(file: TensorFile, at: tuple[str, int]) -> int:
    name, axis = at
    stored: StoredTensor | None = file.tensors.get(f"image_proj.{name}")
    return stored.shape[axis] if stored is not None and len(stored.shape) > axis else 0


def _find_encoder(
    options: CheckpointOptions, files: Sequence[tuple[ControlNetOption, TensorFile]]
) -> tuple[Path, dict[str, Any]]:
    """Return the directory and the config of the encoder that all the adapters read images with."""
    named = options.image_encoder
    places = [find_place(named)] if named else list(_published_places(files))
    there = [place for place in places if (place / "config.json").is_file()]
    if not there:
        where = (
            f"--image-encoder '{named}' holds no config.json" if named else "--ip-adapter: no image encoder is beside"
        )
        raise CheckpointError(
            f"{where}; give the directory of the {ENCODER_KIND} that the adapter was trained with, "
            "models/image_encoder in the published repository, with --image-encoder DIRECTORY"
        )
    found = [(place, read_config("image_encoder", place)) for place in there]
    fitting = [(place, config) for place, config in found if all(_fits(file, config) for _, file in files)]
    if not fitting:
        place, config = found[0]
        option, file = next((option, file) for option, file in files if not _fits(file, config))
        kind = _kind(file)
        assert kind is not None
        raise CheckpointError(
            f"{_where(option)} reads images encoded to a width of {_size(file, kind.input_at)} and the encoder in "
            f"'{place}' gives {_width(kind, config)}; give the one it was trained with as --image-encoder DIRECTORY, "
            "and adapters of another encoder to a bundle of their own"
        )
    place, config = fitting[0]
    if config.get("architectures") not in (None, [ENCODER_KIND]):
        raise CheckpointError(f"'{place}' was recognised as {config['architectures']}, expected a {ENCODER_KIND}")
    return place, config


def _published_places(files: Sequence[tuple[ControlNetOption, TensorFile]]) -> Iterator[Path]:
    """Yield where the published repository has encoders: beside a family's adapters, and one for several families."""
    for option, _ in files:
        folder = find_place(option.path).absolute().parent
        yield folder / IMAGE_ENCODER
        yield folder.parent / "models" / IMAGE_ENCODER


def _fits(file: TensorFile, config: Mapping[str, Any]) -> bool:
    kind = _kind(file)
    return kind is not None and _size(file, kind.input_at) == _width(kind, config)


def _width(kind: Kind, config: Mapping[str, Any]) -> int:
    return encoder_dimensions(config)["clip_projection" if kind.reads == "image_embeds" else "clip_width"]


def encoder_dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    """Name the sizes of an image encoder. config: of CLIP's vision model"""
    return {
        "clip_side": config["image_size"],
        "clip_positions": (config["image_size"] // config["patch_size"]) ** 2 + 1,
        "clip_width": config["hidden_size"],
        "clip_projection": config["projection_dim"],
    }


def _with_encoder(parts: Parts, folder: Path, config: Mapping[str, Any], *, allow_pickle: bool) -> Parts:
    files = [folder / "config.json", *network_files(folder, allow_pickle=allow_pickle)]
    return replace(
        parts,
        configs={**parts.configs, IMAGE_ENCODER: config},
        networks={**parts.networks, IMAGE_ENCODER: open_network("image_encoder", folder, allow_pickle=allow_pickle)},
        files={**parts.files, **{f"{IMAGE_ENCODER}/{file.name}": file for file in files}},
    )


def _with_adapter(parts: Parts, option: ControlNetOption, file: TensorFile, encoder: Mapping[str, Any]) -> Parts:
    kind, sizes = _kind(file), encoder_dimensions(encoder)
    assert kind is not None
    _check(option, file, kind, parts.configs["unet"])
    states = kind.reads != "image_embeds"
    plain = {"clip_projection": sizes["clip_projection"], "clip_positions": 0, "clip_width": 0}
    tokens = _size(file, ("latents", 1)) or (sizes["clip_positions"] if states else PLAIN_TOKENS)
    component, path = f"{IMAGE_PROJECTION}_{option.name}", str(file.path.absolute())
    adapter = ImageAdapter(
        spec=ImagePromptSpec(
            name=option.name,
            encoder=IMAGE_ENCODER,
            projection=component,
            reads=kind.reads,
            tokens=tokens,
            zero_negative=not states,
        ),
        attention=WeightSource(part="image_attention", config="{}", files=(path,), layout="original"),
        dimensions={**({**sizes, "clip_projection": 0} if states else plain), "projected_tokens": tokens},
    )
    projection = WeightSource(part="image_projection", config="{}", files=(path,), layout="original")
    return replace(
        parts,
        networks={**parts.networks, component: projection},
        files={**parts.files, f"{component}/{file.path.name}": file.path},
        image_adapters=(*parts.image_adapters, adapter),
    )


def _check(option: ControlNetOption, file: TensorFile, kind: Kind, unet: Mapping[str, Any]) -> None:
    """Refuse an adapter whose weights are not those of the checkpoint's attentions."""
    width = per_level(unet["cross_attention_dim"], 1)[0]
    layers = attention_layers(unet)
    expected: dict[str, tuple[int, ...]] = {
        f"{2 * number + 1}.{name}.weight": (channels, width)
        for number, channels in enumerate(layers.values())
        for name in ("to_k_ip", "to_v_ip")
    }
    start = "ip_adapter."
    found = {key.removeprefix(start): stored.shape for key, stored in file.tensors.items() if key.startswith(start)}
    given = _size(file, kind.output_at)
    if found != expected or given != width:
        differing = next((key for key in sorted(found.keys() | expected) if found.get(key) != expected.get(key)), None)
        what = f"its ip_adapter.{differing} is {found.get(differing)}" if differing else f"its tokens are {given} wide"
        wanted = expected.get(differing) if differing else width
        raise CheckpointError(
            f"{_where(option)} was made for another checkpoint: {what} where this one's UNet has {wanted}, with "
            f"{len(layers)} layers that attend to text; give an IP-Adapter for this family"
        )


def attention_layers(unet: Mapping[str, Any]) -> dict[str, int]:
    """Return the width of each layer of a UNet that attends to a text, in diffusers' order: down, up, then middle.

    The names are those of the checkpoint: `down_blocks.0.attentions.0.transformer_blocks.0`
    """
    channels = list(unet["block_out_channels"])
    levels = len(channels)
    layers, depths = (per_level(unet.get(key, default), levels) for key, default in DEPTHS)
    ups = zip(unet.get("up_block_types", UP), channels[::-1], layers[::-1], depths[::-1], strict=False)
    downs = zip(unet.get("down_block_types", DOWN), channels, layers, depths, strict=False)
    found: dict[str, int] = {}
    for direction, rows, more in (("down", downs, 0), ("up", ups, 1)):
        for block, (kind, width, count, depth) in enumerate(rows):
            if "CrossAttn" in kind:
                found |= _block(f"{direction}_blocks.{block}", width, count + more, depth)
    if "CrossAttn" in str(unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")):
        found |= _block("mid_block", channels[-1], 1, depths[-1])
    return found


# What a UNet's config leaves out is diffusers' own.
DEPTHS = (("layers_per_block", 2), ("transformer_layers_per_block", 1))
DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def _block(name: str, width: int, attentions: int, depth: int) -> dict[str, int]:
    return {
        f"{name}.attentions.{number}.transformer_blocks.{layer}": width
        for number in range(attentions)
        for layer in range(depth)
    }


def image_dimensions(parts: Parts) -> dict[str, int]:
    """Name the sizes of what a denoiser attends to beside text; there is nothing where there is no IP-Adapter."""
    adapters = parts.image_adapters
    return {
        "image_tokens": sum(adapter.spec.tokens for adapter in adapters),
        "image_adapters": len(adapters),
        "image_layers": len(attention_layers(parts.configs["unet"])) if adapters else 0,
    }


def own_dimensions(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Name the sizes that are those of one component alone, by component."""
    if IMAGE_ENCODER not in checkpoint.configs:
        return {}
    encoder = {IMAGE_ENCODER: encoder_dimensions(checkpoint.configs[IMAGE_ENCODER])}
    return encoder | {adapter.spec.projection: dict(adapter.dimensions) for adapter in checkpoint.image_adapters}
