"""Makes of a model what OpenVINO reads, in an environment with its converters. Imports nothing of ours.

python peer_convert.py int8 FOLDER TARGET     every network of a converted model, with its weights in 8 bits
python peer_convert.py tiny VAE FOLDER        a converted model's decoder, replaced by an AutoencoderTiny's
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

NETWORK = "openvino_model.xml"
EDGE = 64  # of the latents with which the decoder is traced; OpenVINO is told that both sides may be any


def compress(source: str, target: str) -> None:
    import nncf
    import openvino

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("openvino_model.*", "complete"), dirs_exist_ok=True)
    for network in sorted(Path(source).glob(f"*/{NETWORK}")):
        smaller = nncf.compress_weights(openvino.Core().read_model(network))
        openvino.save_model(smaller, Path(target) / network.parent.name / NETWORK, compress_to_fp16=False)
        del smaller
        gc.collect()


def replace_decoder(vae: str, target: str) -> None:
    import openvino
    import torch
    from diffusers import AutoencoderTiny

    tiny: Any = AutoencoderTiny.from_pretrained(vae).eval()

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = tiny  # its weights would be constants, which cannot be traced, if they were not this module's

        def forward(self, latent_sample: Any) -> Any:
            return self.tiny.decode(latent_sample, return_dict=False)[0]

    latents = torch.zeros(1, tiny.config.latent_channels, EDGE, EDGE)
    with torch.no_grad():
        model = openvino.convert_model(Decoder(), example_input={"latent_sample": latents})
    model.reshape({model.input(0): [-1, tiny.config.latent_channels, -1, -1]})
    model.input(0).get_tensor().set_names({"latent_sample"})
    model.output(0).get_tensor().set_names({"sample"})
    folder = Path(target) / "vae_decoder"
    openvino.save_model(model, folder / NETWORK, compress_to_fp16=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"scaling_factor": tiny.config.scaling_factor, "shift_factor": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    {"int8": compress, "tiny": replace_decoder}[sys.argv[1]](*sys.argv[2:])
