"""T5's encoder as a torch module that is traced into few nodes and keeps inside float16.

Each layer is exchanged for one that computes the same: its norm for torch's own, which is one node and whose scale
`rescale.py` can move; its activation for one that raises nothing to the third power; the buckets of its relative
positions, which are logarithms, for a table of them: rounded to float16, a logarithm may fall into another bucket.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel
from transformers.activations import NewGELUActivation


class T5Weights(T5EncoderModel):  # type: ignore[misc]
    """transformers' encoder; some of its layers would be loaded in float32 whatever they are stored in, and copied."""

    _keep_in_fp32_modules: set[str] | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._keep_in_fp32_modules = set()  # what transformers 5 has collected from the networks inside


class T5TextEncoder(nn.Module):
    """(batch, tokens) int64 → hidden states (batch, tokens, width). Every token attends to every other, padding too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        _exchange_norms(model.encoder)
        for block in model.encoder.block:
            attention, dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
            attention.position_buckets = PositionBuckets(attention)
            # not setattr: of a module's, the class's function of the same name would hide it from the tracer
            vars(attention)["_relative_position_bucket"] = attention.position_buckets
            if isinstance(dense.act, NewGELUActivation):
                dense.act = nn.GELU(approximate="tanh")

    def forward(self, input_ids: Tensor) -> Tensor:
        encoder = self.model.encoder
        states, bias = encoder.embed_tokens(input_ids), None
        for block in encoder.block:  # the whole encoder's forward makes a mask of nothing for each row and head
            states, bias = block(states, None, bias)[:2]
        output: Tensor = encoder.final_layer_norm(states)
        return output


class PositionBuckets(nn.Module):
    """Distances between tokens, as whole numbers → the rows of the table of what an attention adds for them."""

    table: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.furthest = attention.relative_attention_max_distance  # beyond it, all is one bucket
        distances = torch.arange(-self.furthest, self.furthest + 1)
        table = attention._relative_position_bucket(
            distances,
            bidirectional=True,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=self.furthest,
        )
        self.register_buffer("table", table, persistent=False)

    def forward(self, distances: Tensor, **_: Any) -> Tensor:
        return self.table[distances.clamp(-self.furthest, self.furthest) + self.furthest]


def _exchange_norms(module: nn.Module) -> None:
    child: Any
    for name, child in module.named_children():
        if type(child).__name__ == "T5LayerNorm":
            norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, device="meta")
            norm.weight = child.weight
            setattr(module, name, norm)
        else:
            _exchange_norms(child)
