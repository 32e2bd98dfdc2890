"""Whether a manifest's parts belong together: what its fields alone cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from latentrt.engines.tensor_names import FRAMES, IMAGE_LATENTS, IMAGE_SCALE, IMAGE_TOKENS

if TYPE_CHECKING:
    from latentrt.engines.bundle.manifest import ComponentSpec, DenoiserSpec, Manifest, Role

NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")  # of a component or a tokenizer
AGAIN = "export the checkpoint again"
COUNTS: Mapping[Role, tuple[int, ...]] = {"encoder": (1,), "decoder": (1,), "tiny_decoder": (0, 1)}


def faults(manifest: Manifest) -> Iterator[str]:
    """Say what is wrong and how to fix it, a sentence each that begins with the place; nothing if all is well."""
    yield from _names(manifest)
    yield from (f"{fault}; {AGAIN}" for fault in _roles(manifest))
    for name, spec in manifest.denoisers.items():
        yield from (f"$.denoisers.{name}.{fault}; {AGAIN}" for fault in _denoiser_faults(manifest, name, spec))
    for name, component in manifest.components.items():
        if not _control_fits(manifest, component):
            found = f"found it to control {component.of} as {component.control}"
            yield f"$.components.{name}: {found}, which does not fit the role {component.role}; {AGAIN}"
    yield from (f"{fault}; {AGAIN}" for fault in (*_files(manifest), *_latents(manifest), *_defaults(manifest)))


def _names(manifest: Manifest) -> Iterator[str]:
    for kind, names in (("components", manifest.components), ("tokenizers", manifest.tokenizers)):
        for name in names:
            if not NAME.fullmatch(name):
                yield (
                    f"$.{kind}: found the name {name!r}, expected letters, digits, - and _, for files are named for "
                    "it; do not use this bundle"
                )


def _roles(manifest: Manifest) -> Iterator[str]:
    if set(manifest.of_role("denoiser")) != set(manifest.denoisers) or not manifest.denoisers:
        found = ", ".join(manifest.denoisers) or "none"
        yield f"$.denoisers: found {found}, expected the components with the role denoiser"
    for role, counts in COUNTS.items():
        if (number := len(manifest.of_role(role))) not in counts:
            yield f"$.components: found {number} with the role {role}, expected one"


def _denoiser_faults(manifest: Manifest, name: str, spec: DenoiserSpec) -> Iterator[str]:
    for text in spec.text_encoders:
        if text.component is None and text.tokenizer is None:
            if not text.tokens or text.tokens < 1 or text.join != "length" or not spec.text_width:
                yield "text_encoders: found one without a component, expected its tokens and a text_width"
        elif text.component not in manifest.of_role("text_encoder") or text.tokenizer not in manifest.tokenizers:
            yield f"text_encoders: there is no text encoder {text.component} with a tokenizer {text.tokenizer}"
        elif text.optional and not (text.tokens and text.join == "length"):
            yield f"text_encoders: found {text.component} optional, expected its tokens beside that"
    if spec.text_encoders and all(text.component is None or text.optional for text in spec.text_encoders):
        yield "text_encoders: found none that is always there, expected one"
    yield from _image_faults(manifest, name, spec)
    names = {one.name for one in manifest.components[name].inputs}
    if (IMAGE_LATENTS in names) != (spec.shown is not None) or (spec.shown and spec.text_encoders):
        takes = "some" if IMAGE_LATENTS in names else "no"
        yield f"shown: found {spec.shown}, and the graph takes {takes} {IMAGE_LATENTS}"
    if spec.shown is not None and spec.shown not in manifest.of_role("image_encoder"):
        yield f"shown: there is no image encoder {spec.shown}"
    taken = [axis for one in manifest.components[name].inputs if one.name == "time_ids" for axis in one.shape[1:]]
    takes_frames = FRAMES in names
    if takes_frames != (spec.frames is not None) or (spec.frames and not 1 <= spec.frames.window <= spec.frames.most):
        yield f"frames: found {spec.frames}, and the graph takes {'a' if takes_frames else 'no'} {FRAMES}"
    if taken != ([len(spec.sizes)] if spec.sizes else []):
        yield f"sizes: found {len(spec.sizes)}, and the graph takes {taken or 'none'}"
    skips = manifest.row_groups(name) > 2
    if skips != bool(spec.skip_layers):
        yield f"skip_layers: found {len(spec.skip_layers)}, and the graph takes {'some' if skips else 'none'}"


def _image_faults(manifest: Manifest, name: str, spec: DenoiserSpec) -> Iterator[str]:
    """Say where image prompts are not what the graph takes, or need a component that is not there."""
    for image in spec.image_prompts:
        encoder, projection = (manifest.components.get(part) for part in (image.encoder, image.projection))
        if encoder is None or encoder.role != "image_encoder":
            yield f"image_prompts: there is no image encoder {image.encoder}"
        elif projection is None or projection.role != "image_projection":
            yield f"image_prompts: there is no image projection {image.projection}"
        elif image.reads not in {tensor.name for tensor in encoder.outputs}:
            yield f"image_prompts: {image.encoder} gives no {image.reads}"
    adapters = len(spec.image_prompts)
    expected = {
        IMAGE_TOKENS: [sum(image.tokens for image in spec.image_prompts)],
        IMAGE_SCALE: [adapters, len(spec.image_layers)],
    }
    shapes = {tensor.name: list(tensor.shape) for tensor in manifest.components[name].inputs}
    for tensor, sizes in expected.items():
        found = shapes.get(tensor, [])[1 : 1 + len(sizes)]
        if found != (sizes if adapters else []):
            yield f"image_prompts: found {adapters}, for which {tensor} has the sizes {sizes}, and the graph {found}"


def _control_fits(manifest: Manifest, component: ComponentSpec) -> bool:
    """Tell whether a ControlNet or an adapter, and nothing else, belongs to a denoiser and has a name for requests."""
    if component.role in ("controlnet", "adapter"):
        return component.control is not None and component.of in manifest.denoisers
    return component.control is None and component.of is None


def _defaults(manifest: Manifest) -> Iterator[str]:
    found = manifest.defaults
    if not all(0 <= strength <= 1 for strength in (found.strength, found.masked_strength)):
        yield f"$.defaults: found the strengths {found.strength:g} and {found.masked_strength:g}, expected 0 to 1"


def _files(manifest: Manifest) -> Iterator[str]:
    named = [(f"components.{n}", path) for n, c in manifest.components.items() for path in (*c.files, c.golden)]
    named += [(f"components.{n}", c.weights) for n, c in manifest.components.items() if c.weights is not None]
    named += [(f"tokenizers.{n}", t.file) for n, t in manifest.tokenizers.items()]
    for key, path in named:
        if path not in manifest.files:
            yield f"$.{key}: '{path}' is not among $.files"


def _latents(manifest: Manifest) -> Iterator[str]:
    space = manifest.latents
    largest = 1 if space.largest is None else space.largest
    if min(*manifest.default_size, space.channels, space.factor, space.multiple, largest) < 1:
        yield "$.latents or $.default_size: sizes must be positive"
    rows = [] if space.preview is None else [len(row) for row in space.preview]
    if space.preview is not None and (len(rows) != space.channels + 1 or set(rows) != {3}):
        yield f"$.latents.preview: expected {space.channels + 1} rows of red, green and blue"
