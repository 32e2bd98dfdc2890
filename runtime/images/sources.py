"""What a picture may be given as, and how large one may be: known without the library that reads it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Array"
"""A path, the bytes of a file, a Pillow image, or an array: (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), uint8 from 0 to
255, or floats from 0 to 1; for masks bool as well."""

MAX_PIXELS = 1 << 26  # what may be decoded, and what may be asked for: 8192 by 8192
