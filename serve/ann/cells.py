"""Rows by cells: each row belongs to the centre it is nearest to. Under a filter, only what it lets through is looked at.

Which cells are near is asked of those cells alone that hold a row of the filter, so it does not matter whether a filter takes
rows from everywhere or from a far corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import faiss
import numpy as np
from numpy.typing import NDArray

ROWS_PER_CENTRE = 39
"""What FAISS's k-means asks for at least."""


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a segment."""

    centres: NDArray[np.float32]
    """(C, D)"""
    of_rows: NDArray[np.int32]
    """The cell (N,) of each row."""

    def followed_by(self, of_rows: NDArray[np.int32]) -> Cells:
        """With more rows behind."""
        return Cells(self.centres, np.concatenate([self.of_rows, of_rows]))


@dataclass(frozen=True, eq=False)
class Pool:
    """The rows that a filter lets through."""

    rows: NDArray[np.int64]
    """By cell, if there are cells."""
    centres: NDArray[np.float32]
    """Those of the cells that hold any of the rows."""
    starts: NDArray[np.int64]
    """Where each cell's rows begin, and the end of the last."""

    @classmethod
    def of(cls, rows: NDArray[np.int64], cells: Cells | None) -> Self:
        """Rows in any order."""
        if cells is None:
            return cls(rows, np.empty((0, 0), np.float32), np.empty(0, np.int64))
        of_rows = cells.of_rows[rows]
        counts = np.bincount(of_rows, minlength=len(cells.centres))
        held = np.flatnonzero(counts)
        return cls(
            rows[np.argsort(of_rows, kind="stable")], cells.centres[held], np.concatenate([[0], np.cumsum(counts[held])])
        )

    def near(self, queries_QD: NDArray[np.float32], width: int) -> NDArray[np.int64]:
        """The rows (Q, M) in the `width` cells nearest to each query, filled up with -1."""
        cells = faiss.knn(queries_QD, self.centres, width, metric=faiss.METRIC_INNER_PRODUCT)[1]
        starts, counts = self.starts[cells], self.starts[cells + 1] - self.starts[cells]
        totals = counts.sum(axis=1)
        rows: NDArray[np.int64] = np.full((len(queries_QD), int(totals.max())), -1)
        rows[np.arange(rows.shape[1]) < totals[:, None]] = self.rows[_ranges(starts.ravel(), counts.ravel())]
        return rows


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... of each range, one range after the other."""
    ends = np.cumsum(counts)
    places: NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    return places


def find_centres(sample_ND: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Centres (C, D) by k-means on the sphere."""
    means = faiss.Kmeans(
        sample_ND.shape[1],
        count,
        niter=10,
        spherical=True,
        max_points_per_centroid=ROWS_PER_CENTRE,
        min_points_per_centroid=1,  # fewer is no reason to warn
    )
    means.train(sample_ND)
    return np.asarray(means.centroids)


def nearest_centres(vectors_ND: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int32]:
    """The cell (N,) of each vector."""
    found = faiss.knn(vectors_ND, centres, 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found[:, 0].astype(np.int32)
