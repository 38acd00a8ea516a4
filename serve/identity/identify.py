"""Who is on these pictures? The identities of a gallery ranked for one probe, and the decision: one of them, or nobody known.

Several pictures of one probe, a tracklet, are pooled into the direction of their mean: noise of single frames cancels, and it
is one search. An identity scores as its best picture does: the front is unlike the back, so that the mean of an identity's
pictures lies between its views and fits none of them; and the best one is found exactly at any size of the gallery.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError
from serve.filters import And, Condition, Where, as_where
from serve.gallery import Gallery
from serve.identity.calibration import Calibration
from serve.pooling import pool
from serve.samples import JUNK_IDENTITY
from serve.search import Hit

ENROLLED = And((Condition("identity", "is known"), Condition("identity", "!=", (JUNK_IDENTITY,))))
"""The items that stand for somebody."""
_FIRST_ITEMS, _MORE = 8, 4
"""Items to look at for each identity wanted, and so many times more if they are too few identities."""
_GROWTH = 1.5
"""From this growth of the gallery on, a threshold no longer keeps its promise: each identity more is one more to mistake."""


@dataclass(frozen=True)
class Decision:
    """What `identify` answers."""

    verdict: Literal["known", "unknown", "undecided"]
    """undecided: no threshold was given."""
    identity: str | None
    """Who it is if known."""
    score: float | None
    """Cosine of the probe with the best picture of the best identity; None if the filter leaves nobody."""
    probability: float | None
    """That the best identity is the right one, for probes mixed as those of the calibration; None without one."""
    threshold: float | None
    candidates: tuple[Hit, ...]
    """The best picture of each of the best identities, the best first."""


def enrolled_identities(gallery: Gallery) -> set[str]:
    """Everybody who could be named."""
    return set(gallery.distinct("identity")) - {JUNK_IDENTITY}


def rank_identities(
    gallery: Gallery,
    vector_D: NDArray[np.floating],
    k: int,
    where: str | Where | None = None,
    exclude_ids: Iterable[int] = (),
) -> list[Hit]:
    """The best item of each of the `k` identities most similar to a vector, the best first. Raises: GalleryError."""
    if k < 1:
        raise GalleryError(f"identify: k is {k}, wanted 1 or more")
    enrolled, excluded = And((ENROLLED, as_where(where))), list(exclude_ids)
    count = _FIRST_ITEMS * k
    while True:
        hits = gallery.search(vector_D, count, enrolled, excluded)
        best: dict[str | None, Hit] = {}
        for hit in hits:
            best.setdefault(hit.identity, hit)
        if len(best) >= k or len(hits) < count:
            return list(best.values())[:k]
        count *= _MORE


def identify(
    gallery: Gallery,
    vectors_ND: NDArray[np.floating],
    calibration: Calibration | None = None,
    *,
    where: str | Where | None = None,
    exclude_ids: Iterable[int] = (),
    k: int = 5,
) -> Decision:
    """Decide who is on the pictures (N, D) of one probe, among the items that pass `where`; reads only.

    Without a calibration it ranks and decides nothing. Raises: GalleryError, EncoderMismatch, ValueError for no pictures.
    """
    if calibration is not None:
        calibration.require(gallery.encoder_id)
    candidates = tuple(rank_identities(gallery, pool(vectors_ND), k, where, exclude_ids))
    score = candidates[0].score if candidates else None
    if calibration is None:
        return Decision("undecided", None, score, None, None, candidates)
    known = score is not None and score >= calibration.threshold
    return Decision(
        verdict="known" if known else "unknown",
        identity=candidates[0].identity if known else None,
        score=score,
        probability=None if score is None else calibration.probability(score),
        threshold=calibration.threshold,
        candidates=candidates,
    )


def outgrown(gallery: Gallery, calibration: Calibration) -> str | None:
    """What to say if the gallery has grown so much that the threshold names more strangers than it promised; else None."""
    now = len(enrolled_identities(gallery))
    if now <= _GROWTH * calibration.identities:
        return None
    expected = 1 - (1 - calibration.asked_fpir) ** (now / calibration.identities)  # each identity is as easily taken as another
    return (
        f"the threshold was chosen among {calibration.identities} identities, now there are {now}: expect an FPIR of about "
        f"{expected:.2g}, not {calibration.asked_fpir:g}; choose it anew: simclr reid calibrate"
    )


def summary(decision: Decision) -> str:
    """A decision as text: the verdict, then the candidates."""
    heads = {"known": f"{decision.identity}", "unknown": "UNKNOWN", "undecided": "no threshold, so nothing is decided"}
    likely = "" if decision.probability is None else f"  probability of the best {decision.probability:.3f}"
    limit = "" if decision.threshold is None else f"  threshold {decision.threshold:.4f}"
    ranked = enumerate(decision.candidates, start=1)
    lines = [f"{rank:3}  {hit.score:.4f}  {hit.identity}  #{hit.id}  {hit.source}" for rank, hit in ranked]
    return "\n".join([f"{heads[decision.verdict]}{likely}{limit}", *lines])
