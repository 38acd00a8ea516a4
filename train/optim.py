"""LARS, which parameters it adapts, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """All tensors of a group by few calls, without waiting for a GPU (no `.item()`)."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        rates = [torch.ones((), device=weight.device) for weight in weights]
        if group["adapt"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            weight_norms, gradient_norms = torch._foreach_norm(weights), torch._foreach_norm(gradients)
            rates = [
                torch.where((w > 0) & (g > 0), group["trust_coefficient"] * w / g, one)
                for w, g, one in zip(weight_norms, gradient_norms, rates, strict=True)
            ]
        buffers = [self._momentum_buffer(weight) for weight in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, torch._foreach_mul(gradients, [rate * group["lr"] for rate in rates]))
        torch._foreach_sub_(weights, buffers)

    def _momentum_buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights, which are adapted and decayed, and batch norms and biases, which are neither."""
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        (weights if parameter.ndim > 1 else others).append(parameter)
    return [{"params": weights}, {"params": others, "adapt": False, "weight_decay": 0.0}]


def peak_lr(batch_size: int, rule: Literal["sqrt", "linear"]) -> float:
    """0.075 * sqrt(B), or 0.3 * B / 256: equal at B = 4096; the first is better for small batches and short runs (B.1)."""
    return 0.075 * math.sqrt(batch_size) if rule == "sqrt" else 0.3 * batch_size / 256


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 over the warm-up, then cosine to 0 (model_util.py, `WarmUpAndCosineDecay`)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
