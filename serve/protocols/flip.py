"""Vectors of a picture and of its mirror image, put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.encoder import Encoder
from serve.pictures import Picture, prepare_batch
from serve.protocols.names import Flip


class Mirrored:
    """An encoder that sees every picture in a mirror, after it has been resized."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self.manifest = encoder, encoder.manifest
        self.encoder_id = f"{encoder.encoder_id}-mirrored"

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """As the encoder does. Raises: ImageError."""
        pixels = prepare_batch(images, self.manifest.preprocess)
        return self._encoder.embed(list(np.ascontiguousarray(pixels[:, :, ::-1])))


def combine(vectors_ND: NDArray[np.float32], mirrored_ND: NDArray[np.float32], flip: Flip) -> NDArray[np.float32]:
    """Both added up, into the first. `sum`: as they are; `sysu-official`: unit(v) + m, as test_sysu_combine.py does.

    That script normalises inside its loop over the two views, so that a mirrored vector of length 30 outweighs the first. Of
    unit vectors both give the same direction.
    """
    if flip == "sysu-official":
        vectors_ND /= np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))[:, None]
    vectors_ND += mirrored_ND
    return vectors_ND
