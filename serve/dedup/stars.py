"""Groups that are stars: every member is near the one that is kept, so that no chain joins what is far apart.

Those that are kept are found greedily, best first: whoever no kept one is near enough to is kept itself. So no two of them are
near each other, all others are near one of them, and the outcome hangs on the order of preference alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Near: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Rows (n,) and similarities (n,)."""


def stars(best_first: Iterable[int], around: Callable[[int], Near], count: int) -> Near:
    """Which row each of `count` rows belongs to, itself if it is kept, -1 if it was not asked about; and how similar they are.

    A row that is near several kept ones belongs to the most similar, of equals to the first. `around` tells who is near a row;
    it is asked only about those that no kept one is near, so that a large group costs one question.
    """
    kept, similarity = np.full(count, -1, np.int64), np.full(count, -np.inf, np.float32)
    for row in best_first:
        if kept[row] >= 0:
            continue
        others, scores = around(row)
        among_kept = kept[others] == others
        if among_kept.any():  # an index may see from here what it missed from there
            closest = np.where(among_kept, scores, -np.inf).argmax()
            kept[row], similarity[row] = others[closest], scores[closest]
            continue
        kept[row], similarity[row] = row, np.inf
        closer = scores > similarity[others]
        kept[others[closer]], similarity[others[closer]] = row, scores[closer]
    return kept, similarity


def members(kept: NDArray[np.int64]) -> dict[int, list[int]]:
    """Kept row -> the others of its group; those that are kept alone are left out."""
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero((kept >= 0) & (kept != np.arange(len(kept)))).tolist():
        groups.setdefault(int(kept[row]), []).append(row)
    return groups
