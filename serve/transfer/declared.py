"""Vectors that came without the encoder that made them: who vouches for them, and what cannot be done."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.contract import Manifest, Preprocess, TensorSpec
from serve.errors import GalleryError
from serve.pictures import Picture


class Declared:
    """Stands for an encoder that is not at hand: a gallery of its vectors can be made, and searched by vector alone."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @property
    def encoder_id(self) -> str:
        """Who made the vectors."""
        return self.manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Raises: GalleryError, always."""
        raise GalleryError(
            f"{self.manifest.name}: {len(images)} pictures, and no encoder to embed them with; search by vector, or name it"
        )


def foreign_manifest(name: str, dim: int) -> Manifest:
    """The manifest of vectors that are nobody's here: the same NAME and dimension give the same encoder_id, others another."""
    return Manifest.create(
        name=f"foreign vectors: {name}",
        embedding_dim=dim,
        input=TensorSpec(name="none", shape=(1, 1, 3), dtype="uint8"),
        output=TensorSpec(name="vector", shape=(dim,), dtype="float32"),
        preprocess=Preprocess(height_px=1, width_px=1, resize="stretch", crop=1.0, resample="bicubic", jpeg="full"),
        metric="cosine",
        precision="fp32",
        weights_sha256=hashlib.sha256(f"foreign vectors: {name}".encode()).hexdigest(),
        parity=None,
        retrieval=None,
        training={"foreign_vectors": name},
    )
