"""LARS against scalars in plain Python, its parameter groups, and the learning rate's formula."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from train.encoder import Encoder, ProjectionHead, SimCLR
from train.optim import LARS, lr_at, parameter_groups

Vector = list[float]


def norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


class SlowLars:
    """lars_optimizer.py of google-research/simclr for one variable, scalar by scalar."""

    def __init__(self, weight: Vector, *, momentum: float, decay: float, eta: float, excluded: bool) -> None:
        self.weight, self.velocity = list(weight), [0.0] * len(weight)
        self.momentum, self.decay, self.eta, self.excluded = momentum, decay, eta, excluded

    def step(self, gradient: Vector, rate: float) -> None:
        trust = 1.0
        if not self.excluded:
            gradient = [g + self.decay * w for g, w in zip(gradient, self.weight, strict=True)]
            if norm(self.weight) > 0 and norm(gradient) > 0:
                trust = self.eta * norm(self.weight) / norm(gradient)
        for i, g in enumerate(gradient):
            self.velocity[i] = self.momentum * self.velocity[i] + rate * trust * g
            self.weight[i] -= self.velocity[i]


RATES = (0.0, 0.5, 3.0, 1.2, 0.01)


def run_both(
    start: Vector, gradients: list[Vector], *, adapt: bool = True, momentum: float = 0.9, decay: float = 1e-2
) -> tuple[Vector, Vector]:
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    group = {"params": [weight], "adapt": adapt}
    fast = LARS([group], lr=0.0, momentum=momentum, weight_decay=decay, trust_coefficient=0.02)
    slow = SlowLars(start, momentum=momentum, decay=decay, eta=0.02, excluded=not adapt)
    for gradient, rate in zip(gradients, RATES, strict=True):
        fast.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        fast.step()
        slow.step(gradient, rate)
    return weight.tolist(), slow.weight


def draws(count: int, size: int) -> list[Vector]:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_five_steps_with_changing_rates_are_those_of_the_slow_version(momentum: float, decay: float, adapt: bool) -> None:
    """The changing rate tells the classic momentum (rate inside the buffer) from torch's."""
    got, wanted = run_both([0.3, -2.0, 1.5], draws(5, 3), adapt=adapt, momentum=momentum, decay=decay)
    assert got == pytest.approx(wanted, rel=1e-6)
    assert got != pytest.approx([0.3, -2.0, 1.5])


def test_zero_weights_and_zero_gradients_are_not_adapted() -> None:
    got, wanted = run_both([0.0, 0.0], draws(5, 2), decay=0.0)
    assert got == pytest.approx(wanted, rel=1e-12)
    zero = [[0.0, 0.0]] * 5
    assert run_both([1.0, 2.0], zero, decay=0.0) == ([1.0, 2.0], [1.0, 2.0])
    assert run_both([0.0, 0.0], zero) == ([0.0, 0.0], [0.0, 0.0])


def test_without_weight_decay_it_still_adapts() -> None:
    """Elsewhere LARS turns into SGD there: 47 times larger steps."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([600.0, 800.0])
    LARS([weight], lr=1.0, weight_decay=0.0).step()
    assert torch.allclose(weight.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.001))


def test_an_excluded_parameter_is_neither_adapted_nor_decayed() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    weight.grad = torch.tensor([0.5])
    LARS([{"params": [weight], "adapt": False}], lr=0.1, weight_decay=10.0).step()
    assert weight.item() == pytest.approx(3.0 - 0.1 * 0.5)


def test_parameters_without_gradient_stay() -> None:
    frozen, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    LARS([frozen, moved], lr=1.0).step()
    assert frozen.tolist() == [1, 1]
    assert moved.tolist() != [1, 1]


def test_its_state_goes_through_a_checkpoint() -> None:
    def optimiser(weight: Tensor) -> LARS:
        return LARS([weight], lr=0.5)

    def step(weight: Tensor, optimizer: LARS, gradient: Vector) -> None:
        weight.grad = torch.tensor(gradient)
        optimizer.step()

    first, *others = draws(4, 3)
    straight = nn.Parameter(torch.ones(3))
    steady = optimiser(straight)
    step(straight, steady, first)
    resumed = nn.Parameter(straight.detach().clone())
    fresh = optimiser(resumed)
    fresh.load_state_dict(copy.deepcopy(steady.state_dict()))
    for gradient in others:
        step(straight, steady, gradient)
        step(resumed, fresh, gradient)
    assert torch.equal(straight, resumed)


def test_the_closure_is_called_with_gradients_on() -> None:
    weight = nn.Parameter(torch.ones(1))

    def closure() -> float:
        weight.square().sum().backward()
        return 7.0

    assert LARS([weight], lr=0.1).step(closure) == 7.0
    assert weight.item() < 1


@pytest.mark.parametrize("settings", [{"lr": -0.1}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "momentum": -0.1}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted lr >= 0 and 0 <= momentum < 1"):
        LARS([nn.Parameter(torch.ones(1))], **settings)


def test_weights_are_adapted_batch_norms_and_biases_are_not() -> None:
    encoder = Encoder("resnet18", 0.125, "small")
    model = nn.ModuleList([SimCLR(encoder, ProjectionHead(encoder.feature_dim, 16)), nn.Linear(3, 3)])
    adapted, excluded = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in names.values()}
    adapted_names = {names[id(parameter)] for parameter in adapted["params"]}
    matrices = {name for name, kind in kinds.items() if issubclass(kind, (nn.Conv2d, nn.Linear)) and name.endswith("weight")}
    assert adapted_names == matrices
    assert {names[id(parameter)] for parameter in excluded["params"]} == set(names.values()) - matrices
    optimizer = LARS(parameter_groups(model), lr=1.0, weight_decay=1e-4)
    assert [(group["adapt"], group["weight_decay"]) for group in optimizer.param_groups] == [(True, 1e-4), (False, 0.0)]


@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 55, 99, 100])
def test_the_rate_is_linear_then_a_cosine(step: int) -> None:
    wanted = 4.8 * step / 10 if step < 10 else 4.8 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
    assert lr_at(step, peak=4.8, warmup_steps=10, total_steps=100) == pytest.approx(wanted, abs=1e-12)


def test_the_rate_starts_at_zero_peaks_after_the_warm_up_and_ends_at_zero() -> None:
    rates = [lr_at(step, peak=2.0, warmup_steps=10, total_steps=100) for step in range(101)]
    assert (rates[0], rates[10], max(rates)) == (0, 2, 2)
    assert rates[55] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_without_warm_up_starts_at_the_peak() -> None:
    assert lr_at(0, peak=2.0, warmup_steps=0, total_steps=1) == 2
