"""What a query finds: the store's nearest joined with what is known of them, so that each hit is true when told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.filters import Where
from serve.item import Item
from serve.store import Found, Store


@dataclass(frozen=True)
class Hit(Item):
    """An item found; `score` is its cosine with the query, in [-1, 1]."""

    score: float


class Searcher:
    """Reads only. Safe from several threads, while this process and others write."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def best(self, query_D: NDArray[np.float32], count: int, where: Where, excluded: NDArray[np.int64]) -> list[Hit]:
        """The `count` most similar that pass, by falling score and growing id; fewer only if fewer pass."""
        while True:
            scores, ids = self._ranked(query_D, count, where, excluded)
            items = self._store.lookup(ids.tolist(), where)
            gone = [item_id for item_id in ids.tolist() if item_id not in items]
            if not gone:
                return [Hit(**vars(items[i]), score=score) for i, score in zip(ids.tolist(), scores.tolist(), strict=True)]
            excluded = np.union1d(excluded, gone)  # removed or re-labelled meanwhile: others deserve their places

    def within(
        self, query_D: NDArray[np.float32], threshold: float, where: Where, limit: int | None, excluded: NDArray[np.int64]
    ) -> list[Hit]:
        """All that pass with `threshold` <= score, at most `limit` of them, in the order of `best`."""
        most = len(self._store) if limit is None else limit
        count = min(64, most)
        while True:
            hits = self.best(query_D, count, where, excluded)
            if count >= most or len(hits) < count or hits[-1].score < threshold:
                return [hit for hit in hits if hit.score >= threshold]
            count = min(4 * count, most)

    def many(self, queries_QD: NDArray[np.float32], k: int, where: Where) -> Found:
        """Scores (Q, k) and ids (Q, k) of the most similar that pass; -inf and -1 where there are fewer."""
        scores, ids = self._nearest(queries_QD, k, where, np.empty(0, np.int64))
        if ids.shape[1] < k:
            missing = ((0, 0), (0, k - ids.shape[1]))
            scores, ids = np.pad(scores, missing), np.pad(ids, missing, constant_values=-1)
        scores[ids < 0] = -np.inf
        return scores, ids

    def _ranked(
        self, query_D: NDArray[np.float32], count: int, where: Where, excluded: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores (n,) and ids (n,), n <= `count`. Of equals at the cut, the first by id: an index takes any of them."""
        wanted = count + 1
        while True:
            scores, ids = (rows[0] for rows in self._nearest(query_D[None], wanted, where, excluded))
            scores, ids = scores[ids >= 0], ids[ids >= 0]
            if len(ids) < wanted or scores[-1] < scores[count - 1]:
                order = np.lexsort((ids, -scores))[:count]
                return scores[order], ids[order]
            wanted *= 2

    def _nearest(self, queries_QD: NDArray[np.float32], k: int, where: Where, excluded: NDArray[np.int64]) -> Found:
        scores, ids = self._store.nearest(queries_QD, k, where, excluded)
        return scores.clip(-1, 1), ids
