"""At which ranks a query's right answers stand: from its distances, or for whole sets straight from vectors, in blocks.

A rank is 1 + the number of others that are as near or nearer, so nothing is sorted but the right answers themselves, and equal
distances count against them: the order of the gallery never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.neighbours import pair_distances, pairs_at_once, rounding
from serve.samples import JUNK_IDENTITY

Labels = Sequence[str] | Sequence[int]
_CHUNK_GALLERY, _BLOCK_QUERIES = 10_240, 256
_THREADS = 2
"""While one sorts, the other multiplies, on all cores."""


class Relevance:
    """Which gallery items are right for which query, under Market-1501's rules (Zheng et al. 2015 and its MATLAB code).

    Junk is not ranked at all: identity "-1" for all queries, a query's own identity on its own camera for that query.
    """

    def __init__(
        self, query_ids: Labels, gallery_ids: Labels, query_cameras: Labels | None = None, gallery_cameras: Labels | None = None
    ) -> None:
        """Without cameras nothing is junk but identity "-1". Raises: ValueError for lengths that do not fit."""
        query_id, gallery_id = _codes(query_ids, gallery_ids)
        self._query_camera, camera = _camera_codes(query_cameras, gallery_cameras, len(query_id), len(gallery_id))
        self.size = len(gallery_id)
        self.counted = np.flatnonzero([str(identity) != JUNK_IDENTITY for identity in gallery_ids])
        """Gallery items that are no junk, in order; everything below counts in places of this list."""
        self._camera, identity = camera[self.counted], gallery_id[self.counted]
        self._by_identity = np.argsort(identity, kind="stable")
        grouped = identity[self._by_identity]
        self._first, self._end = (np.searchsorted(grouped, query_id, side) for side in ("left", "right"))

    @property
    def n_queries(self) -> int:
        """How many queries there are."""
        return len(self._first)

    def same(self, query: int) -> NDArray[np.intp]:
        """Places of the query's identity, growing: right ones and junk."""
        return self._by_identity[self._first[query] : self._end[query]]

    def right(self, query: int) -> NDArray[np.intp]:
        """Places of the query's identity that another camera took, growing."""
        same = self.same(query)
        right: NDArray[np.intp] = same[self._camera[same] != self._query_camera[query]]
        return right


def ranks_of_row(row_G: NDArray[np.floating], relevance: Relevance, query: int) -> NDArray[np.int64]:
    """Ranks (n,) of the right items of one query, from 1, growing. Distances (G,): smaller is nearer. Raises: ValueError."""
    if row_G.shape != (relevance.size,) or np.isnan(row_G).any():
        raise ValueError(f"distances of query {query} are {row_G.shape} or hold NaN, wanted {(relevance.size,)} numbers")
    row = row_G[relevance.counted]
    near = np.sort(row[relevance.right(query)])
    wrong = np.ones(len(row), bool)
    wrong[relevance.same(query)] = False
    rivals = row[wrong & (row <= near[-1])] if len(near) else row[:0]
    first_beaten = np.searchsorted(near, rivals)
    ahead = np.cumsum(np.bincount(first_beaten, minlength=len(near)))
    return np.asarray(ahead + np.arange(1, len(near) + 1), np.int64)


def ranks_of_vectors(
    queries_QD: NDArray[np.floating], gallery_GD: NDArray[np.floating], relevance: Relevance
) -> list[NDArray[np.int64]]:
    """`ranks_of_row` of every query by cosine distance, in chunks of the gallery, which may be a mapped file.

    Memory: the queries and a few chunks. Raises: ValueError for vectors that do not fit or have no direction.
    """
    _check_shapes(queries_QD, gallery_GD, relevance)
    count = _Count(_unit(queries_QD, np.arange(len(queries_QD)), "query"), gallery_GD, relevance)
    starts = range(0, max(len(relevance.counted), 1), _CHUNK_GALLERY)
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead = reduce(np.add, pool.map(count.of_chunk, starts))
    return [its + np.arange(1, len(its) + 1) for its in count.by_query(ahead)]


class _Count:
    """For each right item of each query: how many wrong ones are as near or nearer.

    Distances are squared, less the 2 that they have in common: -2 x y, as vectors are of length 1.
    """

    def __init__(self, unit_QD: NDArray[np.float32], gallery_GD: NDArray[np.floating], relevance: Relevance) -> None:
        self._queries, self._gallery, self._relevance = unit_QD, gallery_GD, relevance
        right = [relevance.counted[relevance.right(query)] for query in range(len(unit_QD))]
        counts = np.array([len(items) for items in right])
        self._ends, query = np.cumsum(counts), np.repeat(np.arange(len(right)), counts)
        near = _pair_distances(unit_QD, gallery_GD, query, np.concatenate(right))
        self._near = near[np.lexsort((near, query))]
        self._error = np.float32(2 * rounding(unit_QD.shape[1]))

    def by_query(self, values_P: NDArray[Any]) -> list[NDArray[Any]]:
        """What belongs to all right items, query by query."""
        return np.split(values_P, self._ends[:-1])

    def of_chunk(self, start: int) -> NDArray[np.int64]:
        """Of the wrong items in one chunk of the gallery, which begins at place `start`: (P,)."""
        points = _unit(self._gallery, self._relevance.counted[start : start + _CHUNK_GALLERY], "gallery")
        near, counts = self.by_query(self._near), []
        for first in range(0, len(self._queries), _BLOCK_QUERIES):
            tile = (-2 * self._queries[first : first + _BLOCK_QUERIES]) @ points.T
            for query, row in enumerate(tile, first):
                same = self._relevance.same(query) - start
                row[same[(same >= 0) & (same < len(row))]] = np.inf
            counts += [self._nearer(row, near[query], query, points) for query, row in enumerate(tile, first)]
        return np.concatenate(counts)

    def _nearer(
        self, row_C: NDArray[np.float32], near_N: NDArray[np.float64], query: int, points_CD: NDArray[np.float32]
    ) -> NDArray[np.intp]:
        """(N,); what float32 leaves open is worked out again."""
        around = (near_N - 2).astype(np.float32)
        low, high = around - self._error, around + self._error
        rivals = np.sort(row_C[row_C <= high.max(initial=-np.inf)])  # nothing farther than the last right one is asked for
        nearer, perhaps = np.searchsorted(rivals, low), np.searchsorted(rivals, high, side="right")
        unclear = np.flatnonzero(perhaps > nearer)
        exact = np.full(len(row_C) if len(unclear) else 0, np.nan)
        for i in unclear:
            close = np.flatnonzero((row_C >= low[i]) & (row_C <= high[i]))
            new = close[np.isnan(exact[close])]
            exact[new] = pair_distances(self._queries, points_CD, np.full(len(new), query), new)
            nearer[i] += np.count_nonzero(exact[close] <= near_N[i])
        return nearer


def _pair_distances(
    queries_QD: NDArray[np.float32], gallery_GD: NDArray[np.floating], query: NDArray[np.intp], item: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Squared distances (P,) of unit vectors; only a few of the gallery's are in memory at once."""

    at_once = pairs_at_once(queries_QD.shape[1])

    def block(start: int) -> NDArray[np.float64]:
        some = slice(start, start + at_once)
        points = _unit(gallery_GD, item[some], "gallery")
        return pair_distances(queries_QD, points, query[some], np.arange(len(points)))

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.concatenate([np.empty(0), *pool.map(block, range(0, len(item), at_once))])


def _unit(vectors_ND: NDArray[np.floating], rows: NDArray[np.intp], what: str) -> NDArray[np.float32]:
    """Some rows, copied and L2-normalised, float32; each from itself alone. Raises: ValueError."""
    vectors = np.ascontiguousarray(vectors_ND[rows], np.float32)
    squares = np.einsum("nd,nd->n", vectors, vectors)
    bad = np.flatnonzero(~(np.isfinite(squares) & (squares > 0)))
    if len(bad):
        raise ValueError(
            f"{what} vector {rows[bad[0]]} is zero, infinite or not a number, so it has no direction; leave it out"
        )
    vectors /= np.sqrt(squares)[:, None]
    return vectors


def _check_shapes(queries_QD: NDArray[np.floating], gallery_GD: NDArray[np.floating], relevance: Relevance) -> None:
    wanted = (relevance.n_queries, relevance.size)
    flat = queries_QD.ndim != 2 or gallery_GD.ndim != 2
    if flat or queries_QD.shape[1] != gallery_GD.shape[1] or (len(queries_QD), len(gallery_GD)) != wanted:
        raise ValueError(
            f"vectors are {queries_QD.shape} and {gallery_GD.shape}, wanted {wanted[0]} queries and {wanted[1]} gallery items"
            " of one size; was another encoder used?"
        )


def _codes(queries: Labels, gallery: Labels) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """One numbering for both sides: two numberings would break the same-camera rule."""
    _, codes = np.unique([str(value) for value in (*queries, *gallery)], return_inverse=True)
    return codes[: len(queries)], codes[len(queries) :]


def _camera_codes(
    queries: Labels | None, gallery: Labels | None, n_queries: int, n_gallery: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    if queries is None and gallery is None:
        return np.full(n_queries, -1), np.full(n_gallery, -2)  # never the same camera
    if queries is None or gallery is None or len(queries) != n_queries or len(gallery) != n_gallery:
        raise ValueError(f"give one camera for each of {n_queries} queries and {n_gallery} gallery items, or none at all")
    return _codes(queries, gallery)
