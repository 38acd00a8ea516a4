"""What fine-tuning starts from, the encoder (SimCLR) or the first layer of its head (SimCLR v2), and on which labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import torch

from serve.errors import ContractError, TrainingError, first_line
from serve.samples import Sample
from train.checkpoint import CHECKPOINT, load_checkpoint
from train.data import step_generator
from train.encoder import ProjectionHead
from train.linear import Recipe

Start: TypeAlias = Literal["encoder", "head"]

FROM_ENCODER = Recipe(optimizer="Nesterov", rate=0.05, rule="linear", batch_size=4096, epochs=60)
"""SimCLR, appendix B.5: no weight decay, no warm-up; 60 epochs on 1 % of the labels, 30 on 10 %."""
FROM_HEAD = Recipe(optimizer="LARS", rate=0.005, rule="sqrt", batch_size=1024, epochs=60)
"""SimCLR v2, the official README's command for 1 % of ImageNet's labels."""


def recipe_for(start: Start, fraction: float) -> Recipe:
    """60 epochs on about 1 % of the labels, 30 on about 10 % and more."""
    recipe = FROM_ENCODER if start == "encoder" else FROM_HEAD
    return recipe if fraction < 0.05 else replace(recipe, epochs=30)


def head_of(run: Path) -> ProjectionHead:
    """The projection head of a pretraining run, out of its checkpoint. Raises: TrainingError, ContractError."""
    if not (run / CHECKPOINT).exists():
        raise TrainingError(f"{run}: holds no {CHECKPOINT}, where the projection head would be; fine-tune with --from encoder")
    state = {
        name.removeprefix("head."): value for name, value in load_checkpoint(run)["model"].items() if name.startswith("head.")
    }
    try:
        linears = [value for value in state.values() if value.ndim == 2]
        head = ProjectionHead(linears[0].shape[1], linears[-1].shape[0], len(linears))
        head.load_state_dict(state)
    except (IndexError, RuntimeError) as error:
        raise ContractError(
            f"{run / CHECKPOINT}: holds no projection head of ours ({first_line(error)}); use --from encoder"
        ) from error
    if head.layers < 2:
        raise TrainingError(f"{run}: its projection head has one layer only; fine-tune with --from encoder")
    return head


def label_subset(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """The same share of every class, at least one picture of each, in the samples' order."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, wanted more than 0 and at most 1")
    by_class: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        by_class.setdefault(str(sample.group), []).append(row)
    generator = step_generator(seed, 0, stream="label subset")
    chosen: list[int] = []
    for name in sorted(by_class):
        rows = by_class[name]
        order = torch.randperm(len(rows), generator=generator).tolist()
        chosen += [rows[place] for place in order[: max(1, round(fraction * len(rows)))]]
    return [samples[row] for row in sorted(chosen)]


def listed(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """The pictures whose file names stand in a list, one a line: the official `imagenet_subsets/1percent.txt` is one.

    Raises: TrainingError if the list names none of them, or others.
    """
    try:
        wanted = {PurePosixPath(line.strip()).name for line in path.read_text().splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: not a readable list of file names ({error})") from error
    found = [sample for sample in samples if PurePosixPath(sample.source).name in wanted]
    missing = wanted - {PurePosixPath(sample.source).name for sample in found}
    if missing or not found:
        example = f", such as {min(missing)}" if missing else ""
        raise TrainingError(f"{path}: {len(missing)} of its {len(wanted)} pictures are not in --images{example}")
    return found
