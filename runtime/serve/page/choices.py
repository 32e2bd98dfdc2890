"""What the page can offer: models with their sizes and samplers, and the limits of a request."""

from __future__ import annotations

import msgspec

from latentrt.engines.bundle.manifest import Manifest
from latentrt.runtime.images.write_png import community_name
from latentrt.runtime.sampling.catalogue import Name, own_sampler, sampler_names
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.offered import lora_files
from latentrt.runtime.serve.options import Limits


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A name as requests have it, and as people read it."""

    name: str
    title: str


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A model. size: its own; multiple: of which sides must be multiples; image: whether it takes an image

    sampler: its own, as people read it; samplers: the names of those that it can be drawn with
    guidance, strength: where none is given
    """

    name: str
    size: tuple[int, int]
    multiple: int
    image: bool
    sampler: str
    samplers: tuple[str, ...]
    guidance: float
    strength: float


class Choices(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to choose."""

    models: tuple[ModelChoice, ...]
    samplers: tuple[Choice, ...]
    loras: tuple[str, ...]
    limits: Limits


def choices(models: Models) -> Choices:
    """Return what there is to choose; it may read manifests from disk."""
    return Choices(
        models=tuple(_model(name, manifest) for name, manifest in models.manifests().items()),
        samplers=tuple(Choice(name=name, title=community_name(name)) for name in sampler_names()),
        loras=tuple(lora_files(models.options)),
        limits=models.options.limits,
    )


def _model(name: str, manifest: Manifest) -> ModelChoice:
    own = own_sampler(manifest.schedule)
    return ModelChoice(
        name=name,
        size=manifest.default_size,
        multiple=manifest.latents.cell,
        image=manifest.find("encoder") is not None,
        sampler=community_name(str(Name(own.name, own.spacing))),
        samplers=sampler_names(str(manifest.schedule.prediction_type)),
        guidance=manifest.defaults.guidance,
        strength=manifest.defaults.strength,
    )
