"""Which module a key of a LoRA file means: the names that trainers give, brought to one form.

The form is the module's name in diffusers or transformers with underscores for dots, as kohya's trainers write it. It
loses nothing where it is compared with the names that a network has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.kinds import ALPHA, Role
from latentrt.engines.lora.transformer_names import STARTS

Part = Literal["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]
Parameter = Literal["weight", "bias"]

NAME = r"(\.(?P<adapter>(?!weight$)[^.]+))?"  # PEFT's name for one of several adapters
# What a key ends with, the parameter that changes, and what that tensor is.
ENDS: tuple[tuple[str, Parameter, Role], ...] = (
    (r"[._]lora(_linear_layer)?\.down\.weight", "weight", "lora_down"),
    (r"[._]lora(_linear_layer)?\.up\.weight", "weight", "lora_up"),
    (rf"\.lora_A{NAME}\.weight", "weight", "lora_down"),
    (rf"\.lora_B{NAME}\.weight", "weight", "lora_up"),
    (rf"\.lora_magnitude_vector{NAME}(\.weight)?", "weight", "lora_magnitude_vector"),
    (r"\.lora_down\.weight", "weight", "lora_down"),
    (r"\.lora_up\.weight", "weight", "lora_up"),
    (r"\.lora_mid\.weight", "weight", "lora_mid"),
    (rf"\.(?P<role>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2){NAME}", "weight", ""),
    (r"\.(?P<role>dora_scale|diff|w_norm)", "weight", ""),
    (r"\.(?P<role>diff_b|b_norm)", "bias", ""),
    (rf"\.{ALPHA}", "weight", ALPHA),
)
EXPECTED = "lora_A, lora_B, lora_down, lora_up, hada_…, lokr_…, diff, w_norm, dora_scale or alpha"
ELSEWHERE = "ask its author for a LoRA, a LoHa or a LoKr"
# What a key looks like that means something else: what it is, and what to do.
OTHER_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"\.(oft_blocks|oft_diag|oft_[rR]|boft_[a-zA-Z]+)(\.|$)", "an OFT or BOFT", ELSEWHERE),
    (r"\.[ab][12]\.weight$|\.bm\.weight$", "a GLoRA", ELSEWHERE),
    (r"\.on_input$|\.ia3_l(\.|$)", "an IA3", ELSEWHERE),
    (r"\.lora_embedding_[AB](\.|$)", "a change of the table of words", ELSEWHERE),
    (r"\.lora_(B|up)(\..+)?\.bias$", "biases of a LoRA", "train it without lora_bias"),
    (r"^bundle_emb\.", "learned words", "save those in files of their own, and the LoRA in one without them"),
)
# None: trainers call any denoiser so.
PREFIXES: tuple[tuple[str, Part | None], ...] = (
    ("lora_unet_", None),
    ("lora_transformer_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", None),  # LyCORIS' own wrapper around one network
    ("unet.", None),
    ("transformer.", "transformer"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("diffusion_model.", None),  # ComfyUI's own, with the original's names
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
)
PEFT_PREFIX = "base_model.model."
TEXT_MODEL = "text_model_"
# diffusers' first way to save: processors of attention, and the same names for a text encoder's attention.
OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Modules of the original UNet outside its blocks, and those inside a resnet.
ORIGINAL_MODULES: Mapping[str, str] = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
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
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What a key of a file means. module: in the one form; adapter: PEFT's name for it, where the key has one"""

    part: Part
    module: str
    parameter: Parameter
    role: Role
    adapter: str | None


def split_key(key: str, *, where: str) -> Key:
    """Return what a key means. Raises CheckpointError if it is none of a LoRA, or of another kind."""
    for pattern, kind, remedy in OTHER_KINDS:
        if re.search(pattern, key):
            raise CheckpointError(f"{where} holds {kind} ('{key}'), which cannot be used here; {remedy}")
    for pattern, parameter, role in ENDS:
        found = re.search(f"{pattern}$", key)
        if found:
            part, module = _split_module(key[: found.start()], where=where)
            groups, module = found.groupdict(), _plain(module)
            part = part or denoiser_of(module)
            role, adapter = groups.get("role") or role, groups.get("adapter")
            return Key(part=part, module=module, parameter=parameter, role=role, adapter=adapter)
    raise CheckpointError(f"{where}: '{key}' is not a tensor of a LoRA; expected names that end with {EXPECTED}")


def denoiser_of(module: str) -> Part:
    """Return the kind of denoiser that has a module."""
    return "transformer" if module.startswith(STARTS) else "unet"


def _split_module(name: str, *, where: str) -> tuple[Part | None, str]:
    """Return the network that a key names, None for a denoiser of either kind, and the module in it."""
    inner = name.replace(PEFT_PREFIX, "", 1)
    for prefix, part in PREFIXES:
        if inner.startswith(prefix):
            return part, inner.removeprefix(prefix)
    if inner != name:
        return ("text_encoder" if "encoder.layers." in inner else None), inner
    if name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) or plain_module(name).startswith(STARTS):
        return None, name
    raise CheckpointError(
        f"{where}: '{name}' belongs to no known network; "
        f"expected names that begin with {', '.join(prefix for prefix, _ in PREFIXES)}"
    )


def _plain(module: str) -> str:
    """Bring a module's name to one form."""
    module = module.replace(".processor.", ".")
    *path, last = module.split(".")
    if path and path[-1] == "self_attn":  # a text encoder's
        module = ".".join([*path, OLD_ATTENTION.get(last, last)])
    elif path and last == "to_out":  # a UNet's
        module = f"{module}.0"
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
