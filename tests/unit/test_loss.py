"""NT-Xent, plain and tiled, against equation 1 of the paper, written out as loops over views."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.health import chance_loss
from train.loss import TILE_ROWS, TILED_FROM, nt_xent_loss, nt_xent_with_top1, tile_rows_for

PLAIN_AND_TILED = pytest.mark.parametrize("tile_rows", [None, 3])


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


def gradient(z: Tensor, temperature: float, tile_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, top-1 and d loss / d z."""
    z = z.detach().requires_grad_()
    loss, top1 = nt_xent_with_top1(z, temperature=temperature, tile_rows=tile_rows)
    return loss.detach(), top1, torch.autograd.grad(loss, z)[0]


@PLAIN_AND_TILED
@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
@pytest.mark.parametrize("dim", [1, 3, 16])
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_it_is_equation_1(batch: int, dim: int, temperature: float, tile_rows: int | None) -> None:
    z = projections(batch, dim)
    wanted = equation_1(z, temperature)
    assert nt_xent_loss(z, temperature=temperature, tile_rows=tile_rows).item() == pytest.approx(wanted, rel=1e-12)
    assert nt_xent_loss(z.float(), temperature=temperature, tile_rows=tile_rows).item() == pytest.approx(wanted, rel=1e-5)


@PLAIN_AND_TILED
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_its_gradient_is_that_of_finite_differences(temperature: float, tile_rows: int | None) -> None:
    z = projections(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: nt_xent_loss(values, temperature=temperature, tile_rows=tile_rows), (z,))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("tile_rows", [1, 2, 5, 19, 37, 38, 64, 74, 1000])
def test_tiles_of_any_size_give_the_plain_value_and_gradient(tile_rows: int, temperature: float) -> None:
    z = projections(37, 8)
    loss, top1, wanted = gradient(z, temperature, None)
    tiled_loss, tiled_top1, tiled = gradient(z, temperature, tile_rows)
    assert abs(tiled_loss - loss) < 1e-12 * loss.clamp(min=1)
    assert (tiled - wanted).abs().max() < 1e-12 * wanted.abs().max().clamp(min=1)
    assert tiled_top1 == top1


@PLAIN_AND_TILED
def test_neither_the_order_of_the_images_nor_that_of_the_views_counts(tile_rows: int | None) -> None:
    z = projections(10, 6)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    moved = torch.cat([order + 10, order])  # images shuffled, views exchanged
    loss, top1, wanted = gradient(z, 0.2, tile_rows)
    moved_loss, moved_top1, found = gradient(z[moved], 0.2, tile_rows)
    assert moved_loss.item() == pytest.approx(loss.item(), rel=1e-13)
    assert moved_top1 == top1
    torch.testing.assert_close(found, wanted[moved], rtol=0, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_tiles_take_memory_that_is_linear_in_the_batch() -> None:
    def largest(batch: int, tile_rows: int | None) -> int:
        with LargestTensor() as watched:
            gradient(projections(batch, 4), 0.2, tile_rows)
        return watched.elements

    assert largest(100, None) == 200 * 200
    assert largest(100, 16) == 200 * 4
    assert largest(200, 16) == 400 * 4
    assert largest(4, 1000) == 8 * 8, "a tile is no larger than the matrix"


def test_the_trainer_takes_tiles_for_large_batches_only() -> None:
    assert tile_rows_for(TILED_FROM - 1) is None
    assert tile_rows_for(TILED_FROM) == TILE_ROWS


@pytest.mark.parametrize("tile_rows", [0, -1])
def test_tiles_without_rows_are_refused(tile_rows: int) -> None:
    with pytest.raises(ValueError, match=f"tile_rows is {tile_rows}, wanted 1 or more"):
        nt_xent_loss(projections(2, 3), temperature=0.1, tile_rows=tile_rows)


def test_length_does_not_count_but_pairing_does() -> None:
    z = projections(4, 6)
    longer = z * torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None]
    assert nt_xent_loss(longer, temperature=0.2).item() == pytest.approx(nt_xent_loss(z, temperature=0.2).item())
    twins = torch.cat([z[:4], z[:4]])
    assert nt_xent_loss(twins, temperature=0.2) < nt_xent_loss(torch.cat([z[:4], z[:4].flip(0)]), temperature=0.2)


@PLAIN_AND_TILED
@pytest.mark.parametrize("temperature", [0.01, 1 / 60, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [2, 5, 64])
def test_projections_that_are_all_alike_give_the_chance_level(
    batch: int, dtype: torch.dtype, temperature: float, tile_rows: int | None
) -> None:
    z = torch.randn(5, generator=torch.Generator().manual_seed(0)).to(dtype).expand(2 * batch, 5)
    loss, top1, found = gradient(z, temperature, tile_rows)
    assert loss.item() == pytest.approx(math.log(2 * batch - 1), rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert chance_loss(batch) == pytest.approx(math.log(2 * batch - 1))
    assert top1 == 0, "nothing is found where all are alike"
    assert found.abs().max() < 1e-4


@PLAIN_AND_TILED
def test_under_autocast_it_is_still_computed_in_float32(tile_rows: int | None) -> None:
    z = projections(16, 32).float().requires_grad_()
    wanted = gradient(z, 0.1, tile_rows)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent_loss(z, temperature=0.1, tile_rows=tile_rows)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == wanted[0].item()
    assert z.grad is not None
    assert torch.equal(z.grad, wanted[2])


@PLAIN_AND_TILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_of_half_precision_are_lifted_to_float32(dtype: torch.dtype, tile_rows: int | None) -> None:
    z = projections(16, 32).to(dtype)
    loss, _, found = gradient(z, 0.1, tile_rows)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(equation_1(z.double(), 0.1), rel=1e-5)
    wanted = gradient(z.double(), 0.1, None)[2]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-5)


@PLAIN_AND_TILED
def test_a_row_of_zeros_has_no_direction_and_gets_no_gradient(tile_rows: int | None) -> None:
    z = projections(4, 3).float()
    z[5] = 0
    loss, _, found = gradient(z, 0.1, tile_rows)
    assert loss.isfinite()
    assert found.isfinite().all()
    assert found[5].tolist() == [0, 0, 0]
    assert found[1].any()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5])
def test_odd_or_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"has {rows} rows, wanted 2B with B >= 2"):
        nt_xent_loss(torch.randn(rows, 4), temperature=0.1)


@PLAIN_AND_TILED
@pytest.mark.parametrize("temperature", [0.002, 0.01, 0.0166, 0.0167, 0.05])
def test_small_temperatures_cost_no_precision(temperature: float, tile_rows: int | None) -> None:
    z = projections(20, 8)
    wanted_loss, _, wanted = gradient(z, temperature, None)
    loss, _, found = gradient(z.float(), temperature, tile_rows)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_the_smallest_temperatures_need_the_whole_matrix() -> None:
    z = projections(4, 8).float()
    loss, _, found = gradient(z, 1e-3, None)
    assert loss.isfinite()
    assert found.isfinite().all()
    with pytest.raises(ValueError, match=r"temperature is 0.001, wanted at least 0.0017 with tile_rows"):
        nt_xent_loss(z, temperature=1e-3, tile_rows=2)


@PLAIN_AND_TILED
def test_top1_counts_the_views_whose_nearest_is_their_twin(tile_rows: int | None) -> None:
    z = projections(30, 2)
    z[30:] = z[:30] + 0.1 * z[30:]
    rows = z.tolist()
    nearest = [max((k for k in range(60) if k != i), key=lambda k, i=i: cosine(rows[i], rows[k])) for i in range(60)]
    wanted = sum(nearest[i] == (i + 30) % 60 for i in range(60)) / 60
    assert 0.1 < wanted < 0.9
    _, top1 = nt_xent_with_top1(z.requires_grad_(), temperature=0.5, tile_rows=tile_rows)
    assert top1.item() == pytest.approx(wanted)
    assert not top1.requires_grad


def test_a_loss_of_next_to_nothing_keeps_its_digits() -> None:
    z = torch.eye(6, dtype=torch.float64).repeat(2, 1)
    assert nt_xent_loss(z, temperature=0.05, tile_rows=4).item() == pytest.approx(math.log1p(10 * math.exp(-20)), rel=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@PLAIN_AND_TILED
def test_a_gpu_gives_what_the_cpu_gives(tile_rows: int | None) -> None:
    z = projections(20, 8)
    for found, wanted in zip(gradient(z.cuda(), 0.1, tile_rows), gradient(z, 0.1, None), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-12, atol=1e-12)
