"""Networks that see several frames of a video at once, whose frames are pictures: a row for each.

They are UNets with motion modules (diffusers' UNetMotionModel), and the UNet and the decoder of Stable Video Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from latentrt.engines.tensor_names import DOWN, FRAMES, IMAGE_LATENTS, MID
from latentrt.export.configs.denoisers import MOST_FRAMES


class MotionWindows(nn.Module):
    """A UNet with motion modules on windows: what has rows elsewhere is (videos, frames, …) here. It is what is traced.

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


class VideoWindows(nn.Module):
    """Stable Video Diffusion's UNet on windows: it sees the latents of the image that moves after each frame's own.

    What is one of a video, the image's embedding and the numbers beside the time, is taken of its first frame.
    names: as of `MotionWindows`
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.model.num_upsamplers = 40

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        output: Tensor = self.model(
            torch.cat([given["sample"], given[IMAGE_LATENTS]], dim=2),
            given["timestep"],
            given["encoder_hidden_states"][:, 0],
            given["time_ids"][:, 0],
            return_dict=False,
        )[0]
        return output


class DecodedWindows(nn.Module):
    """Stable Video Diffusion's decoder on windows: (videos, frames, channels, height, width) → pictures in -1..1."""

    def __init__(self, decoder: Any, _: Sequence[str]) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        videos, frames = latent_sample.shape[:2]
        moving = torch.zeros(videos, frames, dtype=latent_sample.dtype)
        output: Tensor = self.decoder(latent_sample.flatten(0, 1), num_frames=frames, image_only_indicator=moving)
        return output.reshape(videos, frames, *output.shape[1:])


class Blend(nn.Module):
    """What each frame says alone and what it says among the others, mixed by a share that was learned.

    It stands in place of diffusers' AlphaBlender, which computes the share from a weight, for a trace to compute once.
    """

    share: Tensor

    def __init__(self, blender: Any) -> None:
        super().__init__()
        share = blender.mix_factor.detach().float()
        if blender.merge_strategy != "fixed":
            share = torch.sigmoid(share)
        alone = 1 - share if blender.switch_spatial_to_temporal_mix else share
        self.register_buffer("share", alone, persistent=False)

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
        return self.share * x_spatial + (1 - self.share) * x_temporal


def blended(model: Any) -> Any:
    """Return a network with its own blenders replaced, see `Blend`; it is changed."""
    from diffusers.models.resnet import AlphaBlender

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AlphaBlender):
                setattr(module, name, Blend(child))
    return model


class Framed(nn.Module):
    """A network on rows, one for each frame: consecutive ones are a window, as many as FRAMES is long.

    kind: what makes the same network on windows; names: of the inputs, in their order
    most: how many frames there may be in one
    """

    def __init__(
        self, model: Any, names: Sequence[str], *, kind: Callable[[Any, Sequence[str]], nn.Module], most: int
    ) -> None:
        super().__init__()
        self.model, self.names, self.kind, self.most = model, tuple(names), kind, most

    @property
    def windows(self) -> nn.Module:
        """Return the network on windows, which shares this one's weights."""
        return self.kind(self.model, [name for name in self.names if name != FRAMES])

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        frames = given.pop(FRAMES).shape[0]
        rows = {
            name: tensor[::frames] if name == "timestep" else tensor.reshape(-1, frames, *tensor.shape[1:])
            for name, tensor in given.items()
        }
        with spread():
            out: Tensor = self.windows(*rows.values())
        return out.flatten(0, 1)


@contextmanager
def spread() -> Iterator[None]:
    """Have `repeat_interleave` multiply rows by ones, and frames be counted by adding up ones.

    Traced with a number that is not known, the first gives an Expand without a rank; rows picked by numbers and frames
    that are counted, which ONNX Runtime computes on the CPU, could not be recorded as a CUDA graph.
    """
    from diffusers.models.transformers import transformer_temporal

    def repeat(tensor: Tensor, repeats: int, dim: int = 0, **_: object) -> Tensor:
        assert dim == 0
        ones = torch.ones(repeats, dtype=tensor.dtype).reshape(1, -1, *[1] * (tensor.ndim - 1))
        rows = (tensor.unsqueeze(1) * ones).flatten(0, 1)
        # a view's strides hold the least of two numbers, which a later reshape would have to know
        return rows.clone(memory_format=torch.contiguous_format)

    with (
        mock.patch.object(torch.Tensor, "repeat_interleave", repeat),
        mock.patch.object(transformer_temporal, "torch", _Counting()),
    ):
        yield


class _Counting:
    """torch, but for how a module of diffusers counts frames."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def arange(self, count: int, **_: object) -> Tensor:
        return torch.ones(count, dtype=torch.float32).cumsum(0) - 1


def wrap_motion(model: Any, takes: Sequence[str]) -> nn.Module:
    """Wrap a UNet with motion modules, which have a place for so many frames and no more."""
    return Framed(model, takes, kind=MotionWindows, most=int(model.config.motion_max_seq_length))


def wrap_video(model: Any, takes: Sequence[str]) -> nn.Module:
    """Wrap Stable Video Diffusion's UNet, which is changed."""
    return Framed(blended(model), takes, kind=VideoWindows, most=MOST_FRAMES)


def wrap_decoder(vae: Any, takes: Sequence[str]) -> nn.Module:
    """Wrap the half of a VAE that decodes the frames of a video together."""
    return Framed(blended(vae.decoder), takes, kind=DecodedWindows, most=MOST_FRAMES)
