"""Who is on these pictures? The identities of a gallery ranked for one probe, and the decision: one of them, or nobody known.

Several pictures of one probe, a tracklet, are pooled into the direction of their mean: noise of single frames cancels, and it
is one search. An identity scores as its best picture does: the front is unlike the back, so that the mean of an identity's
pictures lies between its views and fits none of them; and the best one is found exactly at any size of the gallery.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError
from serve.filters import And, Condition, Not, Where, as_where
from serve.gallery import Gallery
from serve.identity.calibration import Calibration
from serve.identity.decision import Decision
from serve.pooling import pool
from serve.samples import NOBODY
from serve.search import Hit

ENROLLED = And((Condition("identity", "is known"), Not(Condition("identity", "in", NOBODY))))
"""The items that stand for somebody."""
_ITEMS = 8
"""To look at, for each identity wanted; if they are of too few, then as many again of the others."""
_GROWTH = 1.5
"""From this growth of the gallery on, a threshold no longer keeps its promise: each identity more is one more to mistake."""


def enrolled_identities(gallery: Gallery) -> set[str]:
    """Everybody who could be named."""
    return set(gallery.distinct("identity")) - set(NOBODY)


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
    others, count = enrolled, _ITEMS * k
    best: dict[str, Hit] = {}
    while True:
        hits = gallery.search(vector_D, count, others, excluded)
        for hit in hits:
            best.setdefault(str(hit.identity), hit)
        if len(best) >= k or len(hits) < count:
            return list(best.values())[:k]
        others = And((enrolled, Not(Condition("identity", "in", tuple(best)))))


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
