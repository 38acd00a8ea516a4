"""Where a head's examples come from: labelled pictures, or a gallery that has their vectors already."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve.bulk import embed_samples
from serve.encoder import Encoder
from serve.errors import TrainingError
from serve.gallery import Gallery
from serve.heads.fit import HOW_TO_LABEL
from serve.sources import open_source


def labelled_pictures(encoder: Encoder, source: str) -> tuple[NDArray[np.float32], list[str]]:
    """Vectors (N, D) and classes of all labelled pictures of a source. Raises: TrainingError, SourceError."""
    labelled = [sample for sample in open_source(source).train if sample.label is not None]
    if not labelled:
        raise TrainingError(f"{source}: no labels to learn from; {HOW_TO_LABEL}")
    vectors, samples, _ = embed_samples(encoder, labelled, "embedding")
    return vectors, [str(sample.label) for sample in samples]


def labelled_items(gallery: Gallery, where: str | None = None) -> tuple[NDArray[np.float32], list[str]]:
    """Vectors (N, D) and labels of the gallery's labelled items; no picture is read. Raises: TrainingError, GalleryError."""
    blocks: list[NDArray[np.float32]] = []
    labels: list[str] = []
    for items, vectors in gallery.rows(where):
        known = [place for place, item in enumerate(items) if item.label is not None]
        blocks.append(vectors[known])
        labels += [str(items[place].label) for place in known]
    if not labels:
        among = f" among {where!r}" if where else ""
        raise TrainingError(f"{gallery.address}: no item{among} has a label; give some: simclr gallery relabel")
    return np.concatenate(blocks), labels
