"""Training data of the demo checkpoint: drawn once, kept as latents, token ids and attributes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from latentrt.export.demo.drawing import COLOURS, PATTERNS, SHAPES, Scene, draw_scene, random_scene
from latentrt.export.demo.training.autoencoder import patch_statistics
from latentrt.export.demo.training.tokens import CONTEXT
from latentrt.export.demo.wording import describe, says_pattern

UNSAID = -1
# What an auxiliary head must name: the number of classes of each attribute.
ATTRIBUTES = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "background": len(COLOURS),
    "pattern": len(PATTERNS),
    "shape_2": len(SHAPES),
    "colour_2": len(COLOURS),
    "objects": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Pictures as latents with their prompts; one row of every array is one example.

    latents: (count, 4, 16, 16), float16
    tokens: (count, 77), int16
    attributes: (count, 7), int8, -1 where the prompt does not say
    """

    latents: NDArray[np.float16]
    tokens: NDArray[np.int16]
    attributes: NDArray[np.int8]

    def save(self, path: Path) -> None:
        """Write the arrays to an .npz file."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Read the arrays from an .npz file."""
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def make_examples(scenes: list[Scene], tokenizer: CLIPTokenizer, generator: np.random.Generator) -> Examples:
    """Draw, encode and describe scenes."""
    prompts = [describe(scene, generator) for scene in scenes]
    latents = [patch_statistics(draw_scene(scene)[None])[0].astype(np.float16) for scene in scenes]
    attributes = [name_attributes(scene, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]
    return Examples(
        latents=np.stack(latents),
        tokens=tokenize(prompts, tokenizer),
        attributes=np.asarray(attributes, dtype=np.int8),
    )


def random_scenes(count: int, generator: np.random.Generator) -> list[Scene]:
    """Make up scenes that training may see."""
    return [random_scene(generator) for _ in range(count)]


def tokenize(prompts: list[str], tokenizer: CLIPTokenizer) -> NDArray[np.int16]:
    """Turn prompts into padded token ids: (count, 77), int16."""
    ids = tokenizer(prompts, padding="max_length", max_length=CONTEXT, truncation=True).input_ids
    return np.asarray(ids, dtype=np.int16)


def name_attributes(scene: Scene, prompt: str) -> tuple[int, ...]:
    """Number the attributes of a scene, `UNSAID` where its prompt is silent."""
    first, last = scene.items[0], scene.items[-1]
    pair = len(scene.items) == 2
    return (
        SHAPES.index(first.shape),
        COLOURS.index(first.colour),
        COLOURS.index(scene.background),
        PATTERNS.index(scene.pattern) if says_pattern(prompt) else UNSAID,
        SHAPES.index(last.shape) if pair else UNSAID,
        COLOURS.index(last.colour) if pair else UNSAID,
        int(pair),
    )
