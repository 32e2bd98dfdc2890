"""The manifest: everything the runtime must know about a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np

from latentrt.engines.bundle.quantisation import Quantisation
from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.bundle.windows import Windows, plan_windows
from latentrt.engines.spec import Array, Document, EngineKey, EngineSpec, Precision, TensorSpec
from latentrt.engines.tensor_names import COND, row_groups

SCHEMA_VERSION = 2
NAMED = 4  # layers that a note names
MANIFEST = "manifest.json"
ENGINE_RECORD = "engine.json"

Family = Literal["sd1", "sd2", "sdxl", "sdxl_refiner", "sd3", "svd"]
Role = Literal[
    "text_encoder",
    "denoiser",
    "encoder",
    "decoder",
    "tiny_decoder",
    "controlnet",
    "adapter",
    "image_encoder",
    "image_projection",
]
Join = Literal["width", "length"]
CONTROL_ROLES: tuple[Role, ...] = ("controlnet", "adapter")  # what follows a picture, and adds to a denoiser

SizeName = Literal[
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "target_height",
    "target_width",
    "aesthetic_score",
    "fps",
    "motion",
    "augmentation",
]
_SHARED: tuple[SizeName, ...] = ("original_height", "original_width", "crop_top", "crop_left")
# What the numbers of `time_ids` are, by how many there are: SDXL takes six, its refiner five, and videos of an image
# three.
SIZES: Mapping[int, tuple[SizeName, ...]] = {
    6: (*_SHARED, "target_height", "target_width"),
    5: (*_SHARED, "aesthetic_score"),
    3: ("fps", "motion", "augmentation"),
}


class FileRecord(Document, frozen=True, kw_only=True):
    """One file of the bundle, by its path relative to the bundle."""

    bytes: int
    sha256: str


class ComponentSpec(Document, frozen=True, kw_only=True):
    """One network: what it is, its canonical graph, its golden pair, and what it takes and gives.

    role: what it is for; several components may have the same one
    of: the denoiser that a ControlNet or an adapter adds to, None for all others
    control: the name under which requests ask for a ControlNet or an adapter, None for all others
    files: the graph and its external data; the graph comes first
    weights: which initializer of the graph holds which of the checkpoint's weights, see `weight_map`; None if that is
        not known, and the weights cannot be changed later
    error: the exported graph's largest difference from the checkpoint's fp32 outputs, over their range; None if
        a graph was adopted and there were no weights to compare it with
    float32_layers: what an fp16 graph computes in fp32, by the checkpoint's own names of modules
    largest_activation: the largest magnitude that the golden inputs cause in the graph in fp32, attention's logits
        included; None in fp32 bundles, where nothing depends on it
    quantised: what of it computes in 8 bits; None for nothing
    """

    role: Role
    files: tuple[str, ...]
    golden: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights_bytes: int
    weights: str | None = None
    error: float | None = None
    float32_layers: tuple[str, ...] = ()
    largest_activation: float | None = None
    of: str | None = None
    control: str | None = None
    quantised: Quantisation | None = None

    @property
    def graph(self) -> str:
        """Return the path of the ONNX graph, relative to the bundle."""
        return self.files[0]

    @property
    def follows_latents(self) -> bool:
        """Tell whether a ControlNet reads the latents of the picture that it follows, in place of its pixels."""
        return any(tensor.name == COND and "latent_height" in tensor.shape for tensor in self.inputs)

    def notes(self) -> tuple[str, ...]:
        """Say in a line each what of an fp16 graph computes in fp32, and what in 8 bits; nothing if none does."""
        notes = (self.float32_note(), self.quantised.note() if self.quantised else None)
        return tuple(note for note in notes if note is not None)

    def float32_note(self) -> str | None:
        """Say in one line what an fp16 graph computes in fp32, with the first names; None if that is nothing."""
        if not self.float32_layers:
            return None
        shown, more = self.float32_layers[:NAMED], len(self.float32_layers) - NAMED
        rest = f" and {more} more" if more > 0 else ""
        reach = "" if self.largest_activation is None else f" (its values reach {self.largest_activation:.2g})"
        return f"{len(self.float32_layers)} layers compute in fp32{reach}: {', '.join(shown)}{rest}"


class TokenizerSpec(Document, frozen=True, kw_only=True):
    """One text encoder's tokenizer.

    max_length: of its longest row, with the begin and end tokens
    begin_id: None where rows have no begin
    """

    file: str
    max_length: int
    begin_id: int | None
    end_id: int
    pad_id: int


class TextSpec(Document, frozen=True, kw_only=True):
    """How one text encoder is read, and how what it gives joins what the encoders before it gave.

    component, tokenizer: both None where the bundle holds no such encoder: zeros stand where its states would
    skip: how many of its last layers are left out unless a request says otherwise
    pooled: the output that stands for the whole text, None if the denoiser takes none of this encoder; those of
        several encoders are concatenated
    join: `width` concatenates its states with those before it along the width, `length` along the tokens; what
        is narrower is filled up with zeros
    tokens: how many tokens its states have whatever the prompt, None for as many chunks as that needs
    optional: whether a request may leave it out: zeros stand for its states then, as many as `tokens`
    """

    component: str | None = None
    tokenizer: str | None = None
    skip: int = 0
    pooled: str | None = None
    join: Join = "width"
    tokens: int | None = None
    optional: bool = False


class FrameRange(Document, frozen=True, kw_only=True):
    """How many frames of a video a denoiser sees at once.

    window: as many as it was trained with; most: it has a place for no more
    whole: whether it sees a video as a whole, of whatever length: then there are no windows
    guidance: the scales for the first frame and for the last where nothing is asked for; None for those of pictures
    """

    window: int
    most: int
    whole: bool = False
    guidance: tuple[float, float] | None = None

    def windows(self, frames: int, window: int | None = None, overlap: int | None = None) -> Windows:
        """Return which of a video's frames are seen at once, see `plan_windows`. window: None for as trained"""
        seen = frames if self.whole else min(self.window, self.most) if window is None else window
        return plan_windows(frames, seen, overlap)


class ImagePromptSpec(Document, frozen=True, kw_only=True):
    """An IP-Adapter: how an image becomes tokens that a denoiser attends to beside the text.

    name: in requests
    encoder, projection: the components that make the tokens, one after the other
    reads: the encoder's output that the projection takes
    tokens: how many there are for an image
    zero_negative: for a negative prompt zeros are projected; otherwise what the encoder gives for an image of zeros
    """

    name: str
    encoder: str
    projection: str
    reads: str
    tokens: int
    zero_negative: bool


class DenoiserSpec(Document, frozen=True, kw_only=True):
    """What one denoiser takes besides latents and timestep.

    text_encoders: in the order in which they join
    zero_negative: zeros stand for a negative prompt that is not given; otherwise an empty one is encoded
    sizes: what the numbers of its input `time_ids` are, empty if it has none
    text_width: of the states that it attends to, to which narrower ones are filled up with zeros; None for the
        widest of what its encoders give
    frames: of a denoiser whose model rows are frames, in windows as long as its input `frame_index`; None where each
        row is a picture of its own
    shown: the image encoder whose `image_embeds`, of the image that moves, are the one token that it attends to; None
        where it attends to text
    skip_layers: which of its blocks its input `skip_layers` switches off for a model row; empty if it has none
    image_prompts: in the order of its input `image_tokens`
    image_layers: the layers that attend to images, by their names in the checkpoint, in the order of `image_scale`
    """

    text_encoders: tuple[TextSpec, ...]
    zero_negative: bool = False
    sizes: tuple[SizeName, ...] = ()
    text_width: int | None = None
    frames: FrameRange | None = None
    shown: str | None = None
    skip_layers: tuple[int, ...] = ()
    image_prompts: tuple[ImagePromptSpec, ...] = ()
    image_layers: tuple[str, ...] = ()


class LatentSpec(Document, frozen=True, kw_only=True):
    """The latent space: (channels, height / factor, width / factor), of (what the VAE has - shift) * scaling_factor.

    preview: what each channel adds to red, green and blue (0 to 255), and last what is there without any
    multiple: a side of latents is a multiple of it, where the denoiser takes them in patches
    largest: the longest side of latents that the denoiser takes, None for any
    """

    channels: int
    factor: int
    scaling_factor: float
    preview: tuple[tuple[float, ...], ...] | None = None
    shift: float = 0.0
    multiple: int = 1
    largest: int | None = None

    @property
    def cell(self) -> int:
        """Return what the sides of pictures are multiples of, in pixels."""
        return self.factor * self.multiple

    def tokens(self, size: tuple[int, int]) -> int:
        """Return how many patches the denoiser takes of a picture of (width, height) in pixels."""
        width, height = size
        return (width // self.cell) * (height // self.cell)

    def scaled(self, latents: Array) -> Array:
        """Return the VAE's latents as the denoiser sees them, of the same shape, float32."""
        moved = latents - np.float32(self.shift) if self.shift else latents
        return np.asarray(moved * np.float32(self.scaling_factor))

    def unscaled(self, latents: Array) -> Array:
        """Return latents that the denoiser sees as the VAE has them, of the same shape, float32."""
        divided = latents / np.float32(self.scaling_factor)
        return np.asarray(divided + np.float32(self.shift) if self.shift else divided)


class Defaults(Document, frozen=True, kw_only=True):
    """What a request means that does not say it.

    guidance: its scale
    strength: how much of an image is changed; masked_strength: the same where there is a mask
    """

    guidance: float = 7.5
    strength: float = 0.8
    masked_strength: float = 1.0


class Provenance(Document, frozen=True, kw_only=True):
    """Where the weights came from.

    checkpoint: as it was named
    files: the SHA-256 of each that was read, by name
    tools: the versions at work
    options: what was chosen beside the checkpoint
    """

    checkpoint: str
    files: Mapping[str, str]
    tools: Mapping[str, str]
    options: Mapping[str, str] = msgspec.field(default_factory=dict)
    export_key: str = ""  # SHA-256 over all that the export depends on


class Manifest(Document, frozen=True, kw_only=True):
    """A bundle's table of contents.

    default_size: (width, height) in pixels
    denoisers: by component, in the order in which they take the stages of a plan: where there are two, the second
        refines what the first draws
    """

    schema_version: int
    producer: str
    family: Family
    precision: Precision
    provenance: Provenance
    components: Mapping[str, ComponentSpec]
    tokenizers: Mapping[str, TokenizerSpec]
    schedule: TrainingSchedule
    latents: LatentSpec
    default_size: tuple[int, int]
    files: Mapping[str, FileRecord]
    denoisers: Mapping[str, DenoiserSpec]
    defaults: Defaults = Defaults()

    def of_role(self, *roles: Role) -> tuple[str, ...]:
        """Return the components of these roles, in the manifest's order; none where the bundle has none."""
        return tuple(name for name, component in self.components.items() if component.role in roles)

    def find(self, role: Role) -> str | None:
        """Return the component of a role that a bundle has once, or None."""
        return next(iter(self.of_role(role)), None)

    @property
    def denoiser(self) -> str:
        """Return the component that draws from noise."""
        return next(iter(self.denoisers))

    @property
    def refiner(self) -> str | None:
        """Return the denoiser that may take the last stages of a plan, None if there is none."""
        return next(iter(list(self.denoisers)[1:]), None)

    def row_groups(self, denoiser: str) -> int:
        """Return how many groups of model rows a denoiser may be run on, see `tensor_names.row_groups`."""
        return row_groups(tensor.name for tensor in self.components[denoiser].inputs)

    def text_tokens(self, denoiser: str, *, chunks: int = 1) -> int:
        """Return how many tokens a denoiser attends to where a prompt has so many chunks; 0: what is always there."""
        if self.denoisers[denoiser].shown is not None:
            return 1
        before, block = 0, 0
        for text in self.denoisers[denoiser].text_encoders:
            own = text.tokens or (chunks * self.tokenizers[text.tokenizer].max_length if text.tokenizer else 0)
            before, block = (before + block, own) if text.join == "length" else (before, max(block, own))
        return before + block

    @property
    def fixed_tokens(self) -> int | None:
        """Return how long the rows of a text encoder of a fixed length are, None where there is none."""
        texts = (text for spec in self.denoisers.values() for text in spec.text_encoders)
        return next((text.tokens for text in texts if text.component and text.tokens), None)

    def find_control(self, control: str) -> str | None:
        """Return the ControlNet or adapter with this name in requests, None if there is none."""
        return next((name for name, component in self.components.items() if component.control == control), None)

    def graphs_digest(self, *, latents: bool = False) -> str:
        """Return one SHA-256 over all canonical graphs and their weights, for engine keys.

        latents: and over the latents' scale and shift, which engines carry that begin at the sampler's state
        """
        import hashlib  # with OpenSSL, for what opens a bundle

        lines = [
            f"{name} {path} {self.files[path].sha256}"
            for name, component in sorted(self.components.items())
            for path in component.files
        ]
        if latents:
            names = ("channels", "factor", "scaling_factor", *(["shift"] if self.latents.shift else []))
            lines += [f"latents {name} {getattr(self.latents, name)}" for name in names]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class EngineRecord(Document, frozen=True, kw_only=True):
    """What lies in one directory of `engines/`: its key, and a spec and a main file for each component.

    The record stands beside the engines, not in the manifest, so that machines sharing one bundle can add
    theirs without rewriting a common file.
    """

    schema_version: int
    key: EngineKey
    specs: Mapping[str, EngineSpec]
    entries: Mapping[str, str]
    files: Mapping[str, FileRecord]
    build_s: float
