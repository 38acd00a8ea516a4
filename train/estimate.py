"""How much memory a training step will take, before the first one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

MATRICES, FLOAT_BYTES = 3, 4
"""NT-Xent holds about three blocks of similarities at once: logits, their softmax and its gradient."""
HEAP_SHARE = 0.55
"""Of the activations: on a CPU glibc keeps so much of what was freed, in pieces that fit nothing (measured, see below)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a step holds at its peak, by what they are."""

    weights: int
    """Weights, gradients and momentum; with mixed precision also the copies of the weights."""
    activations: int
    """What the forward pass of one chunk keeps for the backward pass."""
    views: int
    loss: int
    heap: int
    """On a CPU, freed memory that the C library keeps."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations + self.views + self.loss + self.heap

    def __str__(self) -> str:
        parts = {
            "activations": self.activations,
            "weights and momentum": self.weights,
            "views": self.views,
            "loss": self.loss,
            "heap": self.heap,
        }
        named = ", ".join(f"{name} {_readable(count)}" for name, count in parts.items() if count)
        return f"about {_readable(self.total)} a step ({named})"


def memory_estimate(
    model: nn.Module,
    frame: tuple[int, int],
    *,
    batch_size: int,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
    tile_rows: int | None = None,
    world_size: int = 1,
    on_gpu: bool = False,
) -> MemoryEstimate:
    """What a step of `batch_size` pictures (two views each, `chunk` at a time) takes of a process, beyond torch and the data.

    Args: frame: (height, width) of the views. dtype: what autocast computes in. tile_rows: as in `nt_xent_loss`.

    The forward pass is played through without numbers, on torch's `meta` device: it takes no memory and no random number and
    leaves the model as it is. Take the model before it is compiled or wrapped for several processes.

    Measured on a CPU, as the growth of VmHWM over two steps of seven settings (ResNet-18 and -50, 16 to 224 px, fp32 and bf16,
    0.27 to 2.1 GiB): 0.90 to 1.18 times the estimate; where the heap gave all back (MALLOC_MMAP_THRESHOLD_=65536), 1.03 to
    1.06 times the estimate without its heap share. Not measured on a GPU, whose convolutions may ask for workspaces besides.
    """
    pictures = min(chunk or batch_size, batch_size // world_size)
    parameters = sum(weight.numel() for weight in model.parameters())
    cast_bytes = dtype.itemsize if dtype.itemsize < FLOAT_BYTES else 0  # autocast's copies of weights and views
    side = min(tile_rows or 2 * batch_size, 2 * batch_size)
    activations = _saved_bytes(model, (2 * pictures, 3, *frame), dtype)
    return MemoryEstimate(
        weights=parameters * (3 * FLOAT_BYTES + cast_bytes),
        activations=activations,
        views=2 * pictures * 3 * frame[0] * frame[1] * (FLOAT_BYTES + cast_bytes),
        loss=MATRICES * FLOAT_BYTES * side**2,
        heap=0 if on_gpu else round(HEAP_SHARE * activations),
    )


def _saved_bytes(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of distinct tensors that a training pass keeps for its backward pass, weights and input left out."""
    views = torch.empty(shape, dtype=dtype, device="meta")
    state = {name: _meta(tensor, dtype).requires_grad_() for name, tensor in model.named_parameters()}
    state |= {name: _meta(tensor, dtype) for name, tensor in model.named_buffers()}
    mine = {tensor.untyped_storage()._cdata for tensor in (views, *state.values())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            saved[storage._cdata] = storage  # held on to, so that no other gets its address
        return tensor.detach()  # the tensor itself would hold on to the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(model, state, (views,))
    return sum(storage.nbytes() for storage in saved.values())


def _meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
