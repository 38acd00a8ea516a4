"""Evaluation by name, as `simclr evaluate` offers it: what is scored, and what the literature reached the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from serve.classify import Head
from serve.contract import Manifest, Preprocess
from serve.encoder import Encoder as ServedEncoder
from serve.errors import TrainingError
from serve.heads.fit import HOW_TO_LABEL
from serve.literature import comparison_lines
from serve.samples import Sample
from train.benchmarks import FRAME, LINEAR_RECIPES, benchmark_of, compare_data, compare_result, compare_start
from train.checkpoint import load_encoder, save_encoder, write_config
from train.encoder import Encoder
from train.finetune import Start, head_of, label_subset, listed, recipe_for
from train.linear import Classifier, Recipe, fit, open_feed, score
from train.probe import chance_accuracy, groups_of, labelled_images, split_for_scoring
from train.probe import evaluate as evaluate_vectors
from train.torch_encoder import plain_id

Protocol: TypeAlias = Literal["knn", "linear", "linear-sgd", "finetune", "imagenet-linear", "places205"]


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
    label_list and start belong to `finetune`; save, a new RUN folder for the tuned encoder, or HEAD.npz for a linear layer.
    Raises: SourceError, TrainingError, ContractError, OSError.
    """
    if protocol in ("knn", "linear"):
        return evaluate_vectors(encoder, source, test, "knn" if protocol == "knn" else "linear")
    network, manifest = _trainable(run, protocol, save)
    images = labelled_images(source, test)
    bank, queries = split_for_scoring(images)
    settings: dict[str, Any] = {"protocol": protocol, "encoder_id": manifest.encoder_id}
    layer = None
    if protocol == "finetune":
        labelled = len(bank)
        bank = listed(bank, label_list) if label_list else label_subset(bank, label_fraction, seed)
        settings |= {"from": start, "label_share": len(bank) / labelled}
        recipe = recipe_for(start, settings["label_share"] if label_list else label_fraction)
        layer = head_of(run).first(1) if run and start == "head" else None
    else:
        recipe = LINEAR_RECIPES[protocol]
    numbers = _class_numbers(bank, source)
    benchmark = benchmark_of(protocol, label_list)
    findings = compare_data(protocol, benchmark, bank, images, manifest) if benchmark else []
    recipe = replace(recipe, epochs=epochs or recipe.epochs, batch_size=batch_size or recipe.batch_size)
    model = Classifier(network, len(numbers), layer)
    preprocess = FRAME if benchmark else manifest.preprocess
    frozen = protocol != "finetune"
    report = settings | fit_and_score(model, bank, queries, numbers, recipe, preprocess, frozen=frozen, seed=seed)
    if save is not None and frozen:
        _save_head(save, model, manifest, tuple(numbers), report)
    elif save is not None:
        _save_encoder(save, network, manifest, report)
    if benchmark is None:
        return report
    findings += [] if frozen else compare_start(manifest, start)
    return report | compare_result(benchmark, manifest, report, findings)


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
        "preprocess": preprocess.model_dump(),
        "recipe": asdict(recipe) | {"drops": list(recipe.drops), "peak_lr": recipe.peak_lr, "seed": seed},
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
    if frame := report.get("preprocess"):
        lines.append(
            f"pictures: {frame['height_px']}x{frame['width_px']} px, {frame['resize']} {frame['crop']:g}, {frame['resample']}"
        )
    lines += comparison_lines(report, "top-1")
    if report.get("top5_difference_points") is not None:
        lines.append(f"top-5 there: {report['top5_reference']} %; difference {report['top5_difference_points']:+.1f} points")
    return lines


def _trainable(run: Path | None, protocol: str, save: Path | None) -> tuple[Encoder, Manifest]:
    if run is None:
        raise TrainingError(
            f"--protocol {protocol} trains on the network itself and needs a RUN folder; of an exported model only its "
            "vectors can be scored: --protocol knn or linear"
        )
    if save is not None and save.exists():
        raise TrainingError(f"{save}: already exists; choose another --save")
    return load_encoder(run)


def _class_numbers(bank: Sequence[Sample], source: str) -> dict[str, int]:
    numbers = {name: number for number, name in enumerate(sorted(set(groups_of(bank))))}
    if len(numbers) < 2:
        raise TrainingError(f"{source}: a classifier needs at least two classes, got {list(numbers)}; {HOW_TO_LABEL}")
    return numbers


def _save_encoder(folder: Path, network: Encoder, manifest: Manifest, report: dict[str, Any]) -> None:
    facts = manifest.training | {"method": "SimCLR, fine-tuned", "fine_tuning": report}
    write_config(folder, facts)
    save_encoder(folder, network, manifest.preprocess, facts)


def _save_head(path: Path, model: Classifier, manifest: Manifest, classes: tuple[str, ...], report: dict[str, Any]) -> None:
    """On plain features, and so of the encoder that `open_run(run, unit=False)` opens."""
    weight, bias = (value.detach().cpu().numpy() for value in (model.linear.weight, model.linear.bias))
    Head(weight=weight, bias=bias, classes=classes, encoder_id=plain_id(manifest), report=report).save(path)
