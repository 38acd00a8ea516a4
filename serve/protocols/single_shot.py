"""CMC with one gallery picture of every identity (CUHK03's classic protocol): the expectation over all draws, in closed form.

With one picture of each drawn at random, another identity stands before the drawn match with the share p_j of its pictures that
are as near as that or nearer. The number before it is a sum of independent yes-or-no draws (Poisson binomial), and its
distribution follows from the p_j one identity after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def expected_cmc(
    distances_QG: NDArray[np.floating],
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    query_cameras: Sequence[str],
    gallery_cameras: Sequence[str],
    *,
    max_rank: int,
) -> NDArray[np.float64]:
    """(max_rank,): mean over the queries with a match on another camera. Never falls, and is 1 from so many identities on."""
    query_id, gallery_id = np.array(query_ids), np.array(gallery_ids)
    good = (query_id[:, None] == gallery_id) & (np.array(query_cameras)[:, None] != np.array(gallery_cameras))
    query, item = np.nonzero(good)
    own, near = query_id[query], distances_QG[query, item]
    before = np.zeros((len(query), max_rank))  # share of draws with so many others before the match
    before[:, 0] = 1
    for name in np.unique(gallery_id):
        beaten = (distances_QG[:, gallery_id == name][query] <= near[:, None]).mean(axis=1)
        beaten[own == name] = 0
        one_more = before * beaten[:, None]
        before -= one_more
        before[:, 1:] += one_more[:, :-1]
    weights = 1 / good.sum(axis=1)[query] / len(np.unique(query))
    found: NDArray[np.float64] = np.cumsum(weights @ before).clip(max=1.0)
    return found
