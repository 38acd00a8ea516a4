"""Cached gradients against one graph over all chunks, in one process (in several: test_distributed.py)."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from train.gradcache import cached_backward, frozen_statistics
from train.loss import nt_xent_with_top1

Step = Callable[[nn.Module, Tensor, int], tuple[Tensor, Tensor]]
loss_fn = partial(nt_xent_with_top1, temperature=0.2)


def network(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    last = nn.BatchNorm1d(6)
    last.register_parameter("bias", None)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(36, 6), last
    return nn.Sequential(*layers).double()


def views(images: int = 12) -> Tensor:
    """Two views (2, B, 3, 5, 5)."""
    return torch.randn(2, images, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def chunks_of(model: nn.Module, views_2BCHW: Tensor, size: int) -> list[Callable[[], Tensor]]:
    return [lambda part=part: model(part.flatten(0, 1)) for part in views_2BCHW.split(size, dim=1)]


def cached(model: nn.Module, views_2BCHW: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return cached_backward(model, chunks_of(model, views_2BCHW, size), loss_fn)


def one_graph(model: nn.Module, views_2BCHW: Tensor, size: int) -> tuple[Tensor, Tensor]:
    first, second = zip(*(chunk().chunk(2) for chunk in chunks_of(model, views_2BCHW, size)), strict=True)
    loss, top1 = loss_fn(torch.cat(first + second))
    loss.backward()
    return loss.detach(), top1


def after(step: Step, model: nn.Module, size: int) -> dict[str, Tensor]:
    """Loss, top-1, gradients and buffers after one step from the same start."""
    model = copy.deepcopy(model)
    torch.manual_seed(5)
    loss, top1 = step(model, views(), size)
    gradients = {f"{name}.grad": weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss, "top1": top1, **gradients, **dict(model.named_buffers()), "random": torch.rand(3)}


@pytest.mark.parametrize("size", [2, 3, 5, 12])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_equals_one_graph_with_the_same_chunks_running_statistics_included(size: int, dropout: float) -> None:
    wanted = after(one_graph, network(dropout=dropout), size)
    found = after(cached, network(dropout=dropout), size)
    assert found["loss"] > 0.1
    assert found["0.weight.grad"].abs().max() > 1e-3
    assert found["1.num_batches_tracked"] == len(views().split(size, dim=1))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_one_chunk_is_the_plain_step() -> None:
    def plain(model: nn.Module, views_2BCHW: Tensor, _: int) -> tuple[Tensor, Tensor]:
        loss, top1 = loss_fn(model(views_2BCHW.flatten(0, 1)))
        loss.backward()
        return loss.detach(), top1

    torch.testing.assert_close(after(cached, network(), 12), after(plain, network(), 12), rtol=1e-12, atol=1e-12)


def test_chunks_are_normalised_each_by_its_own_statistics() -> None:
    whole, parts = after(cached, network(), 12), after(cached, network(), 4)
    assert not torch.allclose(whole["loss"], parts["loss"], rtol=1e-3), "the caveat in the docstring"


def test_the_loss_is_scaled_for_float16() -> None:
    wanted, model = after(cached, network(), 4), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, _ = cached_backward(model, chunks_of(model, views(), 4), loss_fn, scaler)
    assert loss == wanted["loss"], "what is shown is not scaled"
    assert model[0].weight.grad is not None
    torch.testing.assert_close(model[0].weight.grad, 1024 * wanted["0.weight.grad"], rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_weights_under_autocast() -> None:
    def under_autocast(step: Step) -> Tensor:
        model = network().float()
        forward = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
        step(model, views().float(), 4)
        assert model[0].weight.grad is not None
        return model[0].weight.grad

    found, wanted = under_autocast(cached), under_autocast(one_graph)
    assert wanted.any()
    assert (found - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("training", [True, False])
def test_frozen_statistics_change_neither_buffers_nor_outputs(training: bool) -> None:
    model, batch = network().train(training), views()[0]
    before = copy.deepcopy(model.state_dict())
    with frozen_statistics(model):
        frozen = model(batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(batch), frozen)
    assert (model[1].num_batches_tracked == 1) == training, "counted again afterwards"


def test_statistics_thaw_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError), frozen_statistics(model):
        model(torch.zeros(1))
    assert model[1].track_running_stats
