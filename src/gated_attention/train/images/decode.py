"""One stored image as an array."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Stored = Path | bytes
"""An image file, or its content."""


def decode(stored: Stored, width: int, height: int, mode: str = "RGB") -> npt.NDArray[np.uint8]:
    """An image of that size, (height, width, channels), from 0 to 255.

    Raises:
        ValueError: if it is no image that can be read.
    """
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut to 8 from above
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            converted = upright.convert(mode)
            if converted.size != (width, height):
                converted = converted.resize((width, height), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        place = "a row" if isinstance(stored, bytes) else str(stored)
        raise ValueError(f"{place} is no image that can be read ({error}); remove it") from error
    return np.array(converted, dtype=np.uint8).reshape(height, width, -1)
