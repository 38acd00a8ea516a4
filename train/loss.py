"""NT-Xent, the normalised temperature-scaled cross entropy of SimCLR: plain, and tiled with memory linear in the batch.

In a group of processes every rank hands over its own projections and gets the loss over those of all ranks.
Shapes: N = 2B projections of all ranks, D their dimension, T rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.distributed import gather, max_over_ranks_, rank, sum_over_ranks_, world_size

TILE_ROWS = 1024
"""A tile takes 4 MiB in float32: it stays in a processor's cache, and keeps a GPU busy."""
TILED_FROM = 1024
"""Pictures in the batch from which tiles are not only smaller than the whole matrix but also faster, on a CPU."""


def tile_rows_for(batch_size: int) -> int | None:
    """The `tile_rows` to use for so many pictures, those of all ranks together; None: plain."""
    return TILE_ROWS if batch_size >= TILED_FROM else None


def nt_xent_loss(z_2BD: Tensor, *, temperature: float, tile_rows: int | None = None) -> Tensor:
    """Mean over all 2B projections of -log softmax of their twin among the 2B - 1 others (equation 1 of the paper).

    Args: z_2BD: projections of both views, row i and row i + B are one image. tile_rows: take the similarity matrix in
    square tiles of so many rows, with memory linear in B and the same value and gradient; None takes it whole.
    Returns: scalar, float32 (or float64). It is the paper's mean over 2B; google-research/simclr returns twice this value.

    In a process group z_2BD are this rank's (equally many on every rank), every rank has to call, and all get the loss over
    all projections. The gradient is then world size times that of this loss, so that the mean over ranks which
    DistributedDataParallel takes is the gradient of one process with the whole batch.
    """
    return nt_xent_with_top1(z_2BD, temperature=temperature, tile_rows=tile_rows)[0]


def nt_xent_with_top1(z_2BD: Tensor, *, temperature: float, tile_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """`nt_xent_loss`, and contrastive top-1: the share of rows whose nearest among the others is their twin (a tie is not)."""
    if len(z_2BD) % 2 or len(z_2BD) * world_size() < 4:
        raise ValueError(f"z_2BD has {len(z_2BD)} rows, wanted 2B with B >= 2: one image has no negatives")
    with torch.autocast(z_2BD.device.type, enabled=False):  # bfloat16 similarities are off by 2-4 % in the gradient
        unit_ND = _gather_views(_unit_rows(z_2BD))
        return _plain(unit_ND, temperature) if tile_rows is None else _tiled(unit_ND, temperature, tile_rows)


def _unit_rows(z_2BD: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least. A row of zeros has no direction: it stays, and gets no gradient."""
    z = z_2BD if z_2BD.dtype == torch.float64 else z_2BD.float()
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    unit: Tensor = z / norms.masked_fill(norms == 0, math.inf)
    return unit


def _gather_views(z_2BD: Tensor) -> Tensor:
    """The rows of all ranks, first all first views, then all second views."""
    if world_size() == 1:
        return z_2BD
    first_WbD, second_WbD = gather(z_2BD).chunk(2, dim=1)
    return torch.cat([first_WbD.flatten(0, 1), second_WbD.flatten(0, 1)])


def _plain(unit_ND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_NN = (unit_ND @ unit_ND.T / temperature).fill_diagonal_(-math.inf)
    twin_N = torch.arange(len(unit_ND), device=unit_ND.device).roll(len(unit_ND) // 2)
    with torch.no_grad():
        threshold_N1 = logits_NN.gather(1, twin_N[:, None]) - _rounding(unit_ND, temperature)
        top1 = _share((logits_NN >= threshold_N1).sum(1) == 1)  # none but the twin
    return F.cross_entropy(logits_NN, twin_N), top1


def _tiled(unit_ND: Tensor, temperature: float, tile_rows: int) -> tuple[Tensor, Tensor]:
    if tile_rows < 1:
        raise ValueError(f"tile_rows is {tile_rows}, wanted 1 or more, or None for the whole matrix")
    x_ND = _wide_enough(unit_ND, temperature) / math.sqrt(temperature)  # so that products are logits
    negatives_N, nearest_N = _Negatives.apply(x_ND, tile_rows)
    first_BD, second_BD = x_ND.chunk(2)
    twin_N = (first_BD * second_BD).sum(1).repeat(2)
    top1 = _share(nearest_N < twin_N.detach() - _rounding(unit_ND, temperature))
    losses_N = torch.logaddexp(negatives_N - twin_N, twin_N.new_zeros(()))
    return losses_N.mean().to(unit_ND.dtype), top1


def _wide_enough(unit_ND: Tensor, temperature: float) -> Tensor:
    """The rows in a type in which exp(1 / temperature), N times that, and a gradient divided by it are normal numbers."""
    if temperature >= 1 / 60:
        return unit_ND
    if temperature >= 1 / 600:
        return unit_ND.double()
    raise ValueError(f"temperature is {temperature}, wanted at least {1 / 600:.4f} with tile_rows")


def _rounding(unit_ND: Tensor, temperature: float) -> float:
    """Logits that differ by less are alike: projections that collapsed to one point must not count as hits."""
    return 8 * torch.finfo(unit_ND.dtype).eps / temperature


def _share(hits_N: Tensor) -> Tensor:
    return hits_N.float().mean()


class _Negatives(torch.autograd.Function):
    """For each row of logits x x^T: log of the sum of exp over its 2B - 2 negatives (N,), and the largest of them (N,).

    The logits are symmetric, so only tiles on and above the diagonal are computed, each used for its rows and its columns,
    once forward and again backward; and unshifted, so one exp serves both. Each rank takes its share of the tiles.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's own type
        sums_N = x_ND.new_zeros(len(x_ND))
        nearest_N = x_ND.new_full((len(x_ND),), -math.inf)
        for rows, columns, logits in _tiles(x_ND, tile_rows):
            _keep_largest_(nearest_N[rows], logits.amax(1))
            if columns != rows:
                _keep_largest_(nearest_N[columns], logits.amax(0))
            logits.exp_()
            sums_N[rows] += logits.sum(1)
            if columns != rows:
                sums_N[columns] += logits.sum(0)
        sum_over_ranks_(sums_N)
        max_over_ranks_(nearest_N)
        ctx.save_for_backward(x_ND, sums_N)
        ctx.tile_rows = tile_rows
        ctx.mark_non_differentiable(nearest_N)
        return sums_N.log(), nearest_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """dx_i = sum over j of (g_i P_ij + g_j P_ji) x_j, where P_ij = exp(logit_ij) / sum_i and logit_ij = logit_ji."""
        x_ND, sums_N = ctx.saved_tensors
        weights_N = gradient_N / sums_N
        gradient_ND = torch.zeros_like(x_ND)
        both = x_ND.new_empty(_tile_size(x_ND, ctx.tile_rows))
        for rows, columns, logits in _tiles(x_ND, ctx.tile_rows):
            weights = both[: logits.numel()].view_as(logits)
            torch.add(weights_N[rows, None], weights_N[columns], out=weights)
            coefficients = logits.exp_().mul_(weights)
            gradient_ND[rows].addmm_(coefficients, x_ND[columns])
            if columns != rows:
                gradient_ND[columns].addmm_(coefficients.T, x_ND[rows])
        return sum_over_ranks_(gradient_ND), None


def _tiles(x_ND: Tensor, tile_rows: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """This rank's tiles of the upper triangle: rows, columns, and logits in a buffer that the next tile reuses.

    Logits of a row with itself and with its twin are -inf.
    """
    count, batch = len(x_ND), len(x_ND) // 2
    parts = [slice(start, min(start + tile_rows, count)) for start in range(0, count, tile_rows)]
    pairs = [(rows, columns) for number, rows in enumerate(parts) for columns in parts[number:]]
    buffer = x_ND.new_empty(_tile_size(x_ND, tile_rows))
    for rows, columns in pairs[rank() :: world_size()]:
        shape = rows.stop - rows.start, columns.stop - columns.start
        logits = torch.mm(x_ND[rows], x_ND[columns].T, out=buffer[: math.prod(shape)].view(shape))
        for offset in (0, batch, -batch):
            logits.diagonal(rows.start - columns.start + offset).fill_(-math.inf)
        yield rows, columns, logits


def _tile_size(x_ND: Tensor, tile_rows: int) -> int:
    return min(tile_rows, len(x_ND)) ** 2


def _keep_largest_(largest: Tensor, others: Tensor) -> None:
    torch.maximum(largest, others, out=largest)
