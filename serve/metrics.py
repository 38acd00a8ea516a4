"""Retrieval metrics under Market-1501's rules: CMC, mAP (both definitions), mINP, MRR.

For each query, gallery items of the same identity and the same camera, and items of identity "-1", are junk: taken out before
ranking. Items of the same identity and another camera are good, all others bad. Source: Zheng et al. 2015 and its MATLAB code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.sources import JUNK_IDENTITY

MAX_RANK = 50


@dataclass(frozen=True, eq=False)
class RankingReport:
    """Averages over the queries that have a match; `n_without_match` says how many have none.

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
    n_without_match: int
    average_precision_step: NDArray[np.float64]
    """(Q,), NaN for queries without a match; likewise the next."""
    average_precision_trapezoid: NDArray[np.float64]
    first_match_rank: NDArray[np.int64]
    """(Q,), from 1; 0 for queries without a match."""


def evaluate_ranking(
    distances_QG: NDArray[np.floating],
    query_ids: Sequence[str] | Sequence[int],
    gallery_ids: Sequence[str] | Sequence[int],
    query_cameras: Sequence[str] | Sequence[int] | None = None,
    gallery_cameras: Sequence[str] | Sequence[int] | None = None,
    *,
    max_rank: int = MAX_RANK,
) -> RankingReport:
    """Score the rankings that distances (Q, G) give; without cameras nothing is junk but identity "-1".

    Equal distances count against us: a match ranks behind every bad item that is just as near. So the order of the gallery
    never matters, and an encoder that maps all pictures to one point scores lowest, not by luck.
    Raises: ValueError for NaN, sizes that do not fit, or no query with a match.
    """
    if distances_QG.ndim != 2 or distances_QG.shape != (len(query_ids), len(gallery_ids)):
        raise ValueError(f"distances are {distances_QG.shape}, wanted {(len(query_ids), len(gallery_ids))}: queries x gallery")
    return evaluate_rows(distances_QG, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank=max_rank)


def evaluate_rows(
    rows: Iterable[NDArray[np.floating]],
    query_ids: Sequence[str] | Sequence[int],
    gallery_ids: Sequence[str] | Sequence[int],
    query_cameras: Sequence[str] | Sequence[int] | None = None,
    gallery_cameras: Sequence[str] | Sequence[int] | None = None,
    *,
    max_rank: int = MAX_RANK,
) -> RankingReport:
    """`evaluate_ranking` for distances that come one query (G,) at a time, so that Q x G need not fit into memory."""
    query_id, gallery_id = _codes(query_ids, gallery_ids)
    query_camera, gallery_camera = _camera_codes(query_cameras, gallery_cameras, len(query_id), len(gallery_id))
    counts = np.array([str(identity) != JUNK_IDENTITY for identity in gallery_ids], bool)
    ranks: list[NDArray[np.int64]] = []
    for row, identity, camera in zip(rows, query_id, query_camera, strict=True):
        if row.shape != gallery_id.shape or np.isnan(row).any():
            raise ValueError(f"distances of query {len(ranks)} are {row.shape} or hold NaN, wanted {gallery_id.shape} numbers")
        same = gallery_id == identity
        ranks.append(_match_ranks(row[same & counts & (gallery_camera != camera)], row[~same & counts]))
    return _report(ranks, max_rank)


def _match_ranks(good: NDArray[np.floating], bad: NDArray[np.floating]) -> NDArray[np.int64]:
    """Ranks (n,) of the good items, from 1, growing: their own order, plus the bad ones that are as near or nearer."""
    near = np.sort(good)
    rivals = bad[bad <= near[-1]] if len(near) else bad[:0]
    first_beaten = np.searchsorted(near, rivals, side="left")
    ahead = np.cumsum(np.bincount(first_beaten, minlength=len(near)))
    return (ahead + np.arange(1, len(near) + 1)).astype(np.int64)


def _report(ranks: list[NDArray[np.int64]], max_rank: int) -> RankingReport:
    matched = [r for r in ranks if len(r)]
    if not matched:
        raise ValueError(
            f"none of {len(ranks)} queries has a match in the gallery; are all of a single camera? then leave the cameras out"
        )
    first = np.array([r[0] if len(r) else 0 for r in ranks], np.int64)
    step = np.array([_ap_step(r) if len(r) else np.nan for r in ranks])
    trapezoid = np.array([_ap_trapezoid(r) if len(r) else np.nan for r in ranks])
    found_at = first[first > 0]
    return RankingReport(
        cmc=np.array([(found_at <= k).mean() for k in range(1, max_rank + 1)]),
        map_step=float(np.nanmean(step)),
        map_trapezoid=float(np.nanmean(trapezoid)),
        minp=float(np.mean([len(r) / r[-1] for r in matched])),
        mrr=float(np.mean(1 / found_at)),
        n_queries=len(ranks),
        n_without_match=len(ranks) - len(matched),
        average_precision_step=step,
        average_precision_trapezoid=trapezoid,
        first_match_rank=first,
    )


def _ap_step(ranks: NDArray[np.int64]) -> float:
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def _ap_trapezoid(ranks: NDArray[np.int64]) -> float:
    """Market-1501's compute_AP.m: the precision just before each match (1 at the top) and at it, averaged."""
    found = np.arange(len(ranks))
    before = np.where(ranks == 1, 1.0, found / np.maximum(ranks - 1, 1))
    return float(np.mean((before + (found + 1) / ranks) / 2))


def _codes(
    queries: Sequence[str] | Sequence[int], gallery: Sequence[str] | Sequence[int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """One numbering for both sides: two numberings would break the same-camera rule."""
    _, codes = np.unique([str(value) for value in (*queries, *gallery)], return_inverse=True)
    return codes[: len(queries)], codes[len(queries) :]


def _camera_codes(
    queries: Sequence[str] | Sequence[int] | None, gallery: Sequence[str] | Sequence[int] | None, n_queries: int, n_gallery: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    if queries is None and gallery is None:
        return np.full(n_queries, -1), np.full(n_gallery, -2)  # never the same camera
    if queries is None or gallery is None or len(queries) != n_queries or len(gallery) != n_gallery:
        raise ValueError(f"give one camera for each of {n_queries} queries and {n_gallery} gallery items, or none at all")
    return _codes(queries, gallery)
