"""Evaluation by name, as `simclr evaluate` offers it: what is scored, and what the literature reached the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from serve.contract import Manifest, Preprocess
from serve.encoder import Encoder as ServedEncoder
from serve.errors import TrainingError
from serve.sources import ImageSet, Sample
from train.checkpoint import load_encoder, save_encoder, write_config
from train.encoder import Encoder
from train.finetune import Start, head_of, label_subset, listed, recipe_for
from train.linear import LINEAR_SGD, Classifier, Recipe, fit, open_feed, score
from train.probe import HOW_TO_LABEL, chance_accuracy, groups_of, labelled_images, split_for_scoring
from train.probe import evaluate as evaluate_vectors

Protocol: TypeAlias = Literal["knn", "linear", "linear-sgd", "finetune", "imagenet-linear", "places205"]


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


def evaluate(
    encoder: ServedEncoder,
    source: str,
    test: str | None,
    protocol: Protocol,
    *,
    run: Path | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    label_fraction: float = 1.0,
    label_list: Path | None = None,
    start: Start = "encoder",
    save: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score an encoder on labelled pictures. Returns plain JSON, which `report_lines` puts into words.

    Args: run, the encoder's RUN folder if it has one; epochs, batch_size, other than the protocol's; label_fraction or
    label_list, start and save (a new RUN folder for the tuned encoder) belong to `finetune`.
    Raises: SourceError, TrainingError, ContractError, OSError.
    """
    if protocol in ("knn", "linear"):
        return evaluate_vectors(encoder, source, test, "knn" if protocol == "knn" else "linear")
    network, manifest = _trainable(run, protocol, save)
    images = labelled_images(source, test)
    bank, queries = split_for_scoring(images)
    benchmark, layer = BENCHMARKS.get(protocol), None
    recipe = benchmark.recipe if benchmark else LINEAR_SGD
    settings: dict[str, Any] = {"protocol": protocol, "encoder_id": manifest.encoder_id}
    if protocol == "finetune":
        labelled = len(bank)
        bank = listed(bank, label_list) if label_list else label_subset(bank, label_fraction, seed)
        recipe = recipe_for(start, len(bank) / labelled if label_list else label_fraction)
        settings |= {"from": start, "label_share": len(bank) / labelled}
        layer = head_of(run).first(1) if run and start == "head" else None
    numbers = _class_numbers(bank, source)
    findings = compare_data(protocol, benchmark, images, manifest) if benchmark else []
    recipe = replace(recipe, epochs=epochs or recipe.epochs, batch_size=batch_size or recipe.batch_size)
    model = Classifier(network, len(numbers), layer)
    preprocess = FRAME if benchmark else manifest.preprocess
    frozen = protocol != "finetune"
    report = settings | fit_and_score(model, bank, queries, numbers, recipe, preprocess, frozen=frozen, seed=seed)
    if save is not None:
        _save(save, network, manifest, report)
    return report | (compare_result(benchmark, manifest, report["accuracy"], findings) if benchmark else {})


def fit_and_score(
    model: Classifier,
    bank: Sequence[Sample],
    queries: Sequence[Sample],
    numbers: dict[str, int],
    recipe: Recipe,
    preprocess: Preprocess,
    *,
    frozen: bool,
    seed: int,
) -> dict[str, Any]:
    """Train a classifier in place; how well it does, on how much, and by which settings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    feed = open_feed(bank, preprocess, seed=seed)
    recipe = recipe.for_pictures(len(feed))
    fit(model, feed, numbers, recipe, preprocess, frozen=frozen, device=device, seed=seed)
    figures, unreadable = score(model, queries, numbers, preprocess, device=device)
    return {
        **figures,
        "chance": chance_accuracy(queries),
        "classes": len(numbers),
        "bank": len(bank) - len(feed.unreadable),
        "unreadable": len(feed.unreadable) + len(unreadable),
        "recipe": asdict(recipe) | {"drops": list(recipe.drops), "peak_lr": recipe.peak_lr, "seed": seed},
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


def compare_result(benchmark: Benchmark, manifest: Manifest, accuracy: float, findings: list[str]) -> dict[str, Any]:
    """The literature's top-1 for this network, if there is one, and the difference in points."""
    facts: dict[str, Any] = manifest.training
    network = (facts.get("head_layers", 2), facts["arch"], facts["width"], bool(facts.get("sk", False)))
    reference = benchmark.references.get(network)
    return {
        "differs": findings,
        "reference": reference,
        "reference_source": benchmark.source,
        "difference_points": None if reference is None else 100 * accuracy - reference,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report of `evaluate` in words."""
    top5 = f" (top-5 {report['top5']:.2%})" if report.get("top5") is not None else ""
    lines = [
        f"{report['protocol']} accuracy {report['accuracy']:.2%}{top5} on {report['queries']} pictures, "
        f"{report['classes']} classes, {report['bank']} to learn from (chance {report['chance']:.2%})"
    ]
    if recipe := report.get("recipe"):
        start = f"from the {report['from']}, {report['label_share']:.1%} of the labels, " if "from" in report else ""
        lines.append(
            f"{start}{recipe['optimizer']}, {recipe['epochs']:g} epochs in batches of {recipe['batch_size']}, "
            f"peak lr {recipe['peak_lr']:.3g}, weight decay {recipe['weight_decay']:g}"
        )
    lines += [f"differs from the literature: {finding}" for finding in report.get("differs", ())]
    if report.get("reference") is not None:
        comparable = "" if not report["differs"] else ", not comparable"
        lines.append(
            f"top-1 there: {report['reference']} % ({report['reference_source']}); "
            f"difference {report['difference_points']:+.1f} points{comparable}"
        )
    elif "reference" in report:
        lines.append(f"no top-1 of this network is known to us ({report['reference_source']})")
    return lines


def _trainable(run: Path | None, protocol: str, save: Path | None) -> tuple[Encoder, Manifest]:
    if run is None:
        raise TrainingError(
            f"--protocol {protocol} trains on the network itself and needs a RUN folder; of an exported model only its "
            "vectors can be scored: --protocol knn or linear"
        )
    if save is not None and save.exists():
        raise TrainingError(f"{save}: already exists; choose another folder for the fine-tuned encoder")
    return load_encoder(run)


def _class_numbers(bank: Sequence[Sample], source: str) -> dict[str, int]:
    numbers = {name: number for number, name in enumerate(sorted(set(groups_of(bank))))}
    if len(numbers) < 2:
        raise TrainingError(f"{source}: a classifier needs at least two classes, got {list(numbers)}; {HOW_TO_LABEL}")
    return numbers


def _save(folder: Path, network: Encoder, manifest: Manifest, report: dict[str, Any]) -> None:
    facts = manifest.training | {"method": "SimCLR, fine-tuned", "fine_tuning": report}
    write_config(folder, facts)
    save_encoder(folder, network, manifest.preprocess, facts)
