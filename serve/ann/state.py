"""What an index holds after one transaction of the catalog. A state never changes: the next one takes its place whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from serve.ann.base import Base
from serve.ann.segment import Found, Segment, ranked
from serve.catalog import Catalog, Change

_TAIL_ROWS = 1024
"""Newest rows that are scored one by one; more go to the rows in cells."""
MANY_ROWS, _WAITING_SHARE = 10_000, 0.05
"""Rows beside the base, as a number or as a share of it, from which on a new one is due."""
_DEAD_SHARE = 0.2
"""Dead rows of the base from which on it is built anew."""


@dataclass(frozen=True, eq=False)
class State:
    """A base on disk, and in memory what came after it: rows in the base's cells, and the newest."""

    at: Change
    base: Base | None
    mapped: Segment
    listed: Segment
    tail: Segment

    @classmethod
    def of(cls, base: Base | None, dim: int) -> Self:
        """What is on disk."""
        empty = Segment.of(np.empty(0, np.int64), np.empty((0, dim), np.float32))
        if base is None:
            return cls(Change(0, ""), None, empty, empty, empty)
        return cls(base.header.change, base, base.segment, empty, empty)

    def __len__(self) -> int:
        return sum(segment.live for segment in self.segments)

    @property
    def segments(self) -> tuple[Segment, Segment, Segment]:
        """All rows."""
        return self.mapped, self.listed, self.tail

    @property
    def waiting(self) -> int:
        """Rows that are not in the base yet."""
        return self.listed.live + self.tail.live

    @property
    def buried(self) -> int:
        """Rows that are dead here, and alive in the base on disk."""
        return 0 if self.base is None else self.base.segment.live - self.mapped.live

    @property
    def worn(self) -> bool:
        """Whether the base is to be built anew, from the catalog."""
        if self.base is None:
            return self.waiting > MANY_ROWS
        return self.base.header.outgrown or self.mapped.dead > max(MANY_ROWS, _DEAD_SHARE * len(self.mapped))

    @property
    def due(self) -> bool:
        """Whether it is time to write a base."""
        return self.worn or self.waiting > max(MANY_ROWS, _WAITING_SHARE * len(self.mapped))

    def caught_up(self, catalog: Catalog) -> State:
        """The state after the newest transaction."""
        last = catalog.last_change()
        if last == self.at:
            return self
        gone = catalog.removed(self.at.seq, last.seq)
        blocks = list(catalog.vectors(self.at.seq, last.seq))
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in blocks)])
        state = self.without(np.concatenate([gone, ids]))  # a vector that was set anew takes the place of the old one
        if len(ids):
            state = replace(state, tail=state.tail.followed_by(ids, np.concatenate([block for _, block in blocks])))
        return replace(state, at=last)

    def ids(self) -> NDArray[np.int64]:
        """Of all items."""
        return np.concatenate([segment.ids[segment.alive] for segment in self.segments])

    def lookup(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Which of these items are here (n,), and their vectors (n, D)."""
        there, vectors_ND = np.zeros(len(ids), bool), np.zeros((len(ids), self.tail.vectors.shape[1]), np.float32)
        for segment in self.segments:
            rows = segment.rows_of(ids)
            here = np.isin(ids, segment.ids[rows])
            there |= here
            vectors_ND[here] = segment.vectors[rows]
        return there, vectors_ND

    def without(self, ids: NDArray[np.int64]) -> State:
        """The same with these items dead."""
        mapped, listed, tail = (segment.without(ids) for segment in self.segments)
        return replace(self, mapped=mapped, listed=listed, tail=tail)

    def settled(self) -> State:
        """The same, with the newest rows put into cells if they are many. Takes some milliseconds."""
        if len(self.tail) <= _TAIL_ROWS:
            return self
        listed = self.listed.listed_beside(self.mapped, *self.tail.living())
        return replace(self, listed=listed, tail=State.of(None, self.tail.vectors.shape[1]).tail)

    def search(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        allowed: NDArray[np.int64] | None = None,
        excluded: NDArray[np.int64] | None = None,
    ) -> Found:
        """Scores and ids (Q, n) of the nearest, equal scores by growing id; -inf and -1 where there are fewer."""
        excluded = np.empty(0, np.int64) if excluded is None else excluded
        found = [segment.search(queries_QD, k + len(excluded), allowed) for segment in self.segments if segment.live]
        if not found:
            return np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64)
        scores, ids = found[0] if len(found) == 1 else (np.hstack(parts) for parts in zip(*found, strict=True))
        if len(excluded):
            out = np.isin(ids, excluded)
            scores[out], ids[out] = -np.inf, -1
        return ranked(scores, ids, k)
