"""Sparse matrices and sets of pairs as sorted keys `row * n + column`, so that numpy's set functions do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.int64]
Keys = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of `n` items, row by row, each with a value (of a set: 1)."""

    n: int
    keys: Keys
    """(P,): growing."""
    values: Values

    @classmethod
    def of_set(cls, n: int, keys: Keys) -> Pairs:
        """From growing keys."""
        return cls(n, keys, np.ones(len(keys)))

    @property
    def rows(self) -> Items:
        """(P,)"""
        return self.keys // self.n

    @property
    def columns(self) -> Items:
        """(P,)"""
        return self.keys % self.n

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        return np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=self.n))])

    def places(self, rows: Items) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Of all pairs in `rows`: to which of `rows` each belongs, and its place in `keys`."""
        starts = self._starts[rows]
        counts = self._starts[rows + 1] - starts
        owner = np.repeat(np.arange(len(rows)), counts)
        return owner, np.arange(len(owner)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)

    def find(self, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        """Which of `keys` are there, and where."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.keys[places] == keys, places

    def only(self, wanted: NDArray[np.bool_]) -> Pairs:
        """Those pairs that a mask (P,) says."""
        return Pairs(self.n, self.keys[wanted], self.values[wanted])

    def transposed(self) -> Pairs:
        """(column, row) of each (row, column)."""
        keys = self.columns * self.n + self.rows
        order = np.argsort(keys)
        return Pairs(self.n, keys[order], self.values[order])

    def terms(self, right: Pairs) -> tuple[Keys, Values]:
        """The matrix product with `right`, before equal keys are added up."""
        owner, places = right.places(self.columns)
        return self.rows[owner] * self.n + right.keys[places] % self.n, self.values[owner] * right.values[places]


def added_up(n: int, keys: Keys, values: Values) -> Pairs:
    """The values of equal keys added up."""
    unique, inverse = np.unique(keys, return_inverse=True)
    return Pairs(n, unique, totals(inverse, values, len(unique)))


def distinct(*keys: Keys) -> Keys:
    """Growing, each once. np.unique hashes integers, which takes several times as long."""
    ordered = np.sort(np.concatenate(keys))
    return ordered[np.diff(ordered, prepend=-1) > 0]


def totals(group: NDArray[np.intp], values: Values, count: int) -> Values:
    """(count,): the sum of each group's values."""
    return np.asarray(np.bincount(group, values, count), np.float64)
