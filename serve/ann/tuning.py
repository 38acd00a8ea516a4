"""The index of a base: its kind chosen on a sample, built of all rows, tuned with items held back, checked as it grows."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray

from serve.ann.cells import ROWS_PER_CENTRE, Cells, find_centres
from serve.ann.choice import IndexLimits, Measured, Report, Trial, Work, by_promise, knee, try_kinds
from serve.ann.method import Faiss, cells_for, cells_of, keys_for, trained

HELD_ROWS = 300
"""Items that ask for their nearest before they are put in themselves."""
_SAMPLE_ROWS, _NEIGHBOURHOODS = 30_000, 30
_BLOCK_ROWS = 8192
_FINALISTS = 2
"""So many kinds of index are built of all rows, for a sample does not tell how they fare beyond the processor's caches."""
_CHECKED_ROWS = 200


@dataclass(frozen=True, eq=False)
class Built:
    """An index of all rows, the centres of its cells, and what it does."""

    index: Faiss
    centres: NDArray[np.float32]
    measured: tuple[Measured, ...]


def build_best(
    vectors_ND: NDArray[np.float32], limits: IndexLimits, work: Work, exact_ms: float
) -> tuple[Faiss, Cells, Report]:
    """The index of these rows that measuring finds best. The last `HELD_ROWS` are what it is measured with."""
    rows_ND, queries_QD = vectors_ND[:-HELD_ROWS], vectors_ND[-HELD_ROWS:]
    few = Trial.of(*_dense_sample(rows_ND, queries_QD), work)
    sample = try_kinds(few, len(vectors_ND), limits)
    trial, tried = Trial.of(rows_ND, queries_QD, work), dict[tuple[Measured, ...], Built]()
    for swept in sample[:_FINALISTS]:
        built = _build(swept[0].method.key, trial, limits)
        tried[built.measured] = built
    best = tried[by_promise(tried, limits)[0]]
    add(best.index, queries_QD, work)
    report = Report(
        exact_ms=exact_ms,
        sample_rows=len(few.rows),
        sample=tuple(sample),
        tuned=tuple(tried),
        chosen=knee(best.measured, limits),
    )
    return best.index, cells_of(best.index, best.centres, vectors_ND), report


def _build(kind: str, trial: Trial, limits: IndexLimits) -> Built:
    """An index of all rows of a trial, of the kind of one that was tried on a sample."""
    rows_ND, started = trial.rows.vectors, time.perf_counter()
    cells = cells_for(len(rows_ND))
    key = next(key for key in keys_for(cells, rows_ND.shape[1]) if key.split(",")[-1] == kind.split(",")[-1])
    faiss.omp_set_num_threads(trial.work.threads)
    centres = find_centres(_some(rows_ND, ROWS_PER_CENTRE * cells), cells)
    index = trained(key, centres, _some(rows_ND, _SAMPLE_ROWS))
    add(index, rows_ND, trial.work)
    build_s = time.perf_counter() - started
    return Built(index, centres, tuple(replace(one, build_s=build_s) for one in trial.sweep(key, index, limits)))


def check(
    index: Faiss, report: Report, rows_ND: NDArray[np.float32], new_ND: NDArray[np.float32], limits: IndexLimits, work: Work
) -> Report:
    """What an index of `rows_ND` does for items it does not hold yet; it looks harder from now on where that is too little."""
    assert report.chosen is not None
    trial = Trial.of(rows_ND, _some(new_ND, _CHECKED_ROWS), work)
    now = trial.measured(index, report.chosen.method)
    if now.recall < limits.recall:
        now = knee([now, *trial.sweep(report.chosen.method.key, index, limits)], limits)
    return replace(report, chosen=replace(now, build_s=report.chosen.build_s), checked=now.recall)


def add(index: Faiss, vectors_ND: NDArray[np.float32], work: Work) -> None:
    """Add rows, with pauses to be asked to stop."""
    faiss.omp_set_num_threads(work.threads)
    for start in range(0, len(vectors_ND), _BLOCK_ROWS):
        work.proceed()
        index.add(vectors_ND[start : start + _BLOCK_ROWS])


def _dense_sample(
    rows_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Some rows, and items that ask: a few neighbourhoods with all that is in them. Rows drawn one by one would lie apart."""
    if len(rows_ND) <= _SAMPLE_ROWS:
        return rows_ND, queries_QD
    faiss.omp_set_num_threads(1)
    size, inner = _SAMPLE_ROWS // _NEIGHBOURHOODS, _SAMPLE_ROWS // _NEIGHBOURHOODS // 10
    near = faiss.knn(_some(rows_ND, _NEIGHBOURHOODS), rows_ND, size, metric=faiss.METRIC_INNER_PRODUCT)[1]
    asking = np.unique(near[:, : inner : inner // 10])
    return rows_ND[np.setdiff1d(near, asking)], rows_ND[asking]


def _some(vectors_ND: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """At most `count` rows, drawn at random, in order."""
    if len(vectors_ND) <= count:
        return vectors_ND
    return vectors_ND[np.sort(np.random.default_rng(0).choice(len(vectors_ND), count, replace=False))]
