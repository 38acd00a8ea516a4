"""NT-Xent, forward and backward: time and peak extra memory of ours, lightly's and pytorch-metric-learning's, in one run.

    python benchmarks/loss.py --peer-python .venv-peers/bin/python

Every measurement runs in a process of its own, on the same projections (D = 128, float32). Memory is the peak of the
process's resident set above what it had before its first call, after a call with eight pictures that loads the libraries.
Time is the median, and the range, of calls after a warm-up. All sides must agree on the loss and on the gradient's norm.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import GIB, MIB, memory_bytes, run_side

DIM, TEMPERATURE = 128, 0.2


def main() -> None:
    available_gib = memory_bytes("MemAvailable", "/proc/meminfo") / GIB
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512 * 2**power for power in range(7)], metavar="B")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=tuple(SIDES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gib", type=float, default=available_gib - 1, help="what a side may take (all but one)")
    parser.add_argument("--timeout-s", type=float, default=900, help="for one measurement")
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.batch_sizes[0], arguments.repeats, arguments.memory_gib)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure every side at every batch size and print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, up to {arguments.memory_gib:.0f} GiB\n")
    print(f"{'B':>6}  {'':16} {'time, ms':>9}  {'range':15} {'memory, MiB':>11}")
    found: list[dict[str, Any]] = []
    for batch_size in arguments.batch_sizes:
        for side in arguments.sides:
            hopeless = [one for one in found if one["side"] == side and "failed" in one]
            one = hopeless[0] | {"batch_size": batch_size} if hopeless else measure_apart(side, batch_size, arguments)
            found.append(one)
            show(one)
        check_agreement([one for one in found if one["batch_size"] == batch_size and "loss" in one])
    show_aim(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def measure_apart(side: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    python = sys.executable if side.startswith("ours") else arguments.peer_python
    options = ("--batch-sizes", batch_size, "--repeats", arguments.repeats, "--memory-gib", arguments.memory_gib)
    try:
        return dict(json.loads(run_side(python, __file__, side, *options, timeout_s=arguments.timeout_s)))
    except subprocess.TimeoutExpired:
        return {"side": side, "batch_size": batch_size, "failed": f"takes more than {arguments.timeout_s:.0f} s"}


def measure(side: str, batch_size: int, repeats: int, memory_gib: float) -> dict[str, Any]:
    """One side at one batch size, in this process."""
    loss_of = SIDES[side]()
    found: dict[str, Any] = {"side": side, "batch_size": batch_size}
    one_call(loss_of, projections(8))
    z_2BD = projections(batch_size)
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    limit = memory_bytes("VmSize") + int(memory_gib * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        loss, gradient_norm, _ = one_call(loss_of, z_2BD)
        times_s = [one_call(loss_of, z_2BD)[2] for _ in range(repeats)]
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return found | {"failed": f"needs more than {memory_gib:.0f} GiB"}
    extra = memory_bytes("VmHWM") - before
    return found | {"loss": loss, "gradient_norm": gradient_norm, "times_s": times_s, "extra_bytes": extra}


def one_call(loss_of: Callable[[Tensor], Tensor], z_2BD: Tensor) -> tuple[float, float, float]:
    """Loss, norm of its gradient, seconds."""
    z_2BD.grad = None
    started = time.perf_counter()
    loss = loss_of(z_2BD)
    loss.backward()
    seconds = time.perf_counter() - started
    assert z_2BD.grad is not None
    return loss.item(), z_2BD.grad.norm().item(), seconds


def projections(batch_size: int) -> Tensor:
    """Views that are half their image and half noise."""
    random = torch.Generator().manual_seed(0)
    images_BD = torch.randn(batch_size, DIM, generator=random)
    return (images_BD.repeat(2, 1) + torch.randn(2 * batch_size, DIM, generator=random)).requires_grad_()


def ours_tiled() -> Callable[[Tensor], Tensor]:
    from train.loss import TILE_ROWS, nt_xent_loss

    return lambda z_2BD: nt_xent_loss(z_2BD, temperature=TEMPERATURE, tile_rows=TILE_ROWS)


def ours_plain() -> Callable[[Tensor], Tensor]:
    from train.loss import nt_xent_loss

    return lambda z_2BD: nt_xent_loss(z_2BD, temperature=TEMPERATURE)


def lightly() -> Callable[[Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(TEMPERATURE)
    return lambda z_2BD: criterion(*z_2BD.chunk(2))


def metric_learning() -> Callable[[Tensor], Tensor]:
    from pytorch_metric_learning.losses import NTXentLoss

    criterion = NTXentLoss(TEMPERATURE)
    return lambda z_2BD: criterion(z_2BD, torch.arange(len(z_2BD) // 2).repeat(2))


SIDES = {"ours, tiled": ours_tiled, "ours, plain": ours_plain, "lightly": lightly, "metric-learning": metric_learning}


def show(one: dict[str, Any]) -> None:
    label = f"{one['batch_size']:6}  {one['side']:16}"
    if "failed" in one:
        print(f"{label} {one['failed']}", flush=True)
        return
    times_ms = [1000 * seconds for seconds in one["times_s"]]
    spread = f"{min(times_ms):.0f} to {max(times_ms):.0f}"
    print(f"{label} {statistics.median(times_ms):9.0f}  {spread:15} {one['extra_bytes'] / MIB:11.0f}", flush=True)


def check_agreement(found: list[dict[str, Any]]) -> None:
    for one in found[1:]:
        for name in ("loss", "gradient_norm"):
            if not math.isclose(one[name], found[0][name], rel_tol=1e-3):
                sys.exit(f"{one['side']} and {found[0]['side']} disagree: {name} {one[name]} and {found[0][name]}")


def show_aim(found: list[dict[str, Any]]) -> None:
    """Ours beside lightly at 8192, or the largest batch that both have done."""
    done = {(one["side"], one["batch_size"]): one for one in found if "loss" in one}
    shared = [size for side, size in done if side == "lightly" and ("ours, tiled", size) in done]
    if shared:
        size = 8192 if 8192 in shared else max(shared)
        ours, theirs = done["ours, tiled", size], done["lightly", size]
        memory = ours["extra_bytes"] / theirs["extra_bytes"]
        duration = statistics.median(ours["times_s"]) / statistics.median(theirs["times_s"])
        print(f"\nB = {size}: {memory:.1%} of lightly's memory, {duration:.0%} of its time")


if __name__ == "__main__":
    main()
