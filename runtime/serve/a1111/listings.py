"""What there is to choose from, as A1111's API lists it."""

from __future__ import annotations

from typing import Any

from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.spacings import SPACINGS
from latentrt.runtime.serve.a1111.prompts import Listing
from latentrt.runtime.serve.models import Model

LABELS = {"sgm_uniform": "SGM Uniform", "ays": "Align Your Steps", "ays_sdxl": "Align Your Steps SDXL", "lu": "Lu"}
SPACED = "karras"  # the form of a sampler that has a name of its own in the community


def samplers(model: Model) -> list[dict[str, Any]]:
    """Return the samplers that a model can be drawn with, and their Karras forms, by the community's names."""
    predicts = str(model.pipe.loaded.manifest.schedule.prediction_type)
    listed = []
    for name, sampler in SAMPLERS.items():
        if predicts in sampler.predictions:
            listed.append({"name": sampler.title, "aliases": [name, *sampler.aliases], "options": {}})
    for name, sampler in SAMPLERS.items():
        if predicts in sampler.predictions and sampler.spaced:
            title = f"{sampler.title} {SPACED.capitalize()}"
            listed.append({"name": title, "aliases": [f"{name}_{SPACED}"], "options": {"scheduler": SPACED}})
    return listed


def schedulers() -> list[dict[str, Any]]:
    """Return how samplers may space their steps."""
    labels = {"automatic": "Automatic", "uniform": "Uniform"} | {
        name: LABELS.get(name, name.capitalize()) for name in SPACINGS
    }
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
        for name, label in labels.items()
    ]


def models(names: list[str]) -> list[dict[str, Any]]:
    """Return the models: a title is what `sd_model_checkpoint` takes."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in names
    ]


def loras(listing: Listing) -> list[dict[str, Any]]:
    """Return the LoRAs that prompts may name."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in sorted(listing)]


def embeddings(model: Model) -> dict[str, Any]:
    """Return the learned words that a model's prompts may use."""
    unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
    return {"loaded": dict.fromkeys(model.pipe.embeddings, unknown), "skipped": {}}
