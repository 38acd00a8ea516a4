"""Encoders in torch, before any export: a finished run, and the two baselines it has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from serve.contract import Manifest
from serve.pictures import Picture, prepare_batch
from serve.samples import Sample
from serve.sources import read_batches
from train.checkpoint import load_encoder
from train.data import spread
from train.encoder import Encoder, UnitEncoder

_CALIBRATION_BATCH, _CALIBRATION_BATCHES = 64, 8


class TorchEncoder:
    """`serve.encoder.Encoder` in torch. A run's encoder_id is that of its fp32 export."""

    def __init__(self, encoder: Encoder, manifest: Manifest, *, batch_size: int = 256, unit: bool = True) -> None:
        """`unit` false: plain features, for what has to add them up before they are normalised."""
        self.manifest, self.encoder_id = manifest, manifest.encoder_id if unit else plain_id(manifest)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = UnitEncoder(encoder, unit=unit).to(self._device).eval()
        self._batch_size = batch_size

    @torch.inference_mode()
    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors float32 (N, D). Raises: ImageError."""
        vectors = np.empty((len(images), self.manifest.embedding_dim), np.float32)
        for start in range(0, len(images), self._batch_size):
            batch = prepare_batch(images[start : start + self._batch_size], self.manifest.preprocess)
            vectors[start : start + len(batch)] = self._model(torch.from_numpy(batch).to(self._device)).cpu().numpy()
        return vectors


def plain_id(manifest: Manifest) -> str:
    """Whose plain features those are: another encoder's than the unit vectors."""
    return f"{manifest.encoder_id}-plain"


def open_run(run: Path, *, unit: bool = True) -> TorchEncoder:
    """The encoder of a finished run. Raises: ContractError."""
    return TorchEncoder(*load_encoder(run), unit=unit)


def untrained(manifest: Manifest, samples: Sequence[Sample], seed: int = 0) -> TorchEncoder:
    """The baseline that has learned nothing: the run's architecture with fresh weights.

    Its batch norms have seen some of the pictures, because with their initial statistics it would be worse than it need be.
    """
    torch.manual_seed(seed)
    encoder = Encoder.from_facts(manifest.training)
    model = UnitEncoder(encoder).train()
    some = spread(samples, _CALIBRATION_BATCH * _CALIBRATION_BATCHES)
    pixels_NHWC = np.concatenate([pixels for _, pixels, _ in read_batches(some, manifest.preprocess)])
    with torch.inference_mode():
        for chunk in torch.from_numpy(pixels_NHWC).split(_CALIBRATION_BATCH):
            if len(chunk) > 1:  # of one, there is no variance
                model(chunk)
    return TorchEncoder(encoder, manifest)


class ColourHistogram:
    """The baseline without a network: square roots of the RGB histogram, so that cosine is Bhattacharyya's coefficient."""

    BINS = 8

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest.model_copy(update={"embedding_dim": self.BINS**3})
        self.encoder_id = "colour histogram"

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors float32 (N, 512)."""
        pixels = prepare_batch(images, self.manifest.preprocess)
        cells = (pixels.astype(np.int64) * self.BINS // 256) @ np.array([self.BINS**2, self.BINS, 1])
        counts = np.empty((len(cells), self.BINS**3))
        for row, picture in zip(counts, cells, strict=True):
            row[:] = np.bincount(picture.ravel(), minlength=self.BINS**3)
        return np.asarray(np.sqrt(counts / counts.sum(1, keepdims=True)), dtype=np.float32)
