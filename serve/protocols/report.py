"""How scores are told: as figures for a program, as lines for a person, and query by query."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from serve.datasets.published import RANK1_PERCENT
from serve.files import atomic_path
from serve.metrics import RankingReport, by_camera, confidence_intervals
from serve.protocols.known import PROTOCOLS, identity_of
from serve.protocols.score import Draw, Scores

_RANKS = (1, 5, 10, 20)
_MEANS = ("map_step", "map_trapezoid", "minp", "mrr")
_NAMED = {f"rank{k}": f"rank-{k}" for k in _RANKS} | {
    "map_step": "mAP, step (torchreid, fast-reid)",
    "map_trapezoid": "mAP, trapezoid (official)",
    "minp": "mINP",
    "mrr": "MRR",
}


def figures(scores: Scores) -> dict[str, Any]:
    """Shares over the queries that have a match; `over_all_queries` counts those without one as 0, as MATLAB's code does."""
    each = [_means(draw) for draw in scores.draws]
    means = {name: float(np.mean([draw[name] for draw in each])) for name in each[0]}
    queries = sum(draw.report.n_queries for draw in scores.draws)
    lost = sum(draw.report.n_without_match for draw in scores.draws)
    return {
        "protocol": scores.choice.name,
        "asked_protocol": scores.choice.asked,
        "title": PROTOCOLS[scores.choice.name].title,
        **means,
        "over_all_queries": {name: value * (queries - lost) / queries for name, value in means.items()},
        "queries": scores.draws[0].report.n_queries,
        "without_match": scores.draws[0].report.n_without_match,
        "gallery": scores.draws[0].gallery_size,
        "draws": len(scores.draws),
        **_uncertainty(scores, each),
        "note": scores.choice.note,
        **_beside_published(scores, means["rank1"]),
    }


def _means(draw: Draw) -> dict[str, float]:
    ranks = {f"rank{k}": float(draw.cmc[k - 1]) for k in _RANKS}
    return ranks | {name: float(getattr(draw.report, name)) for name in _MEANS}


def _uncertainty(scores: Scores, each: list[dict[str, float]]) -> dict[str, Any]:
    """Of one draw the intervals (95 %) and cameras; of several the standard deviation over them."""
    if len(scores.draws) > 1:
        return {"deviation": {name: float(np.std([draw[name] for draw in each], ddof=1)) for name in each[0]}}
    (draw,) = scores.draws
    identities = [str(identity_of(sample)) for sample in draw.queries]
    intervals = confidence_intervals(draw.report, identities)
    told: dict[str, Any] = {"interval": {name: list(ends) for name, ends in intervals.items()}}
    if all(sample.camera is not None for sample in draw.queries):
        rows = by_camera(draw.report, [str(sample.camera) for sample in draw.queries])
        told["cameras"] = [{key: None if _is_nan(value) else value for key, value in asdict(row).items()} for row in rows]
    return told


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _beside_published(scores: Scores, rank1: float) -> dict[str, Any]:
    published = RANK1_PERCENT.get(scores.choice.name)
    if published is None:
        return {}
    return {"published_rank1": {who: {"percent": value, "difference": 100 * rank1 - value} for who, value in published.items()}}


def lines(told: dict[str, Any]) -> Iterator[str]:
    """`figures` for a person."""
    several = f", mean of {told['draws']} draws" if told["draws"] > 1 else ""
    yield f"{told['protocol']}: {told['title']}{several}"
    for name, title in _NAMED.items():
        yield f"{title:34} {told[name]:8.2%}{_spread(told, name)}"
    yield f"{told['queries']:,} queries, {told['gallery']:,} in the gallery; {told['without_match']:,} queries without a match"
    if told["without_match"]:
        yield "counting those as 0: " + ", ".join(
            f"{_NAMED[name]} {told['over_all_queries'][name]:.2%}" for name in ("rank1", "map_trapezoid", "map_step")
        )
    for row in told.get("cameras", []):
        counts = f"{row['n_queries']:,} queries, {row['n_without_match']:,} without a match"
        shares = (
            ""
            if row["rank1"] is None
            else f", rank-1 {row['rank1']:.2%}, mAP {row['map_step']:.2%} / {row['map_trapezoid']:.2%}"
        )
        yield f"camera {row['camera']}: {counts}{shares}"
    for who, value in told.get("published_rank1", {}).items():
        yield f"published rank-1, {who}: {value['percent']:.1f} %, difference {value['difference']:+.1f} points"


def _spread(told: dict[str, Any], name: str) -> str:
    if "deviation" in told:
        return f"  ± {told['deviation'][name]:.2%} over draws"
    if name not in told["interval"]:
        return ""
    low, high = told["interval"][name]
    return f"  (95 %: {low:.2%} to {high:.2%})"


def write_per_query(scores: Scores, path: Path) -> None:
    """A JSON line for every query: its rank, its figures; null where it has no match."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, draw in enumerate(scores.draws):
            for row in _rows(draw):
                file.write(json.dumps({"draw": number, **row}) + "\n")


def _rows(draw: Draw) -> Iterator[dict[str, Any]]:
    for place, sample in enumerate(draw.queries):
        yield {
            "source": sample.source,
            "identity": identity_of(sample),
            "camera": sample.camera,
            "track": sample.track,
            **_of_query(draw.report, place),
        }


def _of_query(report: RankingReport, place: int) -> dict[str, float | int | None]:
    if report.first_match_rank[place] == 0:
        return {"first_match_rank": None, "ap_step": None, "ap_trapezoid": None, "inp": None}
    return {
        "first_match_rank": int(report.first_match_rank[place]),
        "ap_step": float(report.average_precision_step[place]),
        "ap_trapezoid": float(report.average_precision_trapezoid[place]),
        "inp": float(report.inverse_negative_penalty[place]),
    }
