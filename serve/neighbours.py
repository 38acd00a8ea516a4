"""Nearest neighbours by Euclidean distance: products in float32 screen, double precision decides what they leave open.

A product of matrices depends in its last bits on where a row stands in them, so equal vectors would rank by their place. Here a
decision that is closer than the product's error is taken again, pair by pair, and so is the same wherever the vectors stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_TIES = 1000
_BLOCK_ROWS = 256
_BLOCK_VALUES = 1 << 17
"""What stays in a core's cache; much larger arrays are slower by half."""
_UNIT_ROUNDOFF = 2.0**-24
_SPARE_ROUNDINGS = 8
"""For the norms, the sums and what callers round to float32."""


def pair_distances(
    left_ND: NDArray[np.float32], right_MD: NDArray[np.float32], left: NDArray[np.intp], right: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Squared distances (P,) of the pairs (left_ND[left[i]], right_MD[right[i]]), each from its own two vectors alone."""
    distances, block = np.empty(len(left)), pairs_at_once(left_ND.shape[1])
    for start in range(0, len(left), block):
        some = slice(start, start + block)
        apart = np.subtract(left_ND[left[some]], right_MD[right[some]], dtype=np.float64)
        distances[some] = np.einsum("nd,nd->n", apart, apart)
    return distances


def pairs_at_once(dim: int) -> int:
    """How many pairs of vectors of this size to compare at a time."""
    return max(1, _BLOCK_VALUES // dim)


def rounding(dim: int) -> float:
    """How far off float32 products of two vectors of length 1 may be.

    Rounding errors of D products add up like a random walk: about sqrt(D) roundoffs (Higham and Mary 2019). Measured: a tenth.
    """
    return (math.sqrt(dim) + _SPARE_ROUNDINGS) * _UNIT_ROUNDOFF


class Screen:
    """Squared distances in float32 from any rows to fixed points (N, D), and how far off they may be."""

    def __init__(self, points_ND: NDArray[np.float32], centre_D: NDArray[np.float32]) -> None:
        """`centre_D`: any point amid them; the error grows with the distance from it."""
        self.points, self._centre = points_ND, centre_D
        self._centred = points_ND - centre_D
        self._squares = np.einsum("nd,nd->n", self._centred, self._centred)
        self._reach = float(np.sqrt(self._squares.max(initial=0.0)))

    def tile(self, rows_RD: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Squared distances (R, N), and the error (R,) that none of a row's exceeds."""
        rows = rows_RD - self._centre
        squares = np.einsum("nd,nd->n", rows, rows)
        rows *= -2
        tile = rows @ self._centred.T
        tile += self._squares
        tile += squares[:, None]
        error = rounding(rows.shape[1]) * (np.sqrt(squares) + self._reach) ** 2
        return tile, error.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Neighbours of R rows, one list after the other: that of row i is at `starts[i]` to `starts[i + 1]`, nearest first."""

    starts: NDArray[np.intp]
    """(R + 1,)"""
    points: NDArray[np.intp]
    distances: NDArray[np.float64]
    """Squared."""
    farthest: NDArray[np.float32]
    """(R,): squared distance to the farthest of all points, to float32's precision."""

    def radius(self, k: int) -> NDArray[np.float64]:
        """(R,): squared distance of the k-th neighbour; infinite where there are fewer."""
        places = self.starts[:-1] + k - 1
        found = self.distances[np.minimum(places, len(self.distances) - 1)]
        return np.where(places < self.starts[1:], found, np.inf)

    def rows(self) -> NDArray[np.intp]:
        """(P,): to which row each entry belongs."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def nearest(rows_RD: NDArray[np.float32], screen: Screen, k: int) -> Neighbours:
    """The `k` points nearest to each row, and those as near as the k-th: where vectors stand decides nothing.

    Raises: ValueError where more than `MOST_TIES` per row are as near as the k-th.
    """
    blocks = list(_blocks(rows_RD, screen, k))
    counts, points, distances, farthest = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Neighbours(np.concatenate([[0], np.cumsum(counts)]), points, distances, farthest)


_Block = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64], NDArray[np.float32]]


def _blocks(rows_RD: NDArray[np.float32], screen: Screen, k: int) -> Iterator[_Block]:
    for start in range(0, len(rows_RD), _BLOCK_ROWS):
        rows = rows_RD[start : start + _BLOCK_ROWS]
        tile, error = screen.tile(rows)
        last = min(k, tile.shape[1]) - 1
        reach = np.partition(tile, last, axis=1)[:, last] + 2 * error
        candidates = tile <= reach[:, None]
        if candidates.sum() > len(rows) * (k + MOST_TIES):
            raise ValueError(
                f"rows from {start} on have over {MOST_TIES} points as near as their nearest {k}; "
                "is one vector there many times, or has the encoder collapsed? leave the copies out"
            )
        row, point = np.nonzero(candidates)
        distance = pair_distances(rows, screen.points, row, point)
        order = np.lexsort((distance, row))
        row, point, distance = row[order], point[order], distance[order]
        first = np.searchsorted(row, np.arange(len(rows)))
        near = distance <= distance[first + last][row]
        yield np.bincount(row[near], minlength=len(rows)), point[near], distance[near], np.maximum(tile.max(axis=1), 0)
