"""The autoencoder of the demo checkpoint: a constructed encoder and a decoder that starts as an enlargement.

The encoder computes four numbers for every patch of 8 x 8 pixels (`patch_statistics`): the mean colour,
whitened, and a difference along the diagonal. An untrained encoder lets the denoiser train at once.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

Latents: TypeAlias = NDArray[np.float32]

SCALING = 0.18215
FACTOR = 8
# Mean and whitening of the patch colours of 1500 random scenes, in -1 to 1: latents have unit variance.
COLOUR_MEAN = np.array([0.182, -0.103, -0.152], dtype=np.float32)
WHITENING = np.array([[1.669, -0.535, 0.017], [-0.535, 2.185, -0.276], [0.017, -0.276, 1.673]], dtype=np.float32)
# Of all directions, this one keeps the nine palette colours furthest apart.
CONTRAST = np.array([-0.1, -0.46, -0.88], dtype=np.float32) / np.float32(0.35)
ANCHOR = 16.0  # constant channels this far from the signal make a group norm the same for every picture
_SIGNALS = 4


def patch_statistics(pixels: NDArray[np.uint8]) -> Latents:
    """Compute in NumPy what the constructed encoder computes, times the scaling factor.

    pixels: (batch, height, width, 3), uint8, sides divisible by 8
    returns: (batch, 4, height / 8, width / 8), float32, about unit variance
    """
    batch, height, width, _ = pixels.shape
    colours = pixels.astype(np.float32) / 127.5 - 1
    blocks = colours.reshape(batch, height // 8, 2, 4, width // 8, 2, 4, 3).mean((3, 6))
    mean = (blocks.mean((2, 4)) - COLOUR_MEAN) @ WHITENING.T
    diagonal = (blocks[:, :, 0, :, 0] - blocks[:, :, 1, :, 1]) @ CONTRAST
    latents = np.concatenate([mean, diagonal[..., None]], axis=-1)
    return np.ascontiguousarray(latents.transpose(0, 3, 1, 2), dtype=np.float32)


def make_autoencoder() -> AutoencoderKL:
    """Build the autoencoder: exact encoder, decoder that enlarges the mean colours."""
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=SCALING,
    )
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            _silence_branches(part)
        _construct_encoder(vae)
        _start_decoder(vae)
    return vae


def _silence_branches(part: torch.nn.Module) -> None:
    """Make every residual block and attention the identity."""
    for name, module in part.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def _construct_encoder(vae: AutoencoderKL) -> None:
    encoder = vae.encoder
    colour = slice(0, 3)
    _clear(encoder.conv_in)
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1.0
    for block in encoder.down_blocks[:3]:
        shrink = block.downsamplers[0].conv
        _clear(shrink)
        shrink.weight[range(3), range(3), :2, :2] = 0.25
    shrink.weight[3, colour, 0, 0] = torch.from_numpy(CONTRAST)
    shrink.weight[3, colour, 1, 1] = -torch.from_numpy(CONTRAST)
    widen = encoder.down_blocks[2].resnets[0].conv_shortcut
    _clear(widen)
    widen.weight[range(3), range(3), 0, 0] = 1.0
    _spread_signals(encoder.down_blocks[3].resnets[0].conv_shortcut)
    _read_signals(encoder.conv_norm_out, encoder.conv_out)
    encoder.conv_out.bias[_SIGNALS:] = -20.0  # log variance
    _clear(vae.quant_conv)
    vae.quant_conv.weight[range(8), range(8), 0, 0] = 1.0


def _spread_signals(conv: torch.nn.Conv2d) -> None:
    """Write every signal and its negative (channels 0 to 7) and fill the rest with pairs of constants."""
    _clear(conv)
    assert conv.bias is not None
    whitening = torch.from_numpy(WHITENING)
    for sign, first in ((1.0, 0), (-1.0, _SIGNALS)):
        conv.weight[first : first + 3, :3, 0, 0] = sign * whitening
        conv.bias[first : first + 3] = -sign * whitening @ torch.from_numpy(COLOUR_MEAN)
        conv.weight[first + 3, 3, 0, 0] = sign
    conv.bias[2 * _SIGNALS :: 2] = ANCHOR
    conv.bias[2 * _SIGNALS + 1 :: 2] = -ANCHOR


def _read_signals(norm: torch.nn.GroupNorm, conv: torch.nn.Conv2d) -> None:
    """Undo the norm, whose variance the constants fix; silu(x) - silu(-x) is x."""
    size = norm.num_channels // norm.num_groups
    energy = 2 * (3 * 1.0 + 0.3)  # mean square of the signals and their negatives
    variance = ((size - 2 * _SIGNALS) * ANCHOR**2 + energy) / size
    norm.weight.fill_(variance**0.5)
    norm.bias.zero_()
    _clear(conv)
    conv.weight[range(4), range(4), 1, 1] = 1 / SCALING
    conv.weight[range(4), range(4, 8), 1, 1] = -1 / SCALING


def _start_decoder(vae: AutoencoderKL) -> None:
    """Lead the mean colour and its negative unchanged through channels 0 to 5 of the decoder."""
    decoder, kept = vae.decoder, range(6)
    _clear(vae.post_quant_conv)
    vae.post_quant_conv.weight[range(4), range(4), 0, 0] = 1.0
    unwhitening = torch.linalg.inv(torch.from_numpy(WHITENING)) * SCALING
    for sign, first in ((1.0, 0), (-1.0, 3)):
        _clear(decoder.conv_in, slice(first, first + 3))
        decoder.conv_in.weight[first : first + 3, :3, 1, 1] = sign * unwhitening
        decoder.conv_in.bias[first : first + 3] = sign * torch.from_numpy(COLOUR_MEAN)
    for block in decoder.up_blocks:
        convs = [resnet.conv_shortcut for resnet in block.resnets if resnet.conv_shortcut is not None]
        convs += [upsampler.conv for upsampler in block.upsamplers or ()]
        for conv in convs:
            _clear(conv, slice(0, 6))
            middle = conv.kernel_size[0] // 2
            conv.weight[kept, kept, middle, middle] = 1.0
    _anchor_output(decoder)


def _anchor_output(decoder: Any) -> None:
    """Give each of the two groups of the last norm a pair of constants, and read the mean colour."""
    anchor, size = 6.0, 8
    last = decoder.up_blocks[2].upsamplers[0].conv
    for channel, value in ((6, anchor), (7, -anchor), (14, anchor), (15, -anchor)):
        _clear(last, slice(channel, channel + 1))
        last.bias[channel] = value
    decoder.conv_norm_out.weight.fill_(((2 * anchor**2 + 2 * 1.1) / size) ** 0.5)
    _clear(decoder.conv_out)
    decoder.conv_out.weight[range(3), range(3), 1, 1] = 1.0
    decoder.conv_out.weight[range(3), range(3, 6), 1, 1] = -1.0


def _clear(conv: torch.nn.Conv2d, channels: slice = slice(None)) -> None:
    conv.weight[channels] = 0.0
    if conv.bias is not None:
        conv.bias[channels] = 0.0
