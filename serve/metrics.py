"""Retrieval metrics under Market-1501's rules: CMC, mAP (both definitions), mINP, MRR, with confidence intervals and by camera.

For each query, gallery items of the same identity and the same camera, and items of identity "-1", are junk: taken out before
ranking. Items of the same identity and another camera are right, all others wrong: `serve.ranking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.ranking import Labels, Relevance, ranks_of_row, ranks_of_vectors

MAX_RANK = 50
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class RankingReport:
    """Averages over the queries that have a match, and the figures of each query; `without_match` names those that have none.

    A benchmark whose rules count those as 0 multiplies each average by (n_queries - n_without_match) / n_queries.
    """

    cmc: NDArray[np.float64]
    """(max_rank,): share of queries whose first match is at rank 1, 2, ...; stays level beyond the gallery's size."""
    map_step: float
    """Mean of i / r_i over the matches of a query, where r_i is the rank of its i-th match; then the mean over queries."""
    map_trapezoid: float
    """Market-1501's official mAP: precision averaged over both sides of each step. Never above `map_step`."""
    minp: float
    """Mean share of matches among all items down to the last match."""
    mrr: float
    """Mean of 1 / rank of the first match."""
    n_queries: int
    without_match: NDArray[np.intp]
    """Numbers of the queries that have no match, growing."""
    average_precision_step: NDArray[np.float64]
    """(Q,), NaN for queries without a match; likewise the next two."""
    average_precision_trapezoid: NDArray[np.float64]
    inverse_negative_penalty: NDArray[np.float64]
    """(Q,): its mean is `minp`."""
    first_match_rank: NDArray[np.int64]
    """(Q,), from 1; 0 for queries without a match."""

    @property
    def n_without_match(self) -> int:
        """How many queries have no match."""
        return len(self.without_match)


def evaluate_ranking(
    distances_QG: NDArray[np.floating],
    query_ids: Labels,
    gallery_ids: Labels,
    query_cameras: Labels | None = None,
    gallery_cameras: Labels | None = None,
    *,
    max_rank: int = MAX_RANK,
) -> RankingReport:
    """Score the rankings that distances (Q, G) give; without cameras nothing is junk but identity "-1".

    Equal distances count against us: a match ranks behind every wrong item that is just as near. So the order of the gallery
    never matters, and an encoder that maps all pictures to one point scores lowest, not by luck.
    Raises: ValueError for NaN, sizes that do not fit, or no query with a match.
    """
    if distances_QG.ndim != 2 or distances_QG.shape != (len(query_ids), len(gallery_ids)):
        raise ValueError(f"distances are {distances_QG.shape}, wanted {(len(query_ids), len(gallery_ids))}: queries x gallery")
    relevance = Relevance(query_ids, gallery_ids, query_cameras, gallery_cameras)
    return _report([ranks_of_row(row, relevance, query) for query, row in enumerate(distances_QG)], relevance, max_rank)


def evaluate_vectors(
    queries_QD: NDArray[np.floating],
    gallery_GD: NDArray[np.floating],
    query_ids: Labels,
    gallery_ids: Labels,
    query_cameras: Labels | None = None,
    gallery_cameras: Labels | None = None,
    *,
    max_rank: int = MAX_RANK,
) -> RankingReport:
    """`evaluate_ranking` by the cosine distance of vectors of any length, in blocks: never all Q x G distances.

    The gallery may be a mapped file, also of float16; it is read once, and memory does not grow with it.
    Raises: ValueError as there, and for a vector without direction.
    """
    relevance = Relevance(query_ids, gallery_ids, query_cameras, gallery_cameras)
    return _report(ranks_of_vectors(queries_QD, gallery_GD, relevance), relevance, max_rank)


def _report(ranks: list[NDArray[np.int64]], relevance: Relevance, max_rank: int) -> RankingReport:
    if not any(len(of_query) for of_query in ranks):
        raise ValueError(_why_no_match(relevance))
    first = np.array([of_query[0] if len(of_query) else 0 for of_query in ranks], np.int64)
    step, trapezoid = _average_precisions(ranks)
    penalty = np.array([len(of_query) / of_query[-1] if len(of_query) else np.nan for of_query in ranks])
    return RankingReport(
        cmc=cmc(first, max_rank),
        map_step=float(np.nanmean(step)),
        map_trapezoid=float(np.nanmean(trapezoid)),
        minp=float(np.nanmean(penalty)),
        mrr=float(np.mean(1 / first[first > 0])),
        n_queries=len(ranks),
        without_match=np.flatnonzero(first == 0),
        average_precision_step=step,
        average_precision_trapezoid=trapezoid,
        inverse_negative_penalty=penalty,
        first_match_rank=first,
    )


def cmc(first_match_rank: NDArray[np.int64], max_rank: int = MAX_RANK) -> NDArray[np.float64]:
    """(max_rank,): share of the queries with a match that have it at rank 1, 2, ... or before."""
    found_at = first_match_rank[first_match_rank > 0]
    return np.array([(found_at <= k).mean() for k in range(1, max_rank + 1)])


def _why_no_match(relevance: Relevance) -> str:
    if any(len(relevance.same(query)) for query in range(relevance.n_queries)):
        return (
            f"none of {relevance.n_queries} queries has a match on another camera; are all of a single camera? "
            "then score without cameras, where every other picture of the identity is a match"
        )
    return (
        f"none of {relevance.n_queries} queries has a match: no identity of theirs is in the gallery; check the names of both"
    )


def _average_precisions(ranks: list[NDArray[np.int64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Step and trapezoid, (Q,) each. The latter is Market-1501's compute_AP.m: precision before and at each match, averaged."""
    counts = np.array([len(of_query) for of_query in ranks])
    query = np.repeat(np.arange(len(ranks)), counts)
    rank, found = np.concatenate(ranks), np.arange(1, len(query) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
    at = found / rank
    before = np.where(rank == 1, 1.0, (found - 1) / np.maximum(rank - 1, 1))
    matches = np.where(counts > 0, counts, np.nan)
    step, trapezoid = (np.bincount(query, each, len(ranks)) / matches for each in (at, (before + at) / 2))
    return step, trapezoid


def _figures(report: RankingReport) -> dict[str, NDArray[np.float64]]:
    """Per query (Q,), NaN without a match; the mean of each is the report's figure of that name."""
    first = np.where(report.first_match_rank > 0, report.first_match_rank, np.nan)
    within = {f"rank{k}": np.where(np.isnan(first), np.nan, first <= k) for k in (1, 5, 10)}
    return within | {
        "map_step": report.average_precision_step,
        "map_trapezoid": report.average_precision_trapezoid,
        "minp": report.inverse_negative_penalty,
        "mrr": 1 / first,
    }


def confidence_intervals(
    report: RankingReport, query_ids: Labels, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap percentiles of rank1, rank5, rank10, map_step, map_trapezoid, minp and mrr.

    Identities are drawn, not queries: those of one identity are no independent evidence. Raises: ValueError.
    """
    if len(query_ids) != report.n_queries or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"got {len(query_ids)} identities, level {level}, {resamples} resamples; "
            f"wanted {report.n_queries}, a level between 0 and 1, at least 1"
        )
    matched = report.first_match_rank > 0
    names, identity = np.unique([str(name) for name in np.asarray(query_ids)[matched]], return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    weights = drawn[:, identity].sum(axis=1)
    intervals = {}
    for name, values in _figures(report).items():
        of_identity = np.bincount(identity, values[matched], len(names))
        low, high = np.quantile(drawn @ of_identity / weights, [(1 - level) / 2, (1 + level) / 2])
        intervals[name] = (float(low), float(high))
    return intervals


@dataclass(frozen=True)
class CameraRow:
    """The figures of one camera's queries, as shares; NaN where none has a match."""

    camera: str
    n_queries: int
    n_without_match: int
    rank1: float
    map_step: float
    map_trapezoid: float


def by_camera(report: RankingReport, query_cameras: Sequence[str] | Sequence[int]) -> list[CameraRow]:
    """A table of the cameras that took the queries, sorted by name. Raises: ValueError unless there is one per query."""
    if len(query_cameras) != report.n_queries:
        raise ValueError(f"got {len(query_cameras)} cameras for {report.n_queries} queries; give one for each")
    of_query, figures = np.array([str(camera) for camera in query_cameras]), _figures(report)
    return [_camera_row(str(camera), of_query == camera, figures) for camera in np.unique(of_query)]


def _camera_row(camera: str, its: NDArray[np.bool_], figures: dict[str, NDArray[np.float64]]) -> CameraRow:
    matched = its & ~np.isnan(figures["mrr"])

    def mean(name: str) -> float:
        return float(figures[name][matched].mean()) if matched.any() else float("nan")

    lost = int(its.sum() - matched.sum())
    return CameraRow(camera, int(its.sum()), lost, mean("rank1"), mean("map_step"), mean("map_trapezoid"))
