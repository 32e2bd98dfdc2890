"""Runs in an environment with PEFT: diffusers loads LoRAs, fuses them and leaves the weights.

python lora_peer.py CHECKPOINT WEIGHTS.safetensors LORA.safetensors STRENGTH [LORA STRENGTH …]
"""

from __future__ import annotations

import sys


def main(checkpoint: str, target: str, *loras: str) -> None:
    """Write the UNet's and the text encoder's weights with all LoRAs in them, by part and name."""
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, safety_checker=None)
    names = []
    for number, path in enumerate(loras[::2]):
        pipe.load_lora_weights(path, adapter_name=f"lora{number}")
        names.append(f"lora{number}")
    pipe.set_adapters(names, adapter_weights=[float(strength) for strength in loras[1::2]])
    pipe.fuse_lora(components=["unet", "text_encoder"], adapter_names=names)
    pipe.unload_lora_weights()
    tensors = {f"unet:{key}": tensor for key, tensor in pipe.unet.state_dict().items()}
    tensors |= {f"text_encoder:{key}": tensor for key, tensor in pipe.text_encoder.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
