"""Which module a key of a LoRA file means: the names that trainers give, brought to one form.

The form is the module's name in diffusers or transformers with underscores for dots, as kohya's trainers write it. It
loses nothing where it is compared with the names that a network has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from latentrt.engines.errors import CheckpointError

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Role = Literal["down", "up", "mid", "alpha"]

# What a key ends with, and what that tensor is; the longest first.
ROLES: tuple[tuple[str, Role], ...] = (
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora_mid.weight", "mid"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    ("_lora.down.weight", "down"),
    ("_lora.up.weight", "up"),
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".alpha", "alpha"),
)
OTHER_KINDS = {  # what a key ends with, and of what it is a part
    r"\.hada_(w|t)\d(_[ab])?": "LoHa",
    r"\.lokr_(w|t)\d(_[ab])?": "LoKr",
    r"\.oft_(blocks|diag)": "OFT",
    r"\.dora_scale": "DoRA",
    r"\.lora_magnitude_vector(\.weight)?": "DoRA",
    r"\.diff(_b)?": "whole differences of weights",
    r"\.[ab][12]\.weight": "GLoRA",
}
PREFIXES: tuple[tuple[str, Part], ...] = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
)
PEFT_PREFIX = "base_model.model."
TEXT_MODEL = "text_model_"
# diffusers' first way to save: processors of attention, and the same names for a text encoder's attention.
OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Modules of the original UNet outside its blocks, and those inside a resnet.
ORIGINAL_MODULES: Mapping[str, str] = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "middle_block_0": "mid_block_resnets_0",
    "middle_block_1": "mid_block_attentions_0",
    "middle_block_2": "mid_block_resnets_1",
}
ORIGINAL_RESNET: Mapping[str, str] = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")


def split_key(key: str, *, where: str) -> tuple[Part, str, Role]:
    """Return which network a key changes, the module in one form, and what the tensor is. Raises CheckpointError."""
    kind = next((name for end, name in OTHER_KINDS.items() if re.search(f"{end}$", key)), None)
    if kind:
        raise CheckpointError(f"{where} holds {kind} ('{key}'), expected a LoRA; ask its author for one")
    end, role = next(((end, role) for end, role in ROLES if key.endswith(end)), ("", None))
    if role is None:
        raise CheckpointError(f"{where}: '{key}' is no tensor of a LoRA; expected names that end with {_ends()}")
    part, module = _split_module(key.removesuffix(end), where=where)
    return part, _plain(part, module), role


def _ends() -> str:
    return ", ".join(end for end, _ in ROLES if end.startswith((".lora_A.w", ".lora_B.w", ".lora_down", ".lora_up")))


def _split_module(name: str, *, where: str) -> tuple[Part, str]:
    if name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
        return ("text_encoder" if "encoder.layers." in name else "unet"), name
    for prefix, part in PREFIXES:
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    if name.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        return "unet", name
    raise CheckpointError(
        f"{where}: '{name}' is of no network that is known here; "
        f"expected names that begin with {', '.join(prefix for prefix, _ in PREFIXES)}"
    )


def _plain(part: Part, module: str) -> str:
    """Bring a module's name to one form."""
    module = module.replace(".processor.", ".")
    *path, last = module.split(".")
    if part == "unet" and path and last == "to_out":
        module = f"{module}.0"
    elif part != "unet" and path and path[-1] == "self_attn":
        module = ".".join([*path, OLD_ATTENTION.get(last, last)])
    return plain_module(module)


def plain_module(module: str) -> str:
    """Return the one form of a module's name in diffusers or transformers, whichever version wrote it."""
    return module.replace(".", "_").removeprefix(TEXT_MODEL)


def from_original(module: str, *, resnets: int) -> str:
    """Return diffusers' name of a module of the original UNet; any other name is returned as it is.

    resnets: how many a down block has
    """
    for old, new in ORIGINAL_MODULES.items():
        if module == old or module.startswith(f"{old}_"):
            rest = module.removeprefix(old)
            return new + (f"_{ORIGINAL_RESNET.get(rest[1:], rest[1:])}" if rest else "")
    found = BLOCK.fullmatch(module)
    if not found:
        return module
    number, inner, rest = int(found[2]), int(found[3]), found[4]
    side, number = ("down", number - 1) if found[1] == "input" else ("up", number)
    block, place = divmod(number, resnets + 1)
    if rest in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    if inner == 0:
        return f"{side}_blocks_{block}_resnets_{place}_{ORIGINAL_RESNET.get(rest, rest)}"
    return f"{side}_blocks_{block}_attentions_{place}_{rest}"
