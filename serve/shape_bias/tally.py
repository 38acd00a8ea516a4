"""From decisions to the shape bias and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from serve.shape_bias.classes import MEMBERS
from serve.shape_bias.cue_conflict import Stimulus

Z_95 = 1.959963984540054


def tally(stimuli: Sequence[Stimulus], decisions: Sequence[str]) -> dict[str, Any]:
    """Shape bias over the conflicts, both fractions there and over all pictures, and how many are named at all."""
    shapes, textures = (np.array([getattr(stimulus, cue) for stimulus in stimuli]) for cue in ("shape", "texture"))
    shape, texture, conflict = shapes == np.array(decisions), textures == np.array(decisions), shapes != textures
    shape_hits, texture_hits = int(shape[conflict].sum()), int(texture[conflict].sum())
    return {
        "shape_bias": shape_bias(shape_hits, texture_hits),
        "interval": wilson(shape_hits, shape_hits + texture_hits),
        "shape_hits": shape_hits,
        "texture_hits": texture_hits,
        "conflicts": int(conflict.sum()),
        "pictures": len(stimuli),
        "shape_share": float(shape.mean()),
        "texture_share": float(texture.mean()),
        "accuracy_without_conflict": float(shape[~conflict].mean()) if not conflict.all() else None,
        "by_shape": {
            name: {"shape_hits": int(shape[rows].sum()), "texture_hits": int(texture[rows].sum()), "conflicts": int(rows.sum())}
            for name in MEMBERS
            if (rows := conflict & (shapes == name)).any()
        },
    }


def shape_bias(shape_hits: int, texture_hits: int) -> float | None:
    """Share of shapes among the answers that name either cue; None if no answer does (Geirhos et al. 2019, section 3)."""
    named = shape_hits + texture_hits
    return shape_hits / named if named else None


def wilson(hits: int, trials: int) -> tuple[float, float] | None:
    """The 95 % interval of a share (Wilson 1927), which stays in [0, 1] and holds for few trials; None without trials."""
    if not trials:
        return None
    share, z2 = hits / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)
