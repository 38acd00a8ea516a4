"""LARS, which parameters it adapts, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling as google-research/simclr has it (lars_optimizer.py, `classic_momentum`).

    g <- g + weight_decay * w; trust = trust_coefficient * |w| / |g| (1 where either is zero); v <- momentum * v + lr *
    trust * g; w <- w - v. Parameters of a group with `adapt=False` (batch norms and biases) take g as it is, undecayed.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr is {lr} and momentum {momentum}; wanted lr >= 0 and 0 <= momentum < 1")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient, rate = weight.grad, torch.ones((), device=weight.device)
        assert gradient is not None
        if group["adapt"]:
            gradient = gradient + group["weight_decay"] * weight
            weight_norm, gradient_norm = weight.norm(), gradient.norm()
            trust = group["trust_coefficient"] * weight_norm / gradient_norm
            rate = torch.where((weight_norm > 0) & (gradient_norm > 0), trust, rate)  # no .item(): that would wait for a GPU
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient * (rate * group["lr"]))
        weight.sub_(state["momentum_buffer"])


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights, which are adapted and decayed, and batch norms and biases, which are neither."""
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        (weights if parameter.ndim > 1 else others).append(parameter)
    return [{"params": weights}, {"params": others, "adapt": False, "weight_decay": 0.0}]


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 over the warm-up, then cosine to 0 (model_util.py, `WarmUpAndCosineDecay`)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
