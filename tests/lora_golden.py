"""Makes tests/data/lora_kinds.safetensors, in an environment with LyCORIS and PEFT: what they make of two layers.

pip install lycoris_lora==4.1.3 peft==0.21.2 einops toml psutil pyyaml torch safetensors
python tests/lora_golden.py tests/data/lora_kinds.safetensors

The layers' own weights are `base|weight`. For each case: the file that the trainer writes, `case|file|key`, and the
weights that it changes as they are then, `case|merged|weight`, found by running the trained layers on unit inputs. The
metadata tell each case's strength, and PEFT's config.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

INPUTS, OUTPUTS, KERNEL, RANK, ALPHA = 8, 12, 2, 3, 2.0
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trainer's file and what it makes of the layers. config: the text of PEFT's config, where it is PEFT's"""

    file: Tensors
    merged: Tensors
    strength: float
    config: str = ""


class Net(nn.Module):
    """Two layers that every UNet has, and a normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(INPUTS, OUTPUTS, KERNEL)
        self.time_embedding = nn.Sequential()
        self.time_embedding.linear_1 = nn.Linear(INPUTS, OUTPUTS)
        self.conv_norm_out = nn.GroupNorm(2, OUTPUTS)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    @property
    def layers(self) -> dict[str, Any]:
        return {"conv_in": self.conv_in, "time_embedding.linear_1": self.time_embedding.linear_1}


def probe(layer: Callable[[Tensor], Tensor], *, convolution: bool) -> tuple[Tensor, Tensor]:
    """Find a layer's weight and bias by what it makes of nothing and of one unit at a time."""
    shape = (INPUTS, KERNEL, KERNEL) if convolution else (INPUTS,)
    units = torch.eye(torch.Size(shape).numel()).reshape(-1, *shape)
    bias = layer(torch.zeros(1, *shape)).reshape(OUTPUTS)
    return (layer(units).reshape(len(units), OUTPUTS) - bias).T.reshape(OUTPUTS, *shape), bias


def probed(net: Net) -> Tensors:
    found = {}
    for name, layer in net.layers.items():
        found[f"{name}.weight"], found[f"{name}.bias"] = probe(layer, convolution=name == "conv_in")
    return found


def randomise(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Take other numbers than those that a training begins with, which change nothing."""
    for key, parameter in parameters:
        noise = torch.randn_like(parameter) * 0.5
        parameter.data = parameter.data + (noise.abs() if "dora" in key or "magnitude" in key else noise)


def lycoris(kind: Any, *, strength: float = 1.0, rank: int = RANK, **options: Any) -> Case:
    net, file = Net(), {}
    for name, layer in net.layers.items():
        own = f"lora_unet_{name.replace('.', '_')}"
        module = kind(own, layer, multiplier=strength, lora_dim=rank, alpha=ALPHA, **options)
        if kind is not FullModule:  # whose parameters are the layer's own from here on
            randomise(module.named_parameters())
        module.apply_to()
        if kind is FullModule:
            randomise(module.named_parameters())
        file |= {f"{own}.{key}": tensor for key, tensor in module.custom_state_dict().items()}
    return Case(file=file, merged=probed(net), strength=strength)


def normalizations(*, strength: float) -> Case:
    net, name = Net(), "conv_norm_out"
    module = NormModule(f"lora_unet_{name}", net.conv_norm_out, multiplier=strength)
    randomise(module.named_parameters())
    weight, bias = module.make_weight(strength)
    file = {f"lora_unet_{name}.{key}": getattr(module, key) for key in ("w_norm", "b_norm")}
    return Case(file=file, merged={f"{name}.weight": weight, f"{name}.bias": bias}, strength=strength)


def peft(kind: Any, *, strength: float = 1.0, adapter: str = "default", rank: int = RANK, **options: Any) -> Case:
    net = Net()
    config = kind(r=rank, target_modules=["conv_in", "linear_1"], **options)
    model = get_peft_model(net, config, adapter_name=adapter)
    randomise((key, parameter) for key, parameter in model.named_parameters() if adapter in key)
    for layer in net.layers.values():
        layer.set_scale(adapter, strength)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = next(Path(folder).rglob("adapter_model.safetensors"))
        file, config_text = load_file(saved), saved.with_name("adapter_config.json").read_text()
    return Case(file=file, merged=probed(net), strength=strength, config=config_text)


CASES: dict[str, Callable[[], Case]] = {
    "LoCon": lambda: lycoris(LoConModule, strength=0.7),
    "LoCon with a core": lambda: lycoris(LoConModule, use_tucker=True),
    "LoHa": lambda: lycoris(LohaModule, strength=-0.6),
    "LoHa with a core": lambda: lycoris(LohaModule, use_tucker=True),
    "LoKr": lambda: lycoris(LokrModule, factor=2, rank=2),
    "LoKr of two whole matrices": lambda: lycoris(LokrModule, factor=2, full_matrix=True, strength=0.5),
    "LoKr of two products": lambda: lycoris(LokrModule, factor=4, rank=1, decompose_both=True, strength=0.5),
    "LoKr with a core": lambda: lycoris(LokrModule, factor=2, rank=2, use_tucker=True),
    "differences": lambda: lycoris(FullModule),
    "normalizations": lambda: normalizations(strength=0.8),
    "DoRA": lambda: lycoris(LoConModule, weight_decompose=True),
    "DoRA of inputs": lambda: lycoris(LoConModule, weight_decompose=True, wd_on_out=False),
    "DoRA of LoHa": lambda: lycoris(LohaModule, weight_decompose=True),
    "DoRA of LoKr": lambda: lycoris(LokrModule, factor=2, rank=2, weight_decompose=True, wd_on_out=False),
    "PEFT": lambda: peft(LoraConfig, lora_alpha=ALPHA, strength=0.7, adapter="style"),
    "PEFT's DoRA": lambda: peft(LoraConfig, lora_alpha=ALPHA, use_dora=True, strength=0.7),
    "PEFT's patterns": lambda: peft(
        LoraConfig, lora_alpha=ALPHA, rank_pattern={"conv_in": 2}, alpha_pattern={"linear_1": 5}, use_rslora=True
    ),
    "PEFT's LoHa": lambda: peft(LoHaConfig, alpha=ALPHA, use_effective_conv2d=True, strength=0.7),
    "PEFT's LoKr": lambda: peft(LoKrConfig, alpha=ALPHA, rank=1, decompose_both=True, strength=0.7),
    "PEFT's LoKr of two whole matrices": lambda: peft(LoKrConfig, alpha=ALPHA, rank=4),
}


def main(target: str) -> None:
    """Write every case into one file."""
    tensors: Tensors = {f"base|{key}": tensor for key, tensor in Net().state_dict().items()}
    told: dict[str, str] = {}
    for name, make in CASES.items():
        with torch.no_grad():
            case = make()
        for what, found in (("file", case.file), ("merged", case.merged)):
            tensors |= {f"{name}|{what}|{key}": tensor for key, tensor in found.items()}
        told[name] = json.dumps({"strength": case.strength, "config": case.config})
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}, target, metadata=told)


if __name__ == "__main__":
    main(sys.argv[1])
