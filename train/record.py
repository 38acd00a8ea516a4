"""What a run tells while it trains: RUN/metrics.jsonl, TensorBoard, a progress bar; and how it is stopped."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from serve.files import atomic_path
from train.checkpoint import METRICS


class MetricsLog:
    """Every step to RUN/metrics.jsonl, TensorBoard and the bar; lines after the step that a run resumes from are dropped."""

    def __init__(self, run: Path, first_step: int, total_steps: int) -> None:
        path = run / METRICS
        lines = path.read_text().splitlines() if path.exists() and first_step else []
        self.past: list[dict[str, float]] = [json.loads(line) for line in lines if line.endswith("}")]
        self.past = [line for line in self.past if line["step"] <= first_step]
        with atomic_path(path) as whole:
            whole.write_text("".join(f"{json.dumps(line)}\n" for line in self.past))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, desc="pretraining", unit="step", dynamic_ncols=True)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one step."""
        self._file.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in metrics.items()}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        shown = {
            "img/s": f"{metrics['samples_per_s']:.0f}",
            "data": f"{metrics['data_share']:.0%}",
            "loss": f"{metrics['loss']:.2f}/{metrics['chance_loss']:.2f}",
            "top1": f"{metrics['contrastive_top1']:.0%}/{metrics['chance_top1']:.1%}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        self._bar.write(sentence, file=sys.stderr)

    def show(self, step: int, name: str, picture_HWC: NDArray[np.uint8]) -> None:
        """A picture in TensorBoard."""
        self._board.add_image(name, picture_HWC, step, dataformats="HWC")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; a second Ctrl-C kills as usual."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:  # SIGTERM may come twice: from a cluster, and from torchrun
            signal.signal(number, signal.default_int_handler)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
