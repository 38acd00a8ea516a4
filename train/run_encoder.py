"""A finished run as an encoder, before any export: for `evaluate`, `fit-head` and `gallery add` straight after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from serve.encoder import Picture, prepare_batch
from train.checkpoint import load_encoder
from train.encoder import UnitEncoder


class RunEncoder:
    """`serve.encoder.Encoder` in torch. Its encoder_id is that of its fp32 export."""

    def __init__(self, run: Path, *, batch_size: int = 256) -> None:
        encoder, self.manifest = load_encoder(run)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = UnitEncoder(encoder).to(self._device).eval()
        self._batch_size = batch_size

    @property
    def encoder_id(self) -> str:
        """Who made the vectors."""
        return self.manifest.encoder_id

    @torch.inference_mode()
    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors float32 (N, D). Raises: ImageError."""
        vectors = np.empty((len(images), self.manifest.embedding_dim), np.float32)
        for start in range(0, len(images), self._batch_size):
            batch = prepare_batch(images[start : start + self._batch_size], self.manifest.preprocess)
            vectors[start : start + len(batch)] = self._model(torch.from_numpy(batch).to(self._device)).cpu().numpy()
        return vectors
