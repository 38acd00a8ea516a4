"""torch against ONNX Runtime on golden images, at every batch size served: a graph that differs is not published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from export.graph import reason
from export.repository import MAX_BATCH
from serve.contract import Manifest, Parity
from serve.errors import ExportError
from serve.preprocess import load_image
from train.encoder import UnitEncoder

BATCH_SIZES = (1, 2, 7, MAX_BATCH)
TOLERANCES = {"fp32": (1e-5, 0.99999), "fp16": (0.02, 0.999), "int8": (0.15, 0.99)}
"""Precision -> largest difference of a unit vector's entry, smallest cosine. fp16 and int8 have floors of recall as well
(export/precision.py); these catch a conversion that went wrong."""
ROW_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "int8": 1e-2}
"""Precision -> longest difference of a picture's vectors alone and in a batch: kernels round differently, and a value between
two steps of int8 falls to either."""
UNIT_TOLERANCE = 1e-4
"""Of a vector's length: the norm is float32 in every precision."""


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
    encoder: nn.Module,
    graph: Path,
    manifest: Manifest,
    pictures: Sequence[bytes] = (),
    *,
    images: NDArray[np.uint8] | None = None,
) -> Parity:
    """Compare at every batch size, on golden images and the user's own. Raises: ExportError beyond tolerance.

    Args: encoder, as for `write_graph`; images, prepared ones in place of the golden images: int8 knows only the range that it
    was calibrated on.
    """
    images = golden_images(manifest) if images is None else images
    if pictures:
        images = np.concatenate([images, np.stack([load_image(picture, manifest.preprocess) for picture in pictures])])
    with torch.inference_mode():
        wanted = UnitEncoder(encoder).eval()(torch.from_numpy(images)).numpy()
    got = np.stack(list(prove_batches(graph, manifest, images=images).values()))
    worst, cosine = float(np.abs(got - wanted).max()), float((got * wanted).sum(-1).min())  # numpy's keep a NaN
    most, least = TOLERANCES[manifest.precision]
    if not (worst <= most and cosine >= least):
        raise ExportError(
            f"the {manifest.precision} graph differs from the network by {worst:.2g} (at most {most:g}), cosine {cosine:.6f} "
            f"(at least {least}); nothing was published"
        )
    return Parity(images=len(images), batch_sizes=BATCH_SIZES, max_abs_error=worst, min_cosine=min(cosine, 1.0))


def prove_batches(
    graph: Path, manifest: Manifest, sizes: Sequence[int] = BATCH_SIZES, *, images: NDArray[np.uint8] | None = None
) -> dict[int, NDArray[np.float32]]:
    """Run full batches of every size: each row must be the unit vector that the picture has alone.

    Returns: batch size -> vectors (N, D) of the images, which are the golden ones unless given.
    Raises: ExportError if ONNX Runtime refuses a size, or a row depends on its neighbours.
    """
    images = golden_images(manifest) if images is None else images
    try:
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types, none of them exported
        raise ExportError(f"{graph}: ONNX Runtime cannot load it ({reason(error)}); nothing was published") from error
    alone = _in_batches(session, manifest, images, 1)
    lengths = np.linalg.norm(alone, axis=1)
    if not np.abs(lengths - 1).max() <= UNIT_TOLERANCE:
        raise ExportError(f"{graph}: a vector's length is {_farthest(lengths):.6g}, wanted 1; nothing was published")
    found = {size: _in_batches(session, manifest, images, size) for size in sizes}
    for size, vectors in found.items():
        worst = float(np.linalg.norm(vectors - alone, axis=1).max())
        if not worst <= ROW_TOLERANCES[manifest.precision]:
            raise ExportError(
                f"{graph}: in a batch of {size}, a vector differs by {worst:.2g} from that of the picture alone; "
                "nothing was published"
            )
    return found


def _in_batches(session: ort.InferenceSession, manifest: Manifest, images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Vectors (N, D) by batches of just this size, the last one filled up from the beginning."""
    vectors = np.empty((len(images), manifest.embedding_dim), np.float32)
    for at in range(0, len(images), size):
        batch = images.take(range(at, at + size), axis=0, mode="wrap")
        try:
            (rows,) = session.run([manifest.output.name], {manifest.input.name: batch})
        except Exception as error:  # see above
            raise ExportError(f"the graph refuses a batch of {size} ({reason(error)}); nothing was published") from error
        if rows.shape != (size, manifest.embedding_dim):
            wanted = (size, manifest.embedding_dim)
            raise ExportError(f"the graph gives {rows.shape} for a batch of {size}, wanted {wanted}; nothing was published")
        vectors[at : at + size] = rows[: len(images) - at]
    return vectors


def _farthest(lengths: NDArray[np.float32]) -> float:
    return float(lengths[np.abs(lengths - 1).argmax()])  # argmax finds a NaN first
