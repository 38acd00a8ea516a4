"""Open-set identification: how often a stranger is taken for somebody known, and somebody known is found, by threshold.

A probe is mated if its identity is enrolled. It is named after the identity of the highest score if that reaches the threshold,
else it is unknown. FPIR: share of the non-mated probes that are named. TPIR: share of the mated probes that are named rightly.
Source: ISO/IEC 19795-1; TPIR is the detection and identification rate at rank 1 of Phillips, Grother and Micheals (2011).
Ties count against: a score equal to the threshold is named, a mate with a rival of the same score is not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv  # type: ignore[import-untyped]


@dataclass(frozen=True, eq=False)
class Curve:
    """Every threshold at which something changes, falling, and the rates there, which grow."""

    threshold: NDArray[np.float64]
    fpir: NDArray[np.float64]
    tpir: NDArray[np.float64]


def fpir(top_N: ArrayLike, threshold: float) -> float:
    """Share of the non-mated probes whose best score (N,) is `threshold` or more. Raises: ValueError for NaN or no probes."""
    return float(np.mean(_scores(top_N, "best scores of non-mated probes") >= threshold))


def tpir(own_M: ArrayLike, rival_M: ArrayLike, threshold: float) -> float:
    """Share of the mated probes whose own identity's score is `threshold` or more and above the best of the others, both (M,).

    Raises: ValueError for NaN, no probes, or shapes that differ.
    """
    found, mated = _found(own_M, rival_M)
    return float(np.count_nonzero(found >= threshold) / mated)


def threshold_at(top_N: ArrayLike, rate: float) -> float:
    """The lowest threshold at which the FPIR on these best scores (N,) is `rate` at most; just above one of them.

    Raises: ValueError for NaN, no probes, or a rate that is not between 0 and 1.
    """
    top = np.sort(_scores(top_N, "best scores of non-mated probes"))[::-1]
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate}, wanted more than 0 and less than 1")
    named = np.flatnonzero(np.arange(len(top)) / len(top) <= rate)[-1]  # so many may reach it; one more would be too many
    return float(np.nextafter(top[named], np.inf))


def curve(own_M: ArrayLike, rival_M: ArrayLike, top_N: ArrayLike) -> Curve:
    """FPIR and TPIR at every threshold. Raises: ValueError as `fpir` and `tpir`."""
    found, mated = _found(own_M, rival_M)
    top = _scores(top_N, "best scores of non-mated probes")
    thresholds = np.unique(np.concatenate([found, top]))[::-1]
    return Curve(thresholds, _reaching(top, thresholds) / len(top), _reaching(found, thresholds) / mated)


def interval(rate: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Between which the true rate lies, after `rate` of `count` independent trials (Clopper and Pearson 1934)."""
    if count < 1 or not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate} of {count} trials, wanted 0 to 1 of at least one")
    hits, tail = rate * count, (1 - confidence) / 2
    low = 0.0 if rate == 0 else float(betaincinv(hits, count - hits + 1, tail))
    high = 1.0 if rate == 1 else float(betaincinv(hits + 1, count - hits, 1 - tail))
    return low, high


def _scores(values: ArrayLike, what: str) -> NDArray[np.float64]:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError(f"{what} are {scores.shape} or hold NaN, wanted a number for each of at least one probe")
    return scores


def _found(own_M: ArrayLike, rival_M: ArrayLike) -> tuple[NDArray[np.float64], int]:
    """The scores up to which mated probes are named rightly, of those that no other identity equals; and how many there are."""
    own, rival = _scores(own_M, "own scores of mated probes"), _scores(rival_M, "rivals of mated probes")
    if own.shape != rival.shape:
        raise ValueError(f"got {len(own)} own scores and {len(rival)} of rivals, wanted one of each for every mated probe")
    return own[own > rival], len(own)


def _reaching(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """How many scores are each threshold or more."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
