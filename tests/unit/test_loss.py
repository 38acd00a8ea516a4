"""NT-Xent against equation 1 of the paper, written out as loops over views."""

import math

import pytest
import torch
from torch import Tensor

from train.health import chance_loss, contrastive_top1
from train.loss import nt_xent_loss, similarity_logits


def projections(batch: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(2 * batch, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def equation_1(z: Tensor, temperature: float) -> float:
    """Mean over both views of every image of -log exp(s_ij / t) / sum over k != i of exp(s_ik / t)."""
    rows, batch = z.tolist(), len(z) // 2
    total = 0.0
    for i in range(2 * batch):
        j = i + batch if i < batch else i - batch
        below = sum(math.exp(cosine(rows[i], rows[k]) / temperature) for k in range(2 * batch) if k != i)
        total -= math.log(math.exp(cosine(rows[i], rows[j]) / temperature) / below)
    return total / (2 * batch)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
@pytest.mark.parametrize("dim", [1, 3, 16])
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_it_is_equation_1(batch: int, dim: int, temperature: float) -> None:
    z = projections(batch, dim)
    wanted = equation_1(z, temperature)
    assert nt_xent_loss(z, temperature=temperature).item() == pytest.approx(wanted, rel=1e-12)
    assert nt_xent_loss(z.float(), temperature=temperature).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_its_gradient_is_that_of_finite_differences(temperature: float) -> None:
    z = projections(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: nt_xent_loss(values, temperature=temperature), (z,))


def test_length_does_not_count_but_pairing_does() -> None:
    z = projections(4, 6)
    longer = z * torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None]
    assert nt_xent_loss(longer, temperature=0.2).item() == pytest.approx(nt_xent_loss(z, temperature=0.2).item())
    twins = torch.cat([z[:4], z[:4]])
    assert nt_xent_loss(twins, temperature=0.2) < nt_xent_loss(torch.cat([z[:4], z[:4].flip(0)]), temperature=0.2)


@pytest.mark.parametrize("batch", [2, 5, 64])
def test_projections_that_are_all_alike_give_the_chance_level(batch: int) -> None:
    z = torch.ones(2 * batch, 5, dtype=torch.float64)
    assert nt_xent_loss(z, temperature=0.2).item() == pytest.approx(math.log(2 * batch - 1), rel=1e-12)
    assert chance_loss(batch) == pytest.approx(math.log(2 * batch - 1))


def test_under_autocast_it_is_still_computed_in_float32() -> None:
    z = projections(16, 32).float()
    wanted = nt_xent_loss(z, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent_loss(z, temperature=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == wanted.item()


def test_bfloat16_projections_are_lifted_to_float32() -> None:
    z = projections(16, 32).bfloat16().requires_grad_()
    loss = nt_xent_loss(z, temperature=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(equation_1(z.detach().double(), 0.1), rel=1e-5)
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5])
def test_odd_or_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"has {rows} rows, wanted 2B with B >= 2"):
        nt_xent_loss(torch.randn(rows, 4), temperature=0.1)


def test_small_temperatures_do_not_overflow() -> None:
    z = projections(4, 8).float().requires_grad_()
    loss = nt_xent_loss(z, temperature=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_contrastive_top1_counts_the_views_whose_nearest_is_their_twin() -> None:
    z = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [1, 0.2]])  # view 2 of image 1 looks like image 0
    logits, twin = similarity_logits(z, 0.5)
    nearest = [max((k for k in range(4) if k != i), key=lambda k, i=i: cosine(z[i].tolist(), z[k].tolist())) for i in range(4)]
    wanted = sum(nearest[i] == (i + 2) % 4 for i in range(4)) / 4
    assert 0 < wanted < 1
    assert contrastive_top1(logits, twin) == wanted
    assert twin.tolist() == [2, 3, 0, 1]
    assert logits.diagonal().tolist() == [-math.inf] * 4
