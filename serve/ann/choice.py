"""Which index, and how hard it looks: measured with items held back, against exact results, under stated limits.

What is chosen is the knee of recall against latency, not all that the limits allow. Of kinds that are nearly as good as the
best, the smallest is taken: it fits the processor's caches the longest as the gallery grows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray

from serve.ann.cells import find_centres
from serve.ann.method import Faiss, Method, bytes_of, cells_for, efforts, fetches, keys_for, set_effort, trained
from serve.ann.segment import Segment
from serve.errors import GalleryError

K = 10
"""Recall is that of so many results."""
_TIMED_QUERIES = 50
_SATURATED = 0.001
"""Looking harder is worth measuring as long as it finds so much more."""
_NEARLY = 1.25
"""Kinds whose cost is within this factor of the least compete by size."""


@dataclass(frozen=True, kw_only=True)
class IndexLimits:
    """What a gallery's index has to keep to. Raises: GalleryError."""

    recall: float = 0.95
    """Least share of the ten nearest that is found."""
    latency_ms: float = 5.0
    """Longest median search of one query on one core. Search stays exact as long as it takes no longer."""
    memory_mb: float | None = None
    """Largest index beside the vectors themselves, which stay on disk. None: any size."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1 or not self.latency_ms > 0 or not (self.memory_mb is None or self.memory_mb > 0):
            raise GalleryError(f"{self}: wanted recall above 0 and at most 1, latency_ms and memory_mb above 0")


@dataclass(frozen=True)
class Measured:
    """One method and what it does."""

    method: Method
    recall: float
    latency_ms: float
    bytes: int
    build_s: float = 0.0

    def fits(self, limits: IndexLimits) -> bool:
        """Whether it is small enough."""
        return limits.memory_mb is None or self.bytes <= limits.memory_mb * 1e6

    def keeps(self, limits: IndexLimits) -> bool:
        """Whether it keeps all limits."""
        return self.recall >= limits.recall and self.latency_ms <= limits.latency_ms and self.fits(limits)

    def cost(self, limits: IndexLimits) -> float:
        """Least at the knee: time x misses, with the misses that the limit forgives counted once more.

        So half the misses are worth up to twice the time, but the fewer they are, the less.
        """
        return self.latency_ms * (1 - self.recall + max(1 - limits.recall, 0.001))


@dataclass(frozen=True)
class Work:
    """How to go about something long."""

    threads: int
    proceed: Callable[[], None]
    """Called now and then; raises if it is to be given up."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Rows, and items held back that ask for their nearest."""

    rows: Segment
    queries: NDArray[np.float32]
    truth: NDArray[np.int64]
    """The rows (Q, K) that are right."""
    work: Work

    @classmethod
    def of(cls, vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], work: Work) -> Trial:
        """Finds out what is right by exact search."""
        rows = Segment.of(np.arange(len(vectors_ND)), vectors_ND)
        faiss.omp_set_num_threads(work.threads)
        return cls(rows, queries_QD, rows.search(queries_QD, K)[1], work)

    def measured(self, index: Faiss, method: Method) -> Measured:
        """What one method does."""
        set_effort(index, method.effort)
        latency_ms = median_ms(replace(self.rows, ann=index, method=method), self.queries[:_TIMED_QUERIES])
        faiss.omp_set_num_threads(self.work.threads)
        candidates = index.search(self.queries, K * method.fetch)[1]  # scored exactly, what is right comes out on top
        recall = float((self.truth[:, :, None] == candidates[:, None, :]).any(axis=2).mean())
        return Measured(method, recall, latency_ms, bytes_of(index))

    def sweep(self, key: str, index: Faiss, limits: IndexLimits) -> tuple[Measured, ...]:
        """What an index of the rows does, looking harder and harder until that finds no more or takes too long."""
        found: list[Measured] = []
        for effort in efforts(key):
            self.work.proceed()
            former = found[-1].recall if found else 0.0
            found += [self.measured(index, Method(key, effort, fetch)) for fetch in fetches(key)]
            if found[-1].recall - former < _SATURATED or found[-1].latency_ms > limits.latency_ms:
                break
        return undominated(found)


def median_ms(rows: Segment, queries_QD: NDArray[np.float32]) -> float:
    """Median time of a search for one query on one core."""
    faiss.omp_set_num_threads(1)
    took = []
    for query in queries_QD:
        started = time.thread_time()  # of this thread: what others do must not sway the choice
        rows.search(query[None], K)
        took.append(time.thread_time() - started)
    return 1e3 * float(np.median(took)) if took else 0.0


def undominated(measured: Iterable[Measured]) -> tuple[Measured, ...]:
    """Those that no other beats in both recall and latency, by growing latency."""
    best: list[Measured] = []
    for one in sorted(measured, key=lambda one: (one.latency_ms, -one.recall)):
        if not best or one.recall > best[-1].recall:
            best.append(one)
    return tuple(best)


def knee(measured: Sequence[Measured], limits: IndexLimits) -> Measured:
    """The best bargain within the limits; if none keeps them, the highest recall of those that fit."""
    within = [one for one in measured if one.keeps(limits)]
    if within:
        return min(within, key=lambda one: one.cost(limits))
    return max(measured, key=lambda one: (one.fits(limits), one.recall))


def try_kinds(trial: Trial, count: int, limits: IndexLimits) -> list[tuple[Measured, ...]]:
    """Measure every kind of index on a sample of `count` rows, in cells as large as all will have; the most promising first."""
    vectors_ND, tried = trial.rows.vectors, []
    cells = max(1, cells_for(count) * len(vectors_ND) // count)
    faiss.omp_set_num_threads(trial.work.threads)
    centres = find_centres(vectors_ND, cells)
    for key in keys_for(cells, vectors_ND.shape[1]):
        faiss.omp_set_num_threads(trial.work.threads)
        started = time.perf_counter()
        index = trained(key, centres, vectors_ND)
        index.add(vectors_ND)
        build_s, scale = time.perf_counter() - started, count / len(vectors_ND)
        swept = trial.sweep(key, index, limits)
        tried.append(tuple(replace(one, bytes=round(one.bytes * scale), build_s=build_s * scale) for one in swept))
    return by_promise(tried, limits)


def by_promise(tried: Iterable[tuple[Measured, ...]], limits: IndexLimits) -> list[tuple[Measured, ...]]:
    """Kinds that keep the limits, those nearly as good as the best by size, then the others by cost; last, what keeps none."""
    knees = [(knee(swept, limits), swept) for swept in tried]
    costs = [one.cost(limits) for one, _ in knees if one.keeps(limits)]

    def rank(pair: tuple[Measured, tuple[Measured, ...]]) -> tuple[float, ...]:
        one = pair[0]
        if not one.keeps(limits):
            return 2, -one.recall
        return (0, one.bytes) if one.cost(limits) <= _NEARLY * min(costs) else (1, one.cost(limits))

    return [swept for _, swept in sorted(knees, key=rank)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured, and what was made of it."""

    exact_ms: float
    """Exact search for one query among all rows."""
    sample_rows: int = 0
    sample: tuple[tuple[Measured, ...], ...] = ()
    """Kinds of index on a sample of the rows, the most promising first; bytes and build time as for all rows."""
    tuned: tuple[tuple[Measured, ...], ...] = ()
    """Kinds of index that were built of all rows."""
    chosen: Measured | None = None
    """None: exact search."""
    checked: float | None = None
    """Recall for the items that came last, before they were put in."""
