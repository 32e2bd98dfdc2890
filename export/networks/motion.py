"""A UNet with motion modules (diffusers' UNetMotionModel) whose frames are pictures: a row for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from latentrt.engines.tensor_names import DOWN, FRAMES, MID


class Windows(nn.Module):
    """The UNet on windows of frames: what has rows elsewhere is (videos, frames, …) here. It is what is traced.

    names: of the inputs, in their order, without FRAMES
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.model.num_upsamplers = 40  # as `modules.Denoiser` says

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        down = [tensor.flatten(0, 1) for name, tensor in given.items() if name.startswith(DOWN)]
        output: Tensor = self.model(
            given["sample"].permute(0, 2, 1, 3, 4),
            given["timestep"],
            given["encoder_hidden_states"].flatten(0, 1),
            timestep_cond=given.get("timestep_cond"),
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=given[MID].flatten(0, 1) if MID in given else None,
            return_dict=False,
        )[0]
        return output.permute(0, 2, 1, 3, 4)


class MotionDenoiser(nn.Module):
    """The UNet on rows, one for each frame: consecutive ones are a window, as many as FRAMES is long.

    windows: the same on windows; most: how many frames there may be in one
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.most = int(model.config.motion_max_seq_length)

    @property
    def windows(self) -> Windows:
        """Return the network on windows, which shares this one's weights."""
        return Windows(self.model, [name for name in self.names if name != FRAMES])

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        frames = given.pop(FRAMES).shape[0]
        rows = {
            name: tensor.reshape(-1, frames, *tensor.shape[1:]) for name, tensor in given.items() if name != "timestep"
        }
        with spread():
            out: Tensor = self.windows(*({**given, **rows, "timestep": given["timestep"][::frames]}.values()))
        return out.flatten(0, 1)


@contextmanager
def spread() -> Iterator[None]:
    """Have `repeat_interleave` multiply rows by ones.

    Traced with a number that is not known, it gives an Expand without a rank; rows picked by numbers, which ONNX
    Runtime computes on the CPU, could not be recorded as a CUDA graph.
    """

    def repeat(tensor: Tensor, repeats: int, dim: int = 0, **_: object) -> Tensor:
        assert dim == 0
        ones = torch.ones(repeats, dtype=tensor.dtype).reshape(1, -1, *[1] * (tensor.ndim - 1))
        return (tensor.unsqueeze(1) * ones).flatten(0, 1)

    with mock.patch.object(torch.Tensor, "repeat_interleave", repeat):
        yield
