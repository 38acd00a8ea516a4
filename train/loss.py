"""NT-Xent, the normalised temperature-scaled cross entropy of SimCLR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent_loss(z_2BD: Tensor, *, temperature: float) -> Tensor:
    """Mean over all 2B projections of -log softmax of their twin among the 2B - 1 others (equation 1 of the paper).

    Args: z_2BD: projections of both views, row i and row i + B are one image. Returns: scalar, float32 (or float64).
    The paper's mean over 2B is returned; google-research/simclr adds the two halves and so returns twice this value.
    """
    logits, twin = similarity_logits(z_2BD, temperature)
    return F.cross_entropy(logits, twin)


def similarity_logits(z_2BD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarities / temperature (2B, 2B) with -inf for a row against itself, and each row's twin (2B,)."""
    if len(z_2BD) % 2 or len(z_2BD) < 4:
        raise ValueError(f"z_2BD has {len(z_2BD)} rows, wanted 2B with B >= 2: one image has no negatives")
    with torch.autocast(z_2BD.device.type, enabled=False):  # bfloat16 similarities are off by 2-4 % in the gradient
        z = F.normalize(z_2BD if z_2BD.dtype == torch.float64 else z_2BD.float(), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    rows = torch.arange(len(z), device=z.device)
    return logits, (rows + len(z) // 2) % len(z)
