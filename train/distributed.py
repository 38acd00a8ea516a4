"""Training in many processes, one per GPU or per group of cores: `torchrun --nproc-per-node N -m -- cli pretrain ...`.

Everything here works alone as well: without a process group there is one rank, 0, and nothing to exchange. Only collectives
that NCCL and gloo both have are used. W = number of ranks.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from serve.errors import TrainingError


def start() -> torch.device:
    """Join the other processes that torchrun started, if any, and return this one's device: its GPU (NCCL) or the CPU (gloo).

    Raises: TrainingError if WORLD_SIZE was not set by torchrun, or if a process has no GPU of its own.
    """
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda" if cuda else "cpu")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise TrainingError(f"WORLD_SIZE is set but {', '.join(missing)} not; start with torchrun, or unset WORLD_SIZE")
    if not cuda:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise TrainingError(f"process {local} of this machine has no GPU of its own; use torchrun --nproc-per-node {gpus}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def stop() -> None:
    """Leave the group that `start` joined."""
    if _grouped():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _grouped() else 1


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return _largest(int(flag)) == 1


def smallest(number: int) -> int:
    """The smallest of all ranks' numbers."""
    return -_largest(-number)


def total(number: int) -> int:
    """The sum of all ranks' numbers."""
    return int(sum_over_ranks_(torch.tensor(number, device=_meeting_place())).item())


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Add up the tensors of all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks_(tensor: Tensor) -> Tensor:
    """The largest of all ranks' elements, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, (W, ...), differentiable: a rank's gradient is the sum of those that all ranks have for it.

    torch.distributed.nn.all_gather has returned wrong gradients on NCCL (pytorch#120386).
    """
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401 - torch's own type
        gathered = tensor.new_empty(world_size(), *tensor.shape)
        dist.all_gather(list(gathered), tensor.contiguous())
        return gathered

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return sum_over_ranks_(gradient.clone(memory_format=torch.contiguous_format))[rank()]


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the batches of all ranks (paper, section 2.2), of (B, C) or (B, C, H, W).

    nn.SyncBatchNorm does the same on GPUs alone. Parameters, buffers and running statistics are those of nn.BatchNorm1d and
    2d; statistics are taken in float32 at least.
    """

    @classmethod
    def like(cls, norm: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
        """Takes over settings, parameters and buffers."""
        twin = cls(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        twin.affine, twin.track_running_stats = norm.affine, norm.track_running_stats
        twin._parameters, twin._buffers = norm._parameters, norm._buffers
        return twin.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, in its own type."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        mean_C, var_C, count = _global_moments(wide)
        if self.track_running_stats:
            self._update_running(mean_C.detach(), var_C.detach() * (count / (count - 1)))
        scale_C = torch.rsqrt(var_C + self.eps)
        scale_C = scale_C if self.weight is None else scale_C * self.weight
        shift_C = -mean_C * scale_C if self.bias is None else self.bias - mean_C * scale_C
        spread = (1, -1) + (1,) * (x.ndim - 2)
        return torch.addcmul(shift_C.view(spread), wide, scale_C.view(spread)).to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var_C.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - nn.BatchNorm's name
        if input.ndim not in (2, 4):
            raise ValueError(f"input has {input.ndim} dimensions, wanted (B, C) or (B, C, H, W)")


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel (C,) over all ranks, and the number of values (Chan et al. 1979, equation 2.1)."""
    var_C, mean_C = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)
    count = mean_C.new_full((1,), x.numel() / x.shape[1])
    moments = gather(torch.cat([mean_C, var_C, count]))
    means_WC, vars_WC, counts_W1 = moments.split([len(mean_C), len(mean_C), 1], dim=1)
    total = counts_W1.detach().sum()
    mean_C = (counts_W1 * means_WC).sum(0) / total
    var_C = (counts_W1 * (vars_WC + (means_WC - mean_C).square())).sum(0) / total
    return mean_C, var_C, total


def convert_batchnorm(model: nn.Module) -> nn.Module:
    """Replace nn.BatchNorm1d and 2d by `GlobalBatchNorm`, in place; state dicts and optimisers keep fitting."""
    if isinstance(model, nn.BatchNorm1d | nn.BatchNorm2d):
        return GlobalBatchNorm.like(model)
    for name, child in model.named_children():
        setattr(model, name, convert_batchnorm(child))
    return model


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _largest(number: int) -> int:
    if world_size() == 1:
        return number
    return int(max_over_ranks_(torch.tensor(number, device=_meeting_place())).item())


def _meeting_place() -> torch.device:
    """Where tensors have to be for this group's collectives."""
    return torch.device("cuda" if _grouped() and dist.get_backend() == "nccl" else "cpu")
