"""Rows of an index that never change: ids, vectors, and what finds the nearest of them. Searching takes no lock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from serve.ann.cells import Cells, Pool, nearest_centres
from serve.ann.method import Faiss, Method, lists_beside, rescored

Found: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores (Q, n) and rows or ids (Q, n)."""

_BLOCK_ROWS = 4096
_BRUTE_ROWS = 20_000
"""So few rows that a filter lets through are all scored, which takes about a millisecond and misses none."""
_CELLS, _FURTHER, _SETTLED = 6, 4, 0.02
"""Under a filter: cells to begin with, how much further to look then, and the share of new results that ends it."""
_MOST_SCORES = 1 << 22
"""At once, for the sake of memory."""
_REMEMBERED_POOLS = 8


@dataclass(frozen=True, eq=False)
class Segment:
    """Made by `Segment.of`. An id may stand in several rows: the last one counts, those before it are dead."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    method: Method
    ann: Faiss | None
    """Set to the effort of `method`. None: search is exact."""
    cells: Cells | None
    alive: NDArray[np.bool_]
    """Which rows may be found."""
    live: int
    """How many they are."""
    order: NDArray[np.int64] = field(repr=False)
    """Rows by growing id."""
    _pools: dict[int, tuple[NDArray[np.generic], Pool]] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def of(
        cls,
        ids: NDArray[np.int64],
        vectors_ND: NDArray[np.float32],
        method: Method | None = None,
        ann: Faiss | None = None,
        cells: Cells | None = None,
    ) -> Self:
        """Rows (N,) and (N, D); an id below 0 marks a dead row."""
        alive = ids >= 0
        order = np.argsort(ids, kind="stable")
        return cls(ids, vectors_ND, method or Method(), ann, cells, alive, int(np.count_nonzero(alive)), order)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dead(self) -> int:
        """How many rows may not be found any more."""
        return len(self.ids) - self.live

    def rows_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The live rows of those `ids` that are here."""
        if not len(self.ids):
            return np.empty(0, np.int64)
        rows = self.order[np.searchsorted(self.ids, ids, side="right", sorter=self.order) - 1]
        here: NDArray[np.int64] = rows[(self.ids[rows] == ids) & self.alive[rows]]
        return here

    @cached_property
    def _finder(self) -> Faiss:
        return rescored(self.ann, self.vectors, self.method.fetch)

    def living(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and vectors of the live rows."""
        return self.ids[self.alive], self.vectors[self.alive]

    def without(self, ids: NDArray[np.int64]) -> Self:
        """The same with the rows of `ids` dead."""
        rows = self.rows_of(ids)
        if not len(rows):
            return self
        alive = self.alive.copy()  # who searches just now goes on with the old one
        alive[rows] = False
        return replace(self, alive=alive, live=int(np.count_nonzero(alive)))

    def followed_by(self, ids: NDArray[np.int64], vectors_ND: NDArray[np.float32]) -> Segment:
        """The live rows with more behind them, searched exactly."""
        old_ids, old_ND = self.living()
        return Segment.of(np.concatenate([old_ids, ids]), np.concatenate([old_ND, vectors_ND]))

    def listed_beside(self, base: Segment, ids: NDArray[np.int64], vectors_ND: NDArray[np.float32]) -> Segment:
        """This with more rows behind it, in the cells of `base`."""
        if base.cells is None:
            return self.followed_by(ids, vectors_ND)
        lists: Faiss = lists_beside(base.ann, base.cells.centres) if self.ann is None else faiss.clone_index(self.ann)
        old = self.cells or Cells(base.cells.centres, np.empty(0, np.int32))
        lists.add(vectors_ND)
        joined = Segment.of(
            np.concatenate([self.ids, ids]),
            np.concatenate([self.vectors, vectors_ND]),
            Method("IVF", lists.nprobe),
            lists,
            old.followed_by(nearest_centres(vectors_ND, old.centres)),
        )
        return replace(joined, alive=np.concatenate([self.alive, np.ones(len(ids), bool)]), live=self.live + len(ids))

    def pool(self, allowed: NDArray[np.int64] | None = None) -> Pool:
        """The live rows, of `allowed` ids if given; remembered, unless somebody might write into that array."""
        key: NDArray[np.generic] = self.alive if allowed is None else allowed
        known = self._pools.get(id(key))
        if known is not None and known[0] is key:
            return known[1]
        pool = Pool.of(np.flatnonzero(self.alive) if allowed is None else self.rows_of(allowed), self.cells)
        if allowed is None or not allowed.flags.writeable:
            if len(self._pools) == _REMEMBERED_POOLS:
                self._pools.clear()
            self._pools[id(key)] = key, pool
        return pool

    def search(self, queries_QD: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None) -> Found:
        """Scores and ids of the `k` nearest in any order, among those `allowed` if given; fewer columns if there are fewer."""
        pool = None if allowed is None else self.pool(allowed)
        k = min(k, self.live if pool is None else len(pool.rows))
        if k == 0:
            return np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64)
        scores, rows = self._anywhere(queries_QD, k) if pool is None else self._among(queries_QD, k, pool)
        return scores, self.ids[rows]

    def _anywhere(self, queries_QD: NDArray[np.float32], k: int) -> Found:
        count = min(k + min(k, self.dead), len(self.ids))
        if self.ann is None:
            rows = faiss.knn(queries_QD, self.vectors, count, metric=faiss.METRIC_INNER_PRODUCT)[1]
            scores = self._scores(queries_QD, rows)  # many queries at once are scored by BLAS, which rounds otherwise
        elif 8 * count * self.method.fetch > len(self.ids):
            return self._among(queries_QD, k, self.pool())
        else:
            scores, rows = self._finder.search(queries_QD, count)
        if self.dead:
            gone = ~self.alive[rows]
            scores[gone], rows[gone] = -np.inf, -1
            scores, rows = top(scores, rows, k)
        short = rows[:, -1] < 0 if not self.dead else (rows < 0).any(axis=1)
        if short.any():  # FAISS looked at too little, or too little of that is alive
            scores[short], rows[short] = self._among(queries_QD[short], k, self.pool())
        return scores, rows

    def _among(self, queries_QD: NDArray[np.float32], k: int, pool: Pool) -> Found:
        if self.cells is None or len(pool.rows) <= max(_BRUTE_ROWS, 16 * k):
            return self._exactly(queries_QD, k, pool)
        sparser = len(self.ids) / len(pool.rows)  # the fewer there are, the farther away are the nearest
        width = round(_CELLS * sparser**0.5)
        scores, rows = self._in_cells(queries_QD, k, pool, width)
        todo = np.arange(len(queries_QD))
        while len(todo):
            width *= _FURTHER
            if _FURTHER * width > len(pool.centres):
                scores[todo], rows[todo] = self._exactly(queries_QD[todo], k, pool)
                break
            former = scores[todo]
            scores[todo], rows[todo] = self._in_cells(queries_QD[todo], k, pool, width)
            worst = scores[todo].min(axis=1, keepdims=True)
            todo = todo[((former < worst).mean(axis=1) > _SETTLED) | (worst[:, 0] == -np.inf)]
        return scores, rows

    def _in_cells(self, queries_QD: NDArray[np.float32], k: int, pool: Pool, width: int) -> Found:
        """All rows of `pool` scored that lie in the `width` nearest cells; filled up with -1."""
        step = max(1, _MOST_SCORES * len(pool.centres) // (len(pool.rows) * width))
        if len(queries_QD) > step:
            halves = [self._in_cells(half, k, pool, width) for half in np.array_split(queries_QD, 2)]
            return np.concatenate([half[0] for half in halves]), np.concatenate([half[1] for half in halves])
        candidates = pool.near(queries_QD, min(width, len(pool.centres)))
        scores, rows = top(self._scores(queries_QD, candidates), candidates, k)
        missing = ((0, 0), (0, k - rows.shape[1]))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)

    def _exactly(self, queries_QD: NDArray[np.float32], k: int, pool: Pool) -> Found:
        """All rows of `pool` scored."""
        if len(queries_QD) == 1:
            return top(self._scores(queries_QD, pool.rows[None]), pool.rows[None], k)
        found = np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64)
        for start in range(0, len(pool.rows), _BLOCK_ROWS):
            rows = pool.rows[start : start + _BLOCK_ROWS]
            scores, places = faiss.knn(queries_QD, self.vectors[rows], min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
            found = top(np.hstack([found[0], scores]), np.hstack([found[1], rows[places]]), k)
        return self._scores(queries_QD, found[1]), found[1]  # to the last bit as everywhere else

    def _scores(self, queries_QD: NDArray[np.float32], rows_QN: NDArray[np.int64]) -> NDArray[np.float32]:
        """The exact scores (Q, N) of each query's rows; -inf for row -1."""
        scores = np.full(rows_QN.shape, -np.inf, np.float32)
        pointers = [faiss.swig_ptr(array) for array in (scores, queries_QD, self.vectors, np.ascontiguousarray(rows_QN))]
        faiss.fvec_inner_products_by_idx(*pointers, queries_QD.shape[1], *rows_QN.shape)  # type: ignore[attr-defined]
        return scores


def top(scores_QN: NDArray[np.float32], ids_QN: NDArray[np.int64], k: int) -> Found:
    """The `k` best columns of each line, in any order; all of them if there are fewer."""
    if k >= scores_QN.shape[1]:
        return scores_QN, ids_QN
    lines, columns = np.arange(len(scores_QN))[:, None], np.argpartition(-scores_QN, k - 1, axis=1)[:, :k]
    return scores_QN[lines, columns], ids_QN[lines, columns]


def ranked(scores_QN: NDArray[np.float32], ids_QN: NDArray[np.int64], k: int) -> Found:
    """The `k` best columns of each line by falling score, equal ones by growing id; all of them if there are fewer."""
    scores_QN, ids_QN = top(scores_QN, ids_QN, k)
    if (scores_QN[:, 1:] < scores_QN[:, :-1]).all():
        return scores_QN, ids_QN
    lines, columns = np.arange(len(scores_QN))[:, None], np.lexsort((ids_QN, -scores_QN), axis=1)
    return scores_QN[lines, columns], ids_QN[lines, columns]
