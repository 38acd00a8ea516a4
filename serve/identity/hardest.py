"""Which pictures find their own identity worst: wrong names, bad crops, or what the encoder cannot tell apart."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError, NoSuchItem
from serve.identity.enrolled import Enrolled, evenly
from serve.item import Item
from serve.metrics import evaluate_vectors


@dataclass(frozen=True)
class HardQuery:
    """A picture that asked for its own identity."""

    item: Item
    average_precision: float
    """Over the whole ranking: mean of i / r_i, where r_i is the rank of the i-th right picture."""
    first_right: int
    """Rank, from 1, of the first right picture."""


@dataclass(frozen=True)
class Hardest:
    """What `hardest_queries` answers. The averages are over all that were asked; 0 if there were none."""

    asked: int
    mean_average_precision: float
    rank1: float
    """Share of those asked whose nearest picture is a right one."""
    queries: list[HardQuery]
    """The worst, by growing average precision, equals by growing id."""


def hardest_queries(enrolled: Enrolled, limit: int = 20, sample: int = 1000) -> Hardest:
    """Every enrolled picture asks all others for its identity: which are answered worst?

    As in `serve.reid.rank`, its own camera's pictures of its identity do not count, nor does junk; where its camera is unknown,
    itself alone does not. Pictures without a name do not count either. What then has no match is not asked; of more than
    `sample`, as many at equal steps are. Raises: GalleryError.
    """
    if limit < 1:
        raise GalleryError(f"review: the limit is {limit}, wanted 1 or more")
    asked = evenly(_matched(enrolled), sample)
    if not len(asked):
        return Hardest(0, 0.0, 0.0, [])
    identity, camera = enrolled.identity, enrolled.camera
    whose, seen_by = (identity[asked].tolist(), identity.tolist()), (camera[asked].tolist(), camera.tolist())
    report = evaluate_vectors(enrolled.vectors[asked], enrolled.vectors, *whose, *seen_by, max_rank=1)
    precision, first = report.average_precision_step, report.first_match_rank
    queries = []
    for worst in np.argsort(precision, kind="stable")[:limit]:
        with suppress(NoSuchItem):  # it was removed meanwhile
            item = enrolled.gallery.item(int(enrolled.ids[asked[worst]]))
            queries.append(HardQuery(item, float(precision[worst]), int(first[worst])))
    return Hardest(len(asked), report.map_step, float(report.cmc[0]), queries)


def _matched(enrolled: Enrolled) -> NDArray[np.intp]:
    """Rows, growing, of which another of the same identity is of another camera."""
    seen_by = enrolled.identity * (enrolled.camera.max(initial=0) + 1) + enrolled.camera
    return np.flatnonzero(_group_sizes(enrolled.identity) > _group_sizes(seen_by))


def _group_sizes(groups_N: NDArray[np.int64]) -> NDArray[np.intp]:
    """(N,): how many have the same number."""
    _, group, sizes = np.unique(groups_N, return_inverse=True, return_counts=True)
    return sizes[group]
