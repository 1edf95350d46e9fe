"""Decoding one image file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdeploy.errors import RecipeError

GRAY = ("L", "LA", "1")
COLOR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode one image file.

    Returns:
        uint8 [H, W] for gray files, [H, W, 3] RGB for all others (transparency is dropped).

    Raises:
        RecipeError: the file is missing, damaged, no image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode in GRAY:
                return np.asarray(image.convert("L"))
            if image.mode in COLOR:
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError is what Pillow's PNG reader raises on a broken chunk.
        raise RecipeError(f"{path} can't be decoded: {error}.", hint="Replace or remove the file.") from error
    raise RecipeError(f"{path}: pixel format {mode} is not supported; expected 8 bits per channel.")
