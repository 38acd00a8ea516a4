"""Each item's nearest others, in one pass over a gallery: through its index, or exactly.

Shapes: N items, K neighbours, Q queries, D dimensions. An item goes by its row, its place among the growing ids.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.ann.segment import Found, Segment, ranked
from serve.errors import GalleryError
from serve.gallery import Gallery

Search: TypeAlias = Callable[[NDArray[np.float32], int], Found]
"""Queries (Q, D), k -> scores (Q, n), falling, and ids (Q, n); n is k, or N if that is less and nothing is approximate."""
_NEIGHBOURS = 10
"""Looked up for every item, itself among them: the recall of an index is measured for so many."""
_FURTHER = 8


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Made by `Neighbours.of`: 130 bytes an item."""

    ids: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    """(N,), whose class or identity is known."""
    scores: NDArray[np.float32]
    """(N, K), falling."""
    rows: NDArray[np.int64]
    """(N, K), the item itself among them; -1 for what came meanwhile, or nothing."""
    _gallery: Gallery
    _search: Search

    @classmethod
    def of(cls, gallery: Gallery, where: str | None, *, exact: bool) -> Self:
        """Look up the nearest of all that pass. `exact` holds all vectors in memory. Raises: GalleryError."""
        search: Search = partial(_exactly, _held(gallery, where)) if exact else partial(gallery.search_many, where=where)
        ids, labelled = list[int](), list[bool]()
        scores, found = list[NDArray[np.float32]](), list[NDArray[np.int64]]()
        with tqdm(total=gallery.count(where), desc="comparing", unit="img", delay=1, leave=False, dynamic_ncols=True) as bar:
            for items, vectors_ND in gallery.rows(where):
                ids += [item.id for item in items]
                labelled += [item.label is not None or item.identity is not None for item in items]
                some_scores, some_ids = search(vectors_ND, _NEIGHBOURS)
                scores.append(some_scores)
                found.append(some_ids)
                bar.update(len(items))
        if not ids:
            scores, found = [np.empty((0, 1), np.float32)], [np.empty((0, 1), np.int64)]
        growing = np.array(ids, np.int64)
        rows = _rows(growing, np.concatenate(found))
        return cls(growing, np.array(labelled, bool), np.concatenate(scores), rows, gallery, search)

    def nearest(self) -> NDArray[np.float32]:
        """Each item's similarity (N,) to its nearest other, seen from either side; -inf where it has none."""
        others = (self.rows >= 0) & (self.rows != np.arange(len(self.ids))[:, None])
        best: NDArray[np.float32] = np.where(others, self.scores, -np.inf).max(axis=1).astype(np.float32)
        np.maximum.at(best, self.rows[others], self.scores[others])
        return best

    def around(self, row: int, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows (n,) and similarities (n,), falling, of all others that are `threshold` or more similar, however many."""
        scores, rows = self.scores[row], self.rows[row]
        with suppress(GalleryError):  # it was removed meanwhile, or Milvus finds no more at once
            while scores[-1] >= threshold and len(rows) < len(self.ids):
                vector_D = self._gallery.vector(int(self.ids[row]))
                found = self._search(vector_D[None], min(_FURTHER * len(rows), len(self.ids)))
                scores, rows = found[0][0], _rows(self.ids, found[1][0])
        near = (scores >= threshold) & (rows >= 0) & (rows != row)
        return rows[near], scores[near]


def _held(gallery: Gallery, where: str | None) -> Segment:
    """All vectors that pass, in memory."""
    blocks = [([item.id for item in items], vectors_ND) for items, vectors_ND in gallery.rows(where)]
    vectors_ND = np.concatenate([vectors for _, vectors in blocks]) if blocks else np.empty((0, 1), np.float32)
    return Segment.of(np.array([item_id for ids, _ in blocks for item_id in ids], np.int64), vectors_ND)


def _exactly(held: Segment, queries_QD: NDArray[np.float32], k: int) -> Found:
    return ranked(*held.search(queries_QD, k), k)


def _rows(ids: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the ids that were found stand among the growing `ids` (N,); -1 for others."""
    rows = np.searchsorted(ids, found).clip(max=len(ids) - 1)
    return np.where(ids[rows] == found, rows, -1)
