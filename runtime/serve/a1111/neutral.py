"""Fields and options that this service does not have: accepted where they change nothing, else refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.runtime.serve.web_errors import WebError

# What clients send that no server reads: of the client's own, or about where a server would save pictures.
IGNORED = frozenset(
    {
        *("url", "auth"),  # SillyTavern's: of this very service
        *("selection_info", "use_sharp_mask", "use_prompt_shortcut", "prompt_shortcut_ui_dict", "uniqueDocumentId"),
        *("mode", "original_prompt", "original_negative_prompt", "mask_expansion", "expanded_mask"),  # Photoshop's
        *("do_not_save_samples", "do_not_save_grid", "force_task_id", "script_args"),
        *("refiner_switch_at", "inpaint_full_res_padding", "image_cfg_scale"),  # nothing without what is refused
    }
)
HIGH_RES = "hr_"  # of the second pass, which `enable_hr` asks for

# What changes nothing, beside null, false, 0, "", [] and {}.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "s_noise": (1,),
    "s_tmax": ("Infinity",),
    "seed_resize_from_h": (-1,),
    "seed_resize_from_w": (-1,),
    "initial_noise_multiplier": (1,),
    "script_name": ("None",),
    "refiner_checkpoint": ("None",),
    "sd_vae": ("Automatic", "None"),
    "sd_unet": ("Automatic", "None"),
}
# What changes something where it is off.
ON = frozenset({"enable_pnginfo", "initial_noise_multiplier", "inpainting_mask_weight", "s_noise"})
WHY = {
    "enable_hr": "there is no second pass in a higher resolution; send false",
    "restore_faces": "there is no model that restores faces; send false",
    "tiling": "pictures are not made to repeat; send false",
    "script_name": "there are no scripts; omit it",
    "alwayson_scripts": "there are no scripts; omit them",
    "refiner_checkpoint": "a refiner is in its model's bundle, and is not chosen by name; omit it",
    "sd_vae": "a model's VAE is in its bundle; send Automatic",
    "styles": "no styles are stored here; write them into the prompt",
    "enable_pnginfo": "every picture holds its settings; send true",
    "infotext": "send the fields themselves",
}


def refuse_further(further: Mapping[str, Any]) -> None:
    """Raise WebError on the first field that this service does not have and that would change the picture."""
    for name, value in further.items():
        if name not in IGNORED and not name.startswith(HIGH_RES):
            refuse_unless_neutral(name, value)


def refuse_unless_neutral(name: str, value: Any) -> None:
    """Raise WebError where what this service does not have is given with a value that would change something."""
    off = value is None or not (value or name in ON)
    if off or value in NEUTRAL.get(name, ()):
        return
    why = WHY.get(name, "this service has nothing like it; omit it")
    raise WebError(f"{name}: {why}", code="unsupported_parameter", param=name)
