"""Duplicates in a gallery: the same file, the same pixels, or near ones by the similarity of their vectors.

Equal files have equal vectors under one encoder: reading the files of near items alone finds all equal ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.dedup.files import Files, Kind
from serve.dedup.groups import Group, groups_of
from serve.dedup.neighbours import Neighbours
from serve.dedup.stars import Near, members, stars
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Unreadable

_SAME = 0.999
"""Equal pictures are at least so similar: a vector's last bits change from batch to batch, and with how a JPEG is reduced."""
_NEARER = 10


@dataclass(frozen=True)
class Duplicates:
    """What was found among `items` items, the largest groups first."""

    groups: tuple[Group, ...]
    items: int
    threshold: float
    chosen: bool
    """Whether the threshold is `typical_threshold`, and not one that was asked for."""
    encoder_id: str
    searched: str
    """What the nearest were found with, in words."""
    recall: str
    """What was measured of it; empty where none is missed."""
    unreadable: tuple[Unreadable, ...]
    """Files of near items that cannot be read: these are grouped by their vectors alone."""

    def count(self, kind: Kind | None = None) -> int:
        """How many may go, of one kind or of all."""
        return sum(kind in (None, copy.kind) for group in self.groups for copy in group.others)


def find_duplicates(
    gallery: Gallery, threshold: float | None = None, where: str | None = None, *, exact: bool = False
) -> Duplicates:
    """Group the duplicates among items that pass `where`. Changes nothing.

    `threshold`: the similarity from which on two are near, `typical_threshold` if None; 1 leaves equal files, equal pixels and
    what the encoder takes for equal. `exact` misses none where the index might, with all vectors in memory and N^2 work.
    Raises: GalleryError.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise GalleryError(f"duplicates: threshold is {threshold}, wanted above 0 and at most 1")
    neighbours = Neighbours.of(gallery, where, exact=exact)
    ids, nearest = neighbours.ids, neighbours.nearest()
    near = typical_threshold(nearest) if threshold is None else threshold
    files, alike = Files.none_of(len(ids)), nearest >= _SAME
    candidates = np.flatnonzero(nearest >= min(near, _SAME))
    files.read(gallery, ids, candidates, decoded=alike)

    def around(row: int) -> Near:
        others, scores = neighbours.around(row, min(near, _SAME))
        counts = (scores >= near) | files.equal(row, others)
        return others[counts], scores[counts]

    best_first = files.best_first(candidates, neighbours.labelled)
    with tqdm(best_first, desc="grouping", unit="img", delay=1, leave=False, dynamic_ncols=True) as bar:
        kept, similarity = stars(bar, around, len(ids))
    late = np.setdiff1d(np.flatnonzero(kept >= 0), candidates)  # an index may find for many results what it missed for few
    files.read(gallery, ids, late, decoded=alike)
    info = gallery.info()
    return Duplicates(
        groups=groups_of(gallery, ids, files, similarity, members(kept)),
        items=len(ids),
        threshold=near,
        chosen=threshold is None,
        encoder_id=gallery.encoder_id,
        searched="exact" if exact else info.index,
        recall="" if exact else info.index_report,
        unreadable=tuple(files.unreadable.values()),
    )


def typical_threshold(nearest: NDArray[np.float32]) -> float:
    """The similarity of two that are ten times nearer than the median item's nearest (N,); distance is 1 - similarity."""
    return 1 - (1 - float(np.median(nearest.clip(-1, 1)))) / _NEARER if len(nearest) else 1.0
