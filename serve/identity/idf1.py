"""IDF1: how well identities were kept, whatever they are called.

Source: Ristani et al., "Performance measures and a data set for multi-target, multi-camera tracking" (2016).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]


def idf1(truth: Sequence[str], assigned: Sequence[str | None]) -> float:
    """2 IDTP / (boxes with a true identity + boxes with one assigned), under the best one-to-one matching of both.

    Args: truth and assigned, the identities of each box; None for a box that was assigned none. IDTP: boxes whose two
    identities are matched. Raises: ValueError without boxes, or for lengths that differ.
    """
    if len(truth) != len(assigned) or not len(truth):
        raise ValueError(f"got {len(truth)} true and {len(assigned)} assigned identities, wanted one of each for every box")
    pairs = [(true, given) for true, given in zip(truth, assigned, strict=True) if given is not None]
    rows = {true: row for row, true in enumerate(dict.fromkeys(true for true, _ in pairs))}
    columns = {given: column for column, given in enumerate(dict.fromkeys(given for _, given in pairs))}
    together = np.zeros((len(rows), len(columns)), np.int64)
    for true, given in pairs:
        together[rows[true], columns[given]] += 1
    right = together[linear_sum_assignment(together, maximize=True)].sum()
    return float(2 * right / (len(truth) + len(pairs)))
