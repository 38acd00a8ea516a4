"""The k-reciprocal graph of vectors (Zhong et al. 2017): who is whose neighbour, and each one's weights over others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serve.neighbours import Neighbours, Screen, nearest, pair_distances
from serve.reciprocal.pairs import Keys, Pairs, Values, added_up, distinct, totals

_BLOCK_PAIRS = 1 << 15


class Graph:
    """The neighbourhoods of vectors; each is its own nearest. `vectors_ND` may have one row more, where a probe joins later."""

    def __init__(self, vectors_ND: NDArray[np.float32], count: int, k1: int, k2: int) -> None:
        """`count`: the vectors to build it of, the first. Raises: ValueError for too many equal vectors."""
        self.n, self.vectors = len(vectors_ND), vectors_ND
        self.screen = Screen(vectors_ND[:count], vectors_ND[:count].mean(axis=0))
        self.longest = max(k1 + 1, k2)
        near = nearest(vectors_ND[:count], self.screen, self.longest)
        self.farthest, self.reach = near.farthest, near.radius(self.longest)
        """(count,): squared distances of the farthest of all, and of the last on the longest list."""
        self.lists, self.half_lists, self.closest_lists = (List(near, k, self.n) for k in (k1 + 1, round(k1 / 2) + 1, k2))
        self.mutual, self.half_mutual = self.lists.mutual(), self.half_lists.mutual()
        self.closest = averaging(self.closest_lists.pairs)
        support = extended(self.mutual, self.half_mutual)
        self.apart = Pairs(self.n, support, pair_distances(vectors_ND, vectors_ND, support // self.n, support % self.n))
        """Squared distances of the pairs that have a weight."""
        self.weights = weighted(self.apart, self.farthest)
        self.averaged = _averaged(self.closest, self.weights)


class List:
    """The lists of the `k` nearest, with those as near as the last."""

    def __init__(self, near: Neighbours, k: int, n: int) -> None:
        self.k, self.radius, self.inner = k, near.radius(k), near.radius(max(k - 1, 1))
        """(N,): squared distances of the last on a list, and of the last but one."""
        rows = near.rows()
        on_it = near.distances <= self.radius[rows]
        keys = rows[on_it] * n + near.points[on_it]
        order = np.argsort(keys)
        self.pairs = Pairs(n, keys[order], near.distances[on_it][order])
        """With squared distances."""

    def mutual(self) -> Pairs:
        """The pairs that are on each other's list."""
        return self.pairs.only(self.pairs.find(self.pairs.columns * self.pairs.n + self.pairs.rows)[0])


def extended(mutual: Pairs, half_mutual: Pairs) -> Keys:
    """Each row's reciprocal items, and the half-sets of those among them of which it holds over two thirds."""
    owner, places = half_mutual.places(mutual.columns)
    keys = mutual.rows[owner] * mutual.n + half_mutual.keys[places] % mutual.n
    sizes = np.bincount(owner, minlength=len(mutual.keys))
    shared = np.bincount(owner[mutual.find(keys)[0]], minlength=len(mutual.keys))
    return distinct(mutual.keys, keys[(3 * shared > 2 * sizes)[owner]])


def weighted(apart: Pairs, farthest_N: NDArray[np.float32]) -> Pairs:
    """exp(-d / the row's largest d), each row divided by its sum."""
    rows = apart.rows
    scale = np.maximum(farthest_N[rows], np.finfo(np.float32).tiny)
    weights = np.exp(-apart.values / scale)
    return Pairs(apart.n, apart.keys, weights / totals(rows, weights, apart.n)[rows])


def averaging(closest: Pairs) -> Pairs:
    """The matrix that averages over each row's items."""
    rows = closest.rows
    return Pairs(closest.n, closest.keys, 1 / np.bincount(rows)[rows])


def _averaged(closest: Pairs, weights: Pairs) -> Pairs:
    """Block by block: the terms of the product are many times the pairs that are left."""
    cuts = np.unique(np.searchsorted(closest.rows, closest.rows[::_BLOCK_PAIRS]))
    blocks = [Pairs(closest.n, closest.keys[a:b], closest.values[a:b]) for a, b in zip(cuts, [*cuts[1:], None], strict=True)]
    parts = [added_up(closest.n, *block.terms(weights)) for block in blocks]
    return Pairs(closest.n, np.concatenate([part.keys for part in parts]), np.concatenate([part.values for part in parts]))


def overlaps(columns: Keys, values: Values, inverted: Pairs) -> Values:
    """(n,): for each item the sum of what its weights and these have in common. `inverted`: all items' weights, transposed."""
    owner, places = inverted.places(columns)
    least = np.minimum(values[owner], inverted.values[places])
    return totals(inverted.keys[places] % inverted.n, least, inverted.n)
