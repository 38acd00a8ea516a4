"""Batches larger than memory: gradients of one loss over all projections, the network taking a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def cached_backward(
    network: nn.Module,
    chunks: Sequence[Callable[[], Tensor]],
    loss_fn: Callable[[Tensor], tuple[Tensor, Tensor]],
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the loss in the network's parameters; return what `loss_fn` returned, detached.

    Each of `chunks` makes its views, the same ones whenever it is called, and returns `network`'s projections of them,
    (2c, D) with both views of an image c rows apart. They are called twice: first without gradients, for the projections of
    the whole batch, then one by one, to pass the loss's gradient on (Gao et al. 2021, Scaling Deep Contrastive Learning
    Batch Size under Memory Limited Setup). Autocast belongs inside them: its cache of weights would else outlive the first
    pass, and it has no gradients. torch's own random state is replayed, for networks with dropout.

    The gradient is exact for the network as it ran, and there each chunk was normalised by its own mean and variance (as in
    "ghost" batch norm; over all ranks, see `GlobalBatchNorm`): not that of one pass with statistics of the whole batch.
    Running statistics are those of one pass over the chunks.
    """
    device = next(network.parameters()).device
    states, projections = [], []
    with torch.no_grad(), frozen_statistics(network):
        for chunk in chunks:
            states.append(_random_state(device))
            projections.append(chunk())
    cached = [z.requires_grad_() for z in projections]
    loss, top1 = loss_fn(torch.cat([z[: len(z) // 2] for z in cached] + [z[len(z) // 2 :] for z in cached]))
    (loss if scaler is None else scaler.scale(loss)).backward()
    for number, (chunk, state, z) in enumerate(zip(chunks, states, cached, strict=True), start=1):
        last = number == len(chunks)  # then ranks exchange what they have accumulated
        with _replayed(state, device), nullcontext() if last else _apart(network):
            chunk().backward(z.grad)
    return loss.detach(), top1


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise as before, but leave their running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked


def _apart(network: nn.Module) -> AbstractContextManager[None]:
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw the random numbers of an earlier state, then go on with those of now."""
    on_cpu, on_gpu = state
    with torch.random.fork_rng([device] if on_gpu is not None else []):
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
        yield
