"""The data sets that the literature reports on: how they are evaluated there, and what was reached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.contract import Manifest, Preprocess
from serve.errors import TrainingError
from serve.literature import Network
from serve.sources import Sample
from train.linear import Recipe
from train.probe import groups_of


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set that the literature reports on, and how it is done there: at 224 px, the central 0.875 for the test."""

    classes: int
    train: int
    test: int
    recipe: Recipe
    references: dict[tuple[Any, ...], float]
    """(layers of the head, depth, width, selective kernels) -> top-1 in per cent."""
    source: str
    """Who reached it."""


FRAME = Preprocess(height_px=224, width_px=224, resize="center_crop", crop=0.875, resample="bicubic", jpeg="full")

SIMCLR_V1 = {1: 69.3, 2: 74.2, 4: 76.5}
"""Width -> linear evaluation of ResNet-50 after 1000 epochs (arXiv:2002.05709)."""
SIMCLR_V2 = {
    (50, 1): (71.7, 74.6),
    (50, 2): (75.6, 77.7),
    (101, 1): (73.6, 76.3),
    (101, 2): (77.0, 79.0),
    (152, 1): (74.5, 77.2),
    (152, 2): (77.4, 79.4),
}
"""(Depth, width) -> linear evaluation without and with selective kernels: the table of the official README."""

BENCHMARKS = {
    # README: --learning_rate=0.1 --weight_decay=1e-6 --train_epochs=90 --train_batch_size=4096 --warmup_epochs=0
    "imagenet-linear": Benchmark(
        classes=1000,
        train=1_281_167,
        test=50_000,
        recipe=Recipe(optimizer="Nesterov", rate=0.1, rule="linear", batch_size=4096, epochs=90, weight_decay=1e-6),
        references={(2, "resnet50", width, False): value for width, value in SIMCLR_V1.items()}
        | {(3, f"resnet{key[0]}", key[1], sk): values[sk] for key, values in SIMCLR_V2.items() for sk in (False, True)}
        | {(3, "resnet152", 3, True): 79.8},
        source="the paper",
    ),
    # VISSL, eval_resnet_8gpu_transfer_places205_linear.yaml: the rate falls after epochs 4, 8 and 12 of 14
    "places205": Benchmark(
        classes=205,
        train=2_448_873,
        test=20_500,
        recipe=Recipe(
            optimizer="Nesterov",
            rate=0.01,
            rule="linear",
            batch_size=256,
            epochs=14,
            weight_decay=5e-4,
            drops=(4 / 14, 8 / 14, 12 / 14),
        ),
        references={(2, "resnet50", 1, False): 50.9},
        source="MMSelfSup, 200 epochs of batch 256 and a wider linear layer; the paper has no value",
    ),
}


def compare_data(protocol: str, benchmark: Benchmark, images: ImageSet, manifest: Manifest) -> list[str]:
    """What is not as in the literature, a phrase each. Raises: TrainingError with more classes than the benchmark has."""
    bank, queries = split_for_scoring(images)
    classes = len(set(groups_of(bank)))
    if classes > benchmark.classes:
        raise TrainingError(f"{classes} classes, but {protocol} has {benchmark.classes}; use --protocol linear-sgd")
    counts = (
        (classes, benchmark.classes, "classes"),
        (len(bank), benchmark.train, "training pictures"),
        (len(queries), benchmark.test, "test pictures"),
    )
    findings = [f"{got:,} {what}, not {wanted:,}" for got, wanted, what in counts if got != wanted]
    if not any(sample.group for sample in images.test):
        findings.append("no labelled val folder beside train: every fifth picture is held back")
    unknown = set(groups_of(queries)) - set(groups_of(bank))
    if unknown:
        findings.append(f"{len(unknown)} test classes without training pictures, such as {min(unknown)}")
    frame = manifest.preprocess
    if (frame.height_px, frame.width_px) != (FRAME.height_px, FRAME.width_px):
        findings.append(f"an encoder trained at {frame.height_px}x{frame.width_px} px, not 224x224")
    return findings


