"""Signs of life that need no labels."""

from __future__ import annotations

import math

from torch import Tensor


def chance_loss(batch_size: int) -> float:
    """NT-Xent of projections that are all alike: ln(2B - 1). A loss that stays here has learned nothing, or collapsed."""
    return math.log(2 * batch_size - 1)


def contrastive_top1(logits: Tensor, twin: Tensor) -> float:
    """How often a view's nearest of the 2B - 1 others is its twin; by chance 1 / (2B - 1)."""
    return (logits.argmax(1) == twin).float().mean().item()
