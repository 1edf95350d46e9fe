"""From decoded pixels to the network's input: the model's own evaluation transform, without torch.

The steps and their rounding follow timm's evaluation transform (`timm.data.create_transform(is_training=False)`):
resize with Pillow, crop or pad at the centre, scale to [0, 1], subtract the mean, divide by the standard deviation.
A deployed program needs only numpy and Pillow to do the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpdeploy.errors import CorruptArtifact, RecipeError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")
CHANNELS = {"rgb": 3, "gray": 1}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network.

    Args:
        input_size: Channels, height, width.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        interpolation: Pillow filter: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: The crop's share of the resized image's edge, in (0, 1].
        crop_mode: "center" keeps the aspect ratio and loses the border, "squash" resizes both edges apart,
            "border" keeps the whole image and pads with the mean.
        color: "rgb" (3 channels) or "gray" (1 channel, ITU-R 601-2 luma).

    Raises:
        RecipeError: a value is out of its range, or the lengths do not agree.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    color: str

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or not all(type(n) is int and n > 0 for n in self.input_size):
            raise RecipeError(f"preprocessing.input_size: expected 3 positive integers, not {self.input_size!r}.")
        for name, value, allowed in (
            ("interpolation", self.interpolation, FILTERS),
            ("crop_mode", self.crop_mode, CROP_MODES),
            ("color", self.color, CHANNELS),
        ):
            if value not in allowed:
                raise RecipeError(f"preprocessing.{name}: expected one of {', '.join(allowed)}, not {value!r}.")
        channels = self.input_size[0]
        if channels != CHANNELS[self.color]:
            raise RecipeError(
                f"preprocessing: color {self.color!r} has {CHANNELS[self.color]} channels; input_size has {channels}.",
                hint='Networks with 1 channel take color "gray", with 3 channels "rgb"; no other number is supported.',
            )
        if len(self.mean) != channels or not all(math.isfinite(m) for m in self.mean):
            raise RecipeError(f"preprocessing.mean: expected {channels} finite numbers, not {self.mean!r}.")
        if len(self.std) != channels or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise RecipeError(f"preprocessing.std: expected {channels} positive numbers, not {self.std!r}.")
        if not 0.0 < self.crop_pct <= 1.0:
            raise RecipeError(f"preprocessing.crop_pct: expected a number in (0, 1], not {self.crop_pct!r}.")

    def apply(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Turn decoded images into one batch.

        Args:
            images: uint8 arrays of shape [H, W] (gray) or [H, W, 3] (RGB), of any sizes.

        Returns:
            float32 [n, C, H, W]; [0, C, H, W] for an empty list.

        Raises:
            RecipeError: an array has another type or shape, or no pixel.
        """
        batch = np.empty((len(images), *self.input_size), dtype=np.float32)
        mean = np.asarray(self.mean, dtype=np.float32)[:, None, None]
        std = np.asarray(self.std, dtype=np.float32)[:, None, None]
        for row, image in enumerate(images):
            pixels = np.asarray(self._crop(self._resize(_to_pil(image, row, self.color))), dtype=np.float32)
            chw = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            batch[row] = (chw / np.float32(255.0) - mean) / std
        return batch

    def _resize(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        scale_h, scale_w = (math.floor(edge / self.crop_pct) for edge in self.input_size[1:])
        if self.crop_mode == "squash":
            size = (scale_w, scale_h)
        elif self.crop_mode == "center" and scale_h == scale_w:
            # torchvision's rule for one edge: the shorter becomes `scale`, the longer is cut off to an integer.
            short, long = sorted((width, height))
            other = int(scale_h * long / short)
            size = (scale_h, other) if width <= height else (other, scale_h)
        else:
            # timm's ResizeKeepRatio: "border" fits the longer relative edge, "center" the shorter one.
            pick = max if self.crop_mode == "border" else min
            ratio = pick(height / scale_h, width / scale_w)
            size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        return image if size == image.size else image.resize(size, FILTERS[self.interpolation])

    def _crop(self, image: Image.Image) -> Image.Image:
        _, height, width = self.input_size
        if image.size == (width, height):
            return image
        left, image_w = _centre(image.width, width)
        top, image_h = _centre(image.height, height)
        if (image_w, image_h) != image.size:
            padded = Image.new(image.mode, (image_w, image_h), self._fill())
            padded.paste(image, ((image_w - image.width) // 2, (image_h - image.height) // 2))
            image = padded
        return image.crop((left, top, left + width, top + height))

    def _fill(self) -> int | tuple[int, ...]:
        """Colour of the padding: the mean in "border" mode, else black, as the two crops of timm do."""
        level = tuple(round(255 * m) if self.crop_mode == "border" else 0 for m in self.mean)
        return level if len(level) > 1 else level[0]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; `from_json` turns them back into an equal object."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_json` wrote.

        Raises:
            CorruptArtifact: a key is missing or unknown, or a value is not what the key holds.
        """
        if not isinstance(data, Mapping):
            raise CorruptArtifact(f"preprocessing: expected a JSON object, not {type(data).__name__}.")
        known = {field.name for field in fields(cls)}
        if missing := sorted(known - set(data)):
            raise CorruptArtifact(f"preprocessing: {', '.join(missing)} missing.")
        if unknown := sorted(set(data) - known):
            raise CorruptArtifact(f"preprocessing: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}.")
        try:
            return cls(
                input_size=tuple(data["input_size"]),
                mean=tuple(float(m) for m in data["mean"]),
                std=tuple(float(s) for s in data["std"]),
                interpolation=data["interpolation"],
                crop_pct=float(data["crop_pct"]),
                crop_mode=data["crop_mode"],
                color=data["color"],
            )
        except (TypeError, ValueError, RecipeError) as error:
            raise CorruptArtifact(f"preprocessing: a value can't be read ({error}).") from error


def _centre(have: int, want: int) -> tuple[int, int]:
    """Return (offset of the crop, edge after padding) along one axis, rounding as torchvision does (half to even)."""
    return (round((have - want) / 2.0), have) if have > want else (0, want)


def _to_pil(image: NDArray[np.uint8], row: int, color: str) -> Image.Image:
    shape = image.shape
    if image.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or 0 in shape:
        raise RecipeError(f"Image {row}: expected uint8 [H, W] or [H, W, 3] with pixels, not {image.dtype} {shape}.")
    mode = "L" if color == "gray" else "RGB"
    pil = Image.fromarray(image)
    return pil if pil.mode == mode else pil.convert(mode)
