"""Pictures of any kind -> pixels as an encoder wants them, many at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract import Preprocess
from serve.preprocess import ImageError, load_image

Picture: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A path, encoded bytes, a PIL image, or what is prepared already: uint8 (H, W, 3)."""


def prepare_batch(images: Sequence[Picture], preprocess: Preprocess) -> NDArray[np.uint8]:
    """Pictures -> uint8 (N, H, W, 3). Raises: ImageError of the first unreadable one."""
    pixels = []
    for prepared in prepare_each(images, preprocess):
        if isinstance(prepared, ImageError):
            raise prepared
        pixels.append(prepared)
    return np.stack(pixels) if pixels else np.empty((0, preprocess.height_px, preprocess.width_px, 3), np.uint8)


def prepare_each(images: Sequence[Picture], preprocess: Preprocess) -> list[NDArray[np.uint8] | ImageError]:
    """One answer per picture, in order: its pixels uint8 (H, W, 3), or why it cannot be read."""
    if all(isinstance(image, np.ndarray) for image in images):
        return [_pixels_or_error(image, preprocess) for image in images]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock while it decodes
        return list(pool.map(partial(_pixels_or_error, preprocess=preprocess), images))


def _pixels_or_error(image: Picture, preprocess: Preprocess) -> NDArray[np.uint8] | ImageError:
    if not isinstance(image, np.ndarray):
        try:
            return load_image(image, preprocess)
        except ImageError as error:
            return error
    shape = (preprocess.height_px, preprocess.width_px, 3)
    if image.shape != shape or image.dtype != np.uint8:
        raise ValueError(f"a prepared image is {image.dtype}{image.shape}, wanted uint8{shape}; pass the picture itself")
    return image
