"""What blocks a UNet or a ControlNet is made of, counted from the names and shapes of its weights.

A file of weights has no config. One whose sizes are not those of its base, as distilled UNets (SSD-1B, Segmind-Vega,
small-sd) and small ControlNets have, says so by the blocks that it lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from latentrt.export.sources.parts import Layout

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Side = Literal["down", "up"]
# What the names of the tensors begin with, of a UNet and of a ControlNet.
UNET_NAMES: Mapping[Layout, tuple[str, ...]] = {
    "original": ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."),
    "diffusers": (
        *("conv_in.", "conv_norm_out.", "conv_out.", "time_embedding.", "add_embedding."),
        *("down_blocks.", "mid_block.", "up_blocks."),
    ),
}
CONTROLNET_NAMES: Mapping[Layout, tuple[str, ...]] = {
    "original": (
        *("input_blocks.", "middle_block.", "time_embed.", "label_emb."),
        *("input_hint_block.", "zero_convs.", "middle_block_out."),
    ),
    "diffusers": (
        *("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block."),
        *("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block."),
    ),
}
CROSS_MIDDLE, PLAIN_MIDDLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A block at one size of the latents. depths: for each of its layers, how many transformers; None for none."""

    width: int
    depths: tuple[int | None, ...]

    @property
    def attends(self) -> bool:
        """Say whether there is attention in it."""
        return any(depth is not None for depth in self.depths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A network's blocks. up: empty for a ControlNet; middle: layers without attention and those of transformers."""

    down: tuple[Level, ...]
    up: tuple[Level, ...]
    middle: tuple[int, int | None]

    def changes(self, base: Config) -> dict[str, Any] | None:
        """Return what of a UNet's config is otherwise in this network, None if no config can say it.

        base: the config of a network that it is otherwise like
        """
        depths = self._transformers() if self._regular() else None
        if depths is None:
            return None
        found = {
            "block_out_channels": [level.width for level in self.down],
            "down_block_types": ["CrossAttnDownBlock2D" if level.attends else "DownBlock2D" for level in self.down],
            "layers_per_block": len(self.down[0].depths),
            "mid_block_type": _middle_type(self.middle),
            **depths,
        }
        if self.up:
            found["up_block_types"] = ["CrossAttnUpBlock2D" if level.attends else "UpBlock2D" for level in self.up]
        changed = {key: value for key, value in found.items() if not _same(key, base, found)}
        if "block_out_channels" in changed:
            changed |= _heads(base, found["block_out_channels"])
        return changed

    def _regular(self) -> bool:
        """Say whether each level has as many layers, with attention in all or none, and the way up mirrors the down."""
        layers = {len(level.depths) for level in self.down} | {len(level.depths) - 1 for level in self.up}
        whole = all(None not in level.depths for level in (*self.down, *self.up) if level.attends)
        mirrored = not self.up or [level.width for level in self.up] == [level.width for level in self.down[::-1]]
        resnets, depth = self.middle
        return len(layers) == 1 and whole and mirrored and resnets in ((0, 1) if depth is None else (2,))

    def _transformers(self) -> dict[str, Any] | None:
        """Return how many transformers each layer has, on the way down and up, None if the middle has others."""
        down = [_depths(level) for level in self.down]
        up = [_depths(level) for level in self.up]
        middle = self.middle[1]
        if middle is not None and not self.down[-1].attends:
            down[-1] = middle  # the middle's number is the last one's, which has no use for it
        elif middle is not None and self.down[-1].depths[0] != middle:
            return None
        listed = any(isinstance(depth, list) for depth in down)
        mirrored = not listed and all(
            one == two for one, two, level in zip(up, down[::-1], self.up, strict=False) if level.attends
        )
        return {
            "transformer_layers_per_block": down,
            "reverse_transformer_layers_per_block": None if mirrored else up,
        }


def read_structure(shapes: Mapping[str, Shape], layout: Layout) -> Structure:
    """Count the blocks of a UNet or a ControlNet.

    shapes: of the tensors by their names in the layout, without a prefix
    """
    return _original(shapes) if layout == "original" else _diffusers(shapes)


def _diffusers(shapes: Mapping[str, Shape]) -> Structure:
    levels: dict[tuple[str, int], dict[int, int]] = {}
    for key, shape in shapes.items():
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight", key):
            levels.setdefault((match[1], int(match[2])), {})[int(match[3])] = shape[0]
    depths = _transformer_counts(shapes, r"((?:down|up)_blocks\.\d+|mid_block)\.attentions\.(\d+)\.")

    def side(name: Side) -> tuple[Level, ...]:
        return tuple(
            Level(
                width=widths[min(widths)],
                depths=tuple(depths.get((f"{name}_blocks.{number}", place)) for place in sorted(widths)),
            )
            for (which, number), widths in sorted(levels.items())
            if which == name
        )

    resnets = sum(f"mid_block.resnets.{place}.conv2.weight" in shapes for place in (0, 1))
    return Structure(down=side("down"), up=side("up"), middle=(resnets, depths.get(("mid_block", 0))))


def _original(shapes: Mapping[str, Shape]) -> Structure:
    """Count the blocks under the first authors' names: one number for each layer, whatever its level."""
    depths = _transformer_counts(shapes, r"((?:input|output)_blocks\.\d+|middle_block)\.(1)\.(?!conv|op)")
    resnets = sum(f"middle_block.{place}.out_layers.3.weight" in shapes for place in (0, 2))

    def levels_of(side: str, first: int) -> tuple[Level, ...]:
        levels: list[tuple[int, list[int | None]]] = []
        begins, number = True, first
        while any(f"{side}.{number}.0.{name}.weight" in shapes for name in ("out_layers.3", "op")):
            layer = shapes.get(f"{side}.{number}.0.out_layers.3.weight")
            if layer is not None:
                if begins:
                    levels.append((layer[0], []))
                levels[-1][1].append(depths.get((f"{side}.{number}", 1)))
            begins = layer is None or any(f"{side}.{number}.{place}.conv.weight" in shapes for place in (1, 2))
            number += 1
        return tuple(Level(width=width, depths=tuple(found)) for width, found in levels)

    middle = (resnets, depths.get(("middle_block", 1)))
    return Structure(down=levels_of("input_blocks", 1), up=levels_of("output_blocks", 0), middle=middle)


def _transformer_counts(shapes: Mapping[str, Shape], attention: str) -> dict[tuple[str, int], int]:
    """Return how many transformers each attention has, 0 for one that only projects.

    attention: a pattern of what the keys begin with; its groups are the block's name and the attention's place
    """
    begins, transformer = re.compile(attention), re.compile(r"transformer_blocks\.(\d+)\.")
    counts: dict[tuple[str, int], int] = {}
    for key in shapes:
        if match := begins.match(key):
            at = match[1], int(match[2])
            inside = transformer.match(key, match.end())
            counts[at] = max(counts.get(at, 0), int(inside[1]) + 1 if inside else 0)
    return {
        (block, place): count
        for (block, place), count in counts.items()
        if count or any(f"{block}.{name}.norm.weight" in shapes for name in (f"attentions.{place}", place))
    }


def _depths(level: Level) -> int | list[int]:
    """Return the transformers of a level's layers: one number where they are alike, 1 where there is no attention."""
    found = [1 if depth is None else depth for depth in level.depths]
    return found[0] if len(set(found)) == 1 else found


def _middle_type(middle: tuple[int, int | None]) -> str | None:
    resnets, depth = middle
    if not resnets:
        return None
    return PLAIN_MIDDLE if depth is None else CROSS_MIDDLE


DEFAULTS: Config = {  # diffusers', for keys that a config leaves out
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "mid_block_type": CROSS_MIDDLE,
    "layers_per_block": 2,
}


def _same(key: str, base: Config, found: Config) -> bool:
    """Say whether a key of a config means what was counted: one number stands for all levels."""
    given, counted = base.get(key, DEFAULTS.get(key)), found[key]
    if key != "transformer_layers_per_block":
        return bool(_listed(given) == _listed(counted))
    levels = len(found["block_out_channels"])
    each = _listed(given) if isinstance(given, list | tuple) else [given] * levels
    # A level without attention has no use for its number, but that the middle takes the last one's.
    used = [kind != "DownBlock2D" for kind in found["down_block_types"]]
    used[-1] = used[-1] or found["mid_block_type"] == CROSS_MIDDLE
    return len(each) == levels and all(
        one == two for one, two, use in zip(each, _listed(counted), used, strict=True) if use
    )


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value


def _heads(base: Config, widths: Sequence[int]) -> dict[str, Any]:
    """Return the heads of other widths: as wide as the base's. One number for all levels stands for any."""
    heads = base.get("attention_head_dim", 8)
    if not isinstance(heads, list | tuple):
        return {}
    return {"attention_head_dim": [width * heads[0] // base["block_out_channels"][0] for width in widths]}
