"""Where a head's examples come from: labelled pictures, or a gallery that has their vectors already."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

from serve.bulk import embed_samples
from serve.encoder import Encoder
from serve.errors import TrainingError
from serve.gallery import Gallery
from serve.heads.fit import HOW_TO_LABEL, Examples
from serve.item import sample_of
from serve.samples import Sample
from serve.sources import open_source


def labelled_pictures(encoder: Encoder, source: str) -> Examples:
    """All labelled pictures of a source. Raises: TrainingError, SourceError."""
    labelled = [sample for sample in open_source(source).train if sample.label is not None]
    if not labelled:
        raise TrainingError(f"{source}: no labels to learn from; {HOW_TO_LABEL}")
    vectors, samples, _ = embed_samples(encoder, labelled, "embedding")
    return Examples(vectors, [str(sample.label) for sample in samples], kin_of(samples))


def labelled_items(gallery: Gallery, where: str | None = None) -> Examples:
    """The gallery's labelled items; no picture is read. Raises: TrainingError, GalleryError."""
    blocks: list[NDArray[np.float32]] = []
    labelled: list[Sample] = []
    for items, vectors in gallery.rows(where):
        known = [place for place, item in enumerate(items) if item.label is not None]
        blocks.append(vectors[known])
        labelled += [sample_of(items[place]) for place in known]
    if not labelled:
        among = f" among {where!r}" if where else ""
        raise TrainingError(f"{gallery.address}: no item{among} has a label; give some: simclr gallery relabel")
    return Examples(np.concatenate(blocks), [str(sample.label) for sample in labelled], kin_of(labelled))


def kin_of(samples: Iterable[Sample]) -> list[Hashable]:
    """What pictures of one animal, or else of one track, share: such pictures are alike beyond their class."""
    return [s.identity or (s.source if s.track is None else (s.camera, s.track)) for s in samples]
