"""A text encoder that two checkpoints share: whether its weights are the same in both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentrt.engines.errors import CheckpointError
from latentrt.export.networks import conversion
from latentrt.export.sources.parts import SharedEncoder
from latentrt.export.sources.weight_files import find_weights

START = "text_model."  # transformers 5 leaves it out where version 4 wrote it


def require_same(component: str, module: nn.Module, shared: SharedEncoder) -> None:
    """Raise CheckpointError if another checkpoint's network has other weights than a loaded one.

    They are compared as float16, which one of the two may be stored in; one weight of each is in memory at a time.
    """
    (model,) = module.children()
    own = {key.removeprefix(START): tensor for key, tensor in model.state_dict().items()}
    with _folder(shared) as folder:
        unlike = next((key for key in _unlike(own, folder)), None)
    if unlike is not None:
        raise CheckpointError(
            f"{component}: '{shared.name}' has other weights than the checkpoint ({unlike}), and both would "
            "share them; give a refiner that was made for this checkpoint, or export it as a bundle of its own"
        )


@contextmanager
def _folder(shared: SharedEncoder) -> Iterator[Path]:
    if shared.weight_source is None:
        yield Path(shared.folder)
        return
    with conversion.written(shared.weight_source, Path(shared.folder)) as folder:
        yield folder


def _unlike(own: dict[str, Tensor], folder: Path) -> Iterator[str]:
    """Give the name of each weight that differs, or that the other does not have."""
    left = set(own)
    for shard in find_weights(folder).shards:
        with safe_open(shard.path, "pt") as opened:
            for name in shard.tensors:
                key = name.removeprefix(START)
                if key in left:
                    left.discard(key)
                    if not _equal(own[key], opened.get_tensor(name)):
                        yield key
    yield from (key for key in sorted(left) if not conversion.UNUSED.search(key))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.half(), other.half())
