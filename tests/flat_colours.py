"""Flat pictures in classes of one colour each, and an encoder that tells them apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.contract import Preprocess
from serve.pictures import Picture, prepare_batch
from tests.plain_manifest import plain_manifest

SIZE = 16
FRAME = Preprocess(height_px=SIZE, width_px=SIZE, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
COLOURS = {"blue": (20, 30, 220), "green": (30, 210, 40), "red": (220, 20, 30)}


def draw_classes(folder: Path, count: int, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> Path:
    """`count` pictures CLASS/CLASS_NUMBER.png of each class, each a little off its colour."""
    rng = np.random.default_rng(count)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shade = np.clip(np.array(colour) + rng.integers(-15, 16, 3), 0, 255).astype(np.uint8)
            Image.fromarray(np.tile(shade, (SIZE, SIZE, 1))).save(folder / name / f"{name}_{number}.png")
    return folder


class MeanColour:
    """The hue of a picture as a unit vector: a perfect encoder of flat, saturated pictures, and no network of ours."""

    manifest = plain_manifest("mean colour", 3, FRAME)
    encoder_id = manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        pixels = prepare_batch(images, self.manifest.preprocess).reshape(-1, SIZE**2, 3).astype(np.float32)
        vectors = pixels.mean(1) - 100.3
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
