"""The MMDiT of SD 3 and 3.5, and ControlNets for it, as networks whose inputs and outputs are plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentrt.engines.tensor_names import COND, SCALE, SKIP_LAYERS, is_residual

TEXT, POOLED = "encoder_hidden_states", "pooled_projections"


class Patches(nn.Module):
    """(rows, channels, height, width) → what its patches show and where they are, (rows, patches, width).

    Positions are a crop from the middle of a table. Published tables say a patch's column in one half of the width
    and its row in the other, over and over: then two tables with one axis hold all of it, 400 times smaller.
    Heights and widths are multiples of the patch's side, and no more patches a side than the table has: beyond that
    the graph has no positions and fails.
    """

    across: Tensor  # (size, half of the width), by columns
    down: Tensor  # by rows
    table: Tensor  # (size, size, width), where there is no such pair

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.proj, self.size = embed.proj, int(embed.pos_embed_max_size)
        table = embed.pos_embed.detach().reshape(self.size, self.size, -1)
        pair = separate(table)
        self.separable = pair is not None
        for name, part in zip(("across", "down") if pair else ("table",), pair or (table,), strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self, sample: Tensor) -> Tensor:
        patches = self.proj(sample)
        height, width = patches.shape[2:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        if self.separable:
            columns = self.across[left : left + width].unsqueeze(0).expand(height, -1, -1)
            rows = self.down[top : top + height].unsqueeze(1).expand(-1, width, -1)
            positions = torch.cat([columns, rows], dim=-1)
        else:
            positions = self.table[top : top + height, left : left + width]
        output: Tensor = patches.flatten(2).transpose(1, 2) + positions.flatten(0, 1)
        return output.contiguous()


def separate(table: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the columns' and the rows' halves of a table of positions, (size, size, width); None if it has none.

    It has them where the two are the table, bit for bit.
    """
    half = table.shape[-1] // 2
    across, down = table[0, :, :half].clone(), table[:, 0, half:].clone()
    # a row at a time: the table of 3.5 medium is 0.9 GB
    same = (
        torch.equal(row[:, :half], across) and torch.equal(row[:, half:], end.expand_as(row[:, half:]))
        for row, end in zip(table, down, strict=True)
    )
    return (across, down) if all(same) else None


class Transformer(nn.Module):
    """Latents, timesteps (1,) or (rows,), text and pooled text → the model's prediction; see `wrap_transformer`.

    names: of the inputs, in their order
    skip_layers: the numbers of the blocks that leave the rows alone for which the input of that name is above 0
    """

    def __init__(self, model: Any, names: Sequence[str], *, skip_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.names, self.skip_layers = model, tuple(names), frozenset(skip_layers)

    def extra_repr(self) -> str:
        """Say what a graph depends on beside the network."""
        return f"skip_layers={sorted(self.skip_layers)}"

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        sample, model = given["sample"], self.model
        hidden = model.pos_embed(sample)
        mood = model.time_text_embed(given["timestep"].expand(sample.shape[0]), given[POOLED])
        text = model.context_embedder(given[TEXT])
        hidden = self._blocks(hidden, text, mood, given)
        return self._joined(model.proj_out(model.norm_out(hidden, mood)), sample)

    def _blocks(self, hidden: Tensor, text: Tensor, mood: Tensor, given: dict[str, Tensor]) -> Tensor:
        blocks = self.model.transformer_blocks
        residuals = [tensor for name, tensor in given.items() if is_residual(name)]
        for number, block in enumerate(blocks):
            before = hidden, text
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=mood)
            if number in self.skip_layers:
                skips = (given[SKIP_LAYERS] > 0)[:, None, None]
                hidden = torch.where(skips, before[0], hidden)
                text = torch.where(skips, before[1], text) if text is not None else None
            if residuals and not block.context_pre_only:
                hidden = hidden + residuals[int(number / (len(blocks) / len(residuals)))].flatten(1, 2)
        return hidden

    def _joined(self, patches: Tensor, sample: Tensor) -> Tensor:
        """Put patches of pixels, (rows, patches, side * side * channels), together."""
        side, (rows, _, height, width) = self.model.config.patch_size, sample.shape
        grid = patches.reshape(rows, height // side, width // side, side, side, self.model.out_channels)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(rows, self.model.out_channels, height, width)


def wrap_transformer(model: Any, takes: Sequence[str], *, skip_layers: Sequence[int] = ()) -> nn.Module:
    """Wrap an SD3Transformer2DModel, which is changed.

    takes: the names of its inputs: `sample` (rows, channels, height, width), `timestep` (1,) or (rows,),
        `encoder_hidden_states` (rows, tokens, joint width), `pooled_projections` (rows, pooled width); then, where
        there are any, `skip_layers` (rows,), and residuals of ControlNets (rows, height / patch, width / patch, width
        of the network): block i takes that numbered int(i / (blocks / residuals)), and the last block, which ends the
        text, takes none
    skip_layers: which blocks the input of that name switches off for a row where it is above 0
    """
    model.pos_embed = Patches(model.pos_embed)
    return Transformer(model, takes, skip_layers=skip_layers)


class TransformerControlNet(nn.Module):
    """A transformer's inputs, latents to follow, scales (rows,) and residuals → the residuals with scale times its own.

    Where there are more residuals than blocks, each block gives several that are one behind another.

    names: of the inputs, in their order. Without `encoder_hidden_states`, its blocks see no text; without
        `pooled_projections`, zeros stand for it
    shift: what is added to the latents to follow
    """

    nothing: Tensor  # the pooled text, (1, width)

    def __init__(self, model: Any, names: Sequence[str], *, shift: float) -> None:
        super().__init__()
        self.model, self.names, self.shift = model, tuple(names), shift
        self.register_buffer("nothing", torch.zeros(1, model.config.pooled_projection_dim), persistent=False)

    def extra_repr(self) -> str:
        """Say what a graph depends on beside the network."""
        return f"names={self.names}, shift={self.shift}"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        sample, model = given["sample"], self.model
        rows = sample.shape[0]
        pooled = given.get(POOLED, self.nothing.expand(rows, -1))  # by rows: or it would be computed while it is traced
        mood = model.time_text_embed(given["timestep"].expand(rows), pooled)
        follows = given[COND] + self.shift if self.shift else given[COND]
        hidden = model.pos_embed(sample) + model.pos_embed_input(follows)
        own = self._blocks(hidden, given.get(TEXT), mood)
        scale = given[SCALE].to(sample.dtype)[:, None, None, None]
        before = [tensor for name, tensor in given.items() if is_residual(name)]
        each = [own[place * len(own) // len(before)] for place in range(len(before))]
        return tuple(total + scale * one.reshape(total.shape) for total, one in zip(before, each, strict=True))

    def _blocks(self, hidden: Tensor, states: Tensor | None, mood: Tensor) -> list[Tensor]:
        """Return what each block gives, (rows, patches, width)."""
        text, found = None if states is None else self.model.context_embedder(states), []
        for block, last in zip(self.model.transformer_blocks, self.model.controlnet_blocks, strict=True):
            if text is None:
                hidden = block(hidden, mood)
            else:
                text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=mood)
            found.append(last(hidden))
        return found


def wrap_transformer_controlnet(model: Any, takes: Sequence[str], *, shift: float = 0.0) -> nn.Module:
    """Wrap an SD3ControlNetModel, which is changed, with inputs of these names.

    shift: of the checkpoint's latents, times their scale. Those that are trained without pooled text are trained
        with the latents before their shift, which is added again
    """
    if model.pos_embed.pos_embed is not None:
        model.pos_embed = Patches(model.pos_embed)
    return TransformerControlNet(model, takes, shift=0.0 if POOLED in takes else shift)
