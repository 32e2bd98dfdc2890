"""Sentences of the demo model: the prompts that describe a scene."""

from __future__ import annotations

import numpy as np

from latentrt.export.demo.drawing import COLOURS, PATTERNS, RADII, SHAPES, Item, Scene, any_scene, is_held_out

ONE_OBJECT = (
    "a {size} {colour} {shape} on a {pattern} {background} background",
    "a {size} {colour} {shape} on a {pattern} {background} background",
    "a {colour} {shape} on a {pattern} {background} background",
    "a {colour} {shape} on a {background} background",
    "a {size} {colour} {shape}, {pattern} {background} background",
    "a picture of a {size} {colour} {shape} in front of a {pattern} {background} background",
    "a {pattern} {background} background with a {size} {colour} {shape}",
)
TWO_OBJECTS = (
    "a {colour} {shape} to the left of a {colour_2} {shape_2} on a {pattern} {background} background",
    "a {colour_2} {shape_2} to the right of a {colour} {shape} on a {pattern} {background} background",
    "a {colour} {shape} and a {colour_2} {shape_2} on a {pattern} {background} background",
)


def describe(scene: Scene, generator: np.random.Generator) -> str:
    """Describe a scene in one of several wordings."""
    wordings = ONE_OBJECT if len(scene.items) == 1 else TWO_OBJECTS
    return fill(wordings[generator.integers(len(wordings))], scene)


def fill(wording: str, scene: Scene) -> str:
    """Put the attributes of a scene into a wording, with "an" before vowels."""
    first, last = scene.items[0], scene.items[-1]
    text = wording.format(
        size=name_size(first),
        colour=first.colour,
        shape=first.shape,
        colour_2=last.colour,
        shape_2=last.shape,
        pattern=scene.pattern,
        background=scene.background,
    )
    return text.replace("a orange", "an orange")


def name_size(item: Item) -> str:
    """The word for the radius nearest to the item's."""
    return min(RADII, key=lambda size: abs(RADII[size] - item.radius))


def held_out_scenes(count: int, generator: np.random.Generator) -> list[Scene]:
    """Make up one-object scenes that training never saw, all combinations before any repeats."""
    combinations = [
        (colour, shape, background)
        for colour in COLOURS
        for shape in SHAPES
        for background in COLOURS
        if colour != background and is_held_out(colour, shape, background)
    ]
    order = generator.permutation(len(combinations))
    return [_centred(combinations[order[k % len(order)]], generator) for k in range(count)]


def _centred(combination: tuple[str, str, str], generator: np.random.Generator) -> Scene:
    colour, shape, background = combination
    radius = float(generator.choice(list(RADII.values())))
    item = Item(shape=shape, colour=colour, centre=(64.0, 64.0), radius=radius)
    return Scene(items=(item,), background=background, pattern=str(generator.choice(PATTERNS)))


def says_pattern(prompt: str) -> bool:
    """Whether a prompt names the pattern of its background."""
    return any(pattern in prompt for pattern in PATTERNS)


def held_out_pairs(count: int, generator: np.random.Generator) -> list[Scene]:
    """Make up two-object scenes of which training never saw at least one object before that background."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = any_scene(generator, pairs=1.0)
        if scene.held_out:
            scenes.append(scene)
    return scenes
