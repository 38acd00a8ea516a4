"""Encoded images -> uint8 pixels of the encoder's size: the only decode and resize in the project.

Export copies this file beside Triton's preprocess model, so it needs numpy and Pillow alone and takes its parameters as
plain values. Scaling to [0, 1] and normalisation are not here: they are inside the graph.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from serve.contract import Preprocess

MAX_PIXELS = 64_000_000
"""Pictures above this are refused before they are decoded: a 100 KB PNG can ask for gigabytes."""
MARGIN = 1.5
"""`reduced` JPEG decoding leaves at least so many pixels for each of the frame's, in both directions. For 224 px a photo of
1024 x 768 is decoded at half size, on average 0.6 of 255 from `full`, one of 4000 x 3000 at a quarter, 0.2."""


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""


class ImageError(ValueError):
    """One picture that cannot be read; the message says why in one line."""


TRAITS = ("grey", "16-bit", "CMYK", "EXIF-rotated", "animated")
"""What `decode` can tell of a file: see `_traits`."""


def load_image(
    source: str | Path | bytes | Image.Image, preprocess: Preprocess, traits: list[str] | None = None
) -> NDArray[np.uint8]:
    """Read one picture as the encoder wants it.

    Args: traits, a list that gains those of TRAITS that the file has. Returns: uint8 (height_px, width_px, 3), RGB.
    Raises: ImageError.
    """
    return prepare(source, **preprocess.model_dump(), traits=traits)


def prepare(
    source: str | Path | bytes | Image.Image,
    *,
    height_px: int,
    width_px: int,
    resize: str,
    crop: float,
    resample: str,
    jpeg: str,
    traits: list[str] | None = None,
) -> NDArray[np.uint8]:
    """`load_image` with the contract as plain values, for the copy that runs inside Triton."""
    kept = crop if resize == "center_crop" else None
    shrink = partial(jpeg_scale, height_px=height_px, width_px=width_px, crop=kept) if jpeg == "reduced" else None
    image = decode(source, traits, shrink=shrink)
    box = crop_box(image.width, image.height, height_px / width_px, crop) if resize == "center_crop" else None
    resized = image.resize((width_px, height_px), Image.Resampling[resample.upper()], box=box)
    return np.asarray(resized, dtype=np.uint8)


def crop_box(width: int, height: int, aspect_hw: float, crop: float) -> tuple[float, float, float, float]:
    """The central box of the target's aspect that keeps `crop` of the limiting side (SimCLR's `center_crop`)."""
    box_height = crop * min(height, width * aspect_hw)
    box_width = box_height / aspect_hw
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def jpeg_scale(width: int, height: int, *, height_px: int, width_px: int, crop: float | None) -> int:
    """The divisor, 1, 2, 4 or 8, with which an upright JPEG keeps MARGIN times the frame's pixels; crop None for `stretch`."""
    whole = (0.0, 0.0, width, height)
    left, top, right, bottom = whole if crop is None else crop_box(width, height, height_px / width_px, crop)
    surplus = min((right - left) / width_px, (bottom - top) / height_px) / MARGIN
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1.0, surplus))


def decode(
    source: str | Path | bytes | Image.Image,
    traits: list[str] | None = None,
    *,
    shrink: Callable[[int, int], int] | None = None,
) -> Image.Image:
    """Decode, upright (EXIF), first frame, 8-bit RGB; transparency is laid on white. Raises: ImageError.

    Args: traits, a list that gains those of TRAITS that the file has; shrink, upright width and height -> the divisor by
    which a JPEG file may be decoded smaller, which libjpeg does while it decodes.
    """
    name = "image" if isinstance(source, (bytes, Image.Image)) else str(source).replace("\n", "?")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_file(source))
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{name}: {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are accepted; shrink it")
        deep = _is_deep(image)  # load() forgets it
        if shrink is not None and not isinstance(source, Image.Image) and image.format in ("JPEG", "MPO"):
            _shrink(image, shrink)
        image.load()
        upright = _upright(image)
        if traits is not None:
            traits += _traits(image, deep=deep, turned=upright is not image)
        return _rgb(upright)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        reason = "empty file" if source == b"" else _reason(error)
        raise ImageError(f"{name}: not a readable picture ({reason})") from error


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded picture before EXIF turns it; nothing is decoded. Raises: ImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # as in `decode`
        raise ImageError(f"image: not a readable picture ({_reason(error)})") from error


def _file(source: str | Path | bytes) -> io.BytesIO | str | Path:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text is a memory address
        return "not a picture in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def _upright(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing about the pixels: viewers show such a picture as it is
        return 1


def _shrink(image: Image.Image, shrink: Callable[[int, int], int]) -> None:
    lying = _orientation(image) >= 5  # width and height change places
    scale = shrink(image.height, image.width) if lying else shrink(image.width, image.height)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


def _traits(image: Image.Image, *, deep: bool, turned: bool) -> list[str]:
    """Those of TRAITS that hold: 16-bit is anything deeper than 8, animated any file of several frames or pages."""
    try:
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: a photo and its previews
    except Exception:  # a damaged second frame does not cost the first
        animated = True
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    flags = (grey, deep, image.mode == "CMYK", turned, animated)
    return [trait for trait, holds in zip(TRAITS, flags, strict=True) if holds]


def _is_deep(image: Image.Image) -> bool:
    """Deeper than 8 bits a channel. Pillow reads 16-bit RGB as 8-bit; its raw mode (`RGB;16B`) still tells before loading."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ()
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return image.mode.startswith(("I", "F")) or (isinstance(raw_mode, str) and ";16" in raw_mode)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # Pillow would clip 16 bits to white
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode == "F" and 0 < values.max(initial=0) <= 1:  # floats in [0, 1] would all be black
            values = values * 255
        values = values / 257 if values.max(initial=0) > 255 else values
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
