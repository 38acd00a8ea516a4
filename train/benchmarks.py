"""The data sets that the literature reports on, how a linear layer is fitted there, and what was reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.contract import Manifest, Preprocess
from serve.errors import TrainingError
from serve.literature import Network, compare, network_of
from serve.samples import ImageSet, Sample
from train.finetune import Start
from train.linear import LINEAR_SGD, Recipe
from train.probe import groups_of, split_for_scoring


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set that the literature reports on, at 224 px, the central 0.875 for the test."""

    classes: int
    train: int
    """Labelled pictures to learn from."""
    test: int
    top1: dict[Network, float]
    """In per cent."""
    top5: dict[Network, float] = field(default_factory=dict)
    source: str
    """Who reached it."""


FRAME = Preprocess(height_px=224, width_px=224, resize="center_crop", crop=0.875, resample="bicubic", jpeg="full")

LINEAR_RECIPES = {
    "linear-sgd": LINEAR_SGD,
    # README: --learning_rate=0.1 --weight_decay=1e-6 --train_epochs=90 --train_batch_size=4096 --warmup_epochs=0
    "imagenet-linear": Recipe(optimizer="Nesterov", rate=0.1, rule="linear", batch_size=4096, epochs=90, weight_decay=1e-6),
    # VISSL, eval_resnet_8gpu_transfer_places205_linear.yaml: the rate falls after epochs 4, 8 and 12 of 14
    "places205": Recipe(
        optimizer="Nesterov",
        rate=0.01,
        rule="linear",
        batch_size=256,
        epochs=14,
        weight_decay=5e-4,
        drops=(4 / 14, 8 / 14, 12 / 14),
    ),
}

_V1_WIDTHS = (1, 2, 4)
_V2_NETWORKS = [(depth, width, sk) for depth in (50, 101, 152) for width in (1, 2) for sk in (False, True)] + [(152, 3, True)]


def _simclr_v1(*values: float) -> dict[Network, float]:
    """ResNet-50, 1x, 2x and 4x, after 1000 epochs (arXiv:2002.05709)."""
    return {(2, "resnet50", width, False): value for width, value in zip(_V1_WIDTHS, values, strict=True)}


def _simclr_v2(*values: float) -> dict[Network, float]:
    """A column of the table in the official README (arXiv:2006.10029, table 1)."""
    return {(3, f"resnet{depth}", width, sk): value for (depth, width, sk), value in zip(_V2_NETWORKS, values, strict=True)}


BENCHMARKS = {
    "imagenet-linear": Benchmark(
        classes=1000,
        train=1_281_167,
        test=50_000,
        top1=_simclr_v1(69.3, 74.2, 76.5)
        | _simclr_v2(71.7, 74.6, 75.6, 77.7, 73.6, 76.3, 77.0, 79.0, 74.5, 77.2, 77.4, 79.4, 79.8),
        top5=_simclr_v1(89.0, 92.0, 93.2),
        source="the paper",
    ),
    "places205": Benchmark(
        classes=205,
        train=2_448_873,
        test=20_500,
        top1={(2, "resnet50", 1, False): 53.3},
        source="SwAV's run of SimCLR, on a finer grid than one pooled vector; the paper has no value",
    ),
}

FINE_TUNING = {
    "1percent.txt": Benchmark(
        classes=1000,
        train=12_811,
        test=50_000,
        top1=_simclr_v1(48.3, 58.5, 63.0)
        | _simclr_v2(57.9, 64.5, 66.3, 70.6, 62.1, 68.3, 69.1, 73.2, 64.0, 70.0, 70.2, 74.2, 74.9),
        top5=_simclr_v1(75.5, 83.0, 85.8),
        source="the paper, 1 % of the labels",
    ),
    "10percent.txt": Benchmark(
        classes=1000,
        train=128_116,
        test=50_000,
        top1=_simclr_v1(65.6, 71.7, 74.4)
        | _simclr_v2(68.4, 72.1, 73.9, 77.0, 71.4, 75.1, 75.8, 78.8, 73.0, 76.5, 76.6, 79.4, 80.1),
        top5=_simclr_v1(87.8, 91.2, 92.6),
        source="the paper, 10 % of the labels",
    ),
}
"""By the names of the official lists in google-research/simclr, imagenet_subsets/."""


def benchmark_of(protocol: str, label_list: Path | None) -> Benchmark | None:
    """What the literature has of a protocol: of fine-tuning, where it starts from an official list."""
    if protocol == "finetune":
        return FINE_TUNING.get(label_list.name) if label_list else None
    return BENCHMARKS.get(protocol)


def compare_data(
    protocol: str, benchmark: Benchmark, bank: Sequence[Sample], images: ImageSet, manifest: Manifest
) -> list[str]:
    """What is not as in the literature, a phrase each; `bank` is what is learned from. Raises: TrainingError.

    More classes than the benchmark has are refused.
    """
    queries = split_for_scoring(images)[1]
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


def compare_start(manifest: Manifest, start: Start) -> list[str]:
    """SimCLR fine-tuned the encoder; SimCLR v2, with three layers in its head, also the first of these."""
    version_2 = network_of(manifest)[0] == 3
    if version_2 == (start == "head"):
        return []
    return [f"fine-tuned from the {start}, where a network like this was from the {'head' if version_2 else 'encoder'}"]


def compare_result(benchmark: Benchmark, manifest: Manifest, figures: dict[str, Any], findings: list[str]) -> dict[str, Any]:
    """The literature's top-1 and top-5 for this network, if there are such, and the differences in points."""
    network = network_of(manifest)
    first = compare(figures["accuracy"], benchmark.top1.get(network), benchmark.source, findings)
    second = compare(figures.get("top5"), benchmark.top5.get(network), benchmark.source, findings)
    return first | {"top5_reference": second["reference"], "top5_difference_points": second["difference_points"]}
