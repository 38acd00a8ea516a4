"""One probe joins a k-reciprocal graph: only the neighbourhoods that it changes are worked out again, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.neighbours import pair_distances
from serve.reciprocal.graph import Graph, List, averaging, extended, overlaps, weighted
from serve.reciprocal.pairs import Items, Keys, Pairs, Values, added_up, distinct, totals


class Joining:
    """Lets probes join a graph one at a time; the graph's last vector is the probe's place and is overwritten."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._probe = graph, graph.n - 1
        self._inverted, self._whose_closest = graph.averaged.transposed(), graph.closest.transposed()

    def overlaps(self, probe_D: NDArray[np.float32], row_G: NDArray[np.float32], error: float) -> tuple[Values, float]:
        """What the probe's weights have in common with those of each gallery item (G,), and its largest squared distance.

        `row_G`: squared distances, off by `error` at most.
        """
        graph, probe = self._graph, self._probe
        graph.vectors[probe] = probe_D
        close, distances = self._close(row_G, error)
        farthest = np.append(np.maximum(graph.farthest, row_G), row_G.max())
        weights = self._weights(close, distances, farthest, np.flatnonzero(row_G > graph.farthest))
        changed = distinct(weights.rows)
        arrival = _Arrival(graph.closest_lists, probe, close, distances)
        _, places = self._whose_closest.places(changed)
        others = distinct(arrival.joined, self._whose_closest.keys[places] % graph.n)
        closest = averaging(arrival.listed().rows_of(graph.closest, np.append(others, probe)))
        keys, values = self._terms(closest, weights, changed)
        own = keys // graph.n == probe
        mine = totals(keys[own] % graph.n, values[own], graph.n)
        common = self._common(mine)
        shared = ~own & (mine[keys % graph.n] > 0)
        theirs = added_up(graph.n, keys[shared], values[shared])
        least = np.minimum(theirs.values, mine[theirs.columns])
        common[others] = totals(theirs.rows, least, graph.n)[others]
        return common[:probe], float(farthest[probe])

    def _close(self, row_G: NDArray[np.float32], error: float) -> tuple[Items, Values]:
        """All that may be on the probe's list or have it on theirs, and their squared distances."""
        vectors, last = self._graph.vectors, min(self._graph.longest - 1, len(row_G)) - 1
        reach = np.maximum(np.partition(row_G, last)[last], self._graph.reach) + 2 * error
        close = np.flatnonzero(row_G <= reach)
        return close, pair_distances(vectors, vectors, np.full(len(close), self._probe), close)

    def _weights(self, close: Items, distances: Values, farthest: NDArray[np.float32], farther: Items) -> Pairs:
        """The weights of all rows that the probe changes."""
        graph = self._graph
        whole, half = (_Arrival(lists, self._probe, close, distances).mutual() for lists in (graph.lists, graph.half_lists))
        _, places = graph.mutual.places(half.touched())
        rows = distinct(whole.touched(), graph.mutual.keys[places] % graph.n, farther)
        mutual = whole.rows_of(graph.mutual, rows)
        half_mutual = half.rows_of(graph.half_mutual, distinct(mutual.columns))
        return weighted(self._apart(extended(mutual, half_mutual)), farthest)

    def _apart(self, keys: Keys) -> Pairs:
        """Squared distances: most are known."""
        known, places = self._graph.apart.find(keys)
        values = self._graph.apart.values[places]
        unknown = np.flatnonzero(~known)
        left, right = np.divmod(keys[unknown], self._graph.n)
        values[unknown] = pair_distances(self._graph.vectors, self._graph.vectors, left, right)
        return Pairs(self._graph.n, keys, values)

    def _terms(self, closest: Pairs, weights: Pairs, changed: Items) -> tuple[Keys, Values]:
        """Terms of the averages: weights that have changed, and those that have not."""
        new = np.isin(closest.columns, changed)
        parts = [closest.only(new).terms(weights), closest.only(~new).terms(self._graph.weights)]
        return np.concatenate([keys for keys, _ in parts]), np.concatenate([values for _, values in parts])

    def _common(self, mine: Values) -> Values:
        columns = np.flatnonzero(mine)
        return overlaps(columns, mine[columns], self._inverted)


class _Arrival:
    """What the probe changes in lists of one length."""

    def __init__(self, lists: List, probe: int, close: Items, distances: Values) -> None:
        """`close`: all that may be on the probe's list or have it on theirs."""
        self._n, self._probe = lists.pairs.n, probe
        own_radius = np.sort(distances)[min(lists.k - 2, len(close) - 1)] if lists.k > 1 else 0.0
        joins = distances <= lists.radius[close]
        self._own, self.joined = close[distances <= own_radius], close[joins]
        """The probe's list, without itself, and those whose list it joins."""
        radius = np.maximum(lists.inner[self.joined], distances[joins])
        owner, places = lists.pairs.places(self.joined)
        self._pushed_out = lists.pairs.keys[places][lists.pairs.values[places] > radius[owner]]

    def listed(self) -> _Change:
        """Of pairs (row, column): column is on the list of row."""
        return _Change(self._n, self._added(self._own, self.joined), self._pushed_out)

    def mutual(self) -> _Change:
        """Of pairs that are on each other's list."""
        both = np.intersect1d(self._own, self.joined)
        back = self._pushed_out % self._n * self._n + self._pushed_out // self._n
        return _Change(self._n, self._added(both, both), np.concatenate([self._pushed_out, back]))

    def _added(self, its: Items, whose: Items) -> Keys:
        return np.concatenate([whose * self._n + self._probe, self._probe * self._n + np.append(its, self._probe)])


@dataclass(frozen=True, eq=False)
class _Change:
    """Pairs that come into a set, and pairs that go."""

    n: int
    added: Keys
    gone: Keys

    def touched(self) -> Items:
        """Rows that change."""
        return distinct(self.added // self.n, self.gone // self.n)

    def rows_of(self, before: Pairs, rows: Items) -> Pairs:
        """`rows`, growing, of the set after the change."""
        _, places = before.places(rows)
        kept = np.setdiff1d(before.keys[places], self.gone, assume_unique=True)
        added = self.added[np.isin(self.added // self.n, rows)]
        return Pairs.of_set(self.n, distinct(kept, added))
