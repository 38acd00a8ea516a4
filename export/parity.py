"""torch against ONNX Runtime on golden images: a graph that differs is not published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from serve.contract import Manifest, Parity
from serve.errors import ExportError
from serve.preprocess import load_image
from train.encoder import Encoder, UnitEncoder

BATCH_SIZES = (1, 2, 7, 32)
TOLERANCES = {"fp32": (1e-5, 0.99999), "fp16": (0.02, 0.999), "int8": (0.2, 0.98)}
"""Precision -> largest difference of a unit vector's entry, smallest cosine. fp16 and int8 have floors of recall as well
(export/precision.py); these catch a conversion that went wrong."""


def golden_images(manifest: Manifest) -> NDArray[np.uint8]:
    """Noise, gradients, flat colours and black, drawn from a fixed seed: uint8 (32, H, W, 3)."""
    height, width, _ = manifest.input.shape
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, height * width).reshape(height, width, 1)
    ramps = np.stack([(ramp * tint).astype(np.uint8) for tint in rng.random((8, 3))])
    flat = np.broadcast_to(rng.integers(0, 256, (7, 1, 1, 3), dtype=np.uint8), (7, height, width, 3))
    return np.concatenate([noise, ramps, flat, np.zeros((1, height, width, 3), np.uint8)])


def measure_parity(
    encoder: Encoder,
    graph: Path,
    manifest: Manifest,
    pictures: Sequence[bytes] = (),
    *,
    images: NDArray[np.uint8] | None = None,
) -> Parity:
    """Compare at every batch size, on golden images and the user's own. Raises: ExportError beyond tolerance.

    Args: images, prepared ones in place of the golden images: int8 knows only the range that it was calibrated on.
    """
    images = golden_images(manifest) if images is None else images
    if pictures:
        images = np.concatenate([images, np.stack([load_image(picture, manifest.preprocess) for picture in pictures])])
    with torch.inference_mode():
        wanted = UnitEncoder(encoder).eval()(torch.from_numpy(images)).numpy()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    worst, cosine = 0.0, 1.0
    for size in BATCH_SIZES:
        parts = [session.run(None, {manifest.input.name: images[at : at + size]})[0] for at in range(0, len(images), size)]
        got = np.concatenate(parts)
        worst = float(np.maximum(worst, np.abs(got - wanted).max()))  # numpy's keep a NaN, Python's max and min drop it
        cosine = float(np.minimum(cosine, (got * wanted).sum(1).min()))
    most, least = TOLERANCES[manifest.precision]
    if not (worst <= most and cosine >= least):
        raise ExportError(
            f"the {manifest.precision} graph differs from the network by {worst:.2g} (at most {most:g}), cosine {cosine:.6f} "
            f"(at least {least}); nothing was published"
        )
    return Parity(images=len(images), batch_sizes=BATCH_SIZES, max_abs_error=worst, min_cosine=min(cosine, 1.0))
