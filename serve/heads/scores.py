"""How good a head is on pictures that it was not fitted on: by class, and where it abstains.

Shapes: M pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_ROWS = 40


def figures_of(
    probability_MC: NDArray[np.floating], truth_M: NDArray[np.int64], classes: Sequence[str], abstain_below: float
) -> dict[str, Any]:
    """Accuracy, figures of each class, who was taken for whom, what is left where the head abstains; as JSON."""
    named_M, confidence_M = probability_MC.argmax(axis=1), probability_MC.max(axis=1)
    counts_CC = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts_CC, (truth_M, named_M), 1)
    per_class = {name: _class_figures(number, counts_CC) for number, name in enumerate(classes)}
    decided_M = confidence_M >= abstain_below
    return {
        "held_back_pictures": len(truth_M),
        "held_back_accuracy": _share(np.trace(counts_CC), len(truth_M)),
        "mean_recall": _mean(row["recall"] for row in per_class.values()),
        "mean_f1": _mean(row["f1"] for row in per_class.values()),
        "abstain_below": abstain_below,
        "decided": _share(decided_M.sum(), len(truth_M)),
        "decided_accuracy": _share((named_M == truth_M)[decided_M].sum(), decided_M.sum()),
        "per_class": per_class,
        "confusion": [[int(true), int(named), int(counts_CC[true, named])] for true, named in np.argwhere(counts_CC)],
    }


def confusion_matrix(report: Mapping[str, Any], classes: int) -> NDArray[np.int64]:
    """Pictures by true class (row) and class named (column), from a report."""
    counts_CC = np.zeros((classes, classes), np.int64)
    for true, named, count in report["confusion"]:
        counts_CC[true, named] = count
    return counts_CC


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The figures for a person; of many classes, those with the lowest F1."""
    if report["held_back_accuracy"] is None:
        yield "one picture of each class: none could be held back, so nothing was measured and nothing calibrated"
        return
    rows = sorted(report["per_class"].items(), key=lambda row: -1.0 if row[1]["f1"] is None else row[1]["f1"])
    width = min(40, max(len(name) for name in ("class", *report["per_class"])))
    yield f"{'class':{width}}  precision  recall      F1  held back"
    for name, row in rows[:_MOST_ROWS]:
        figures = f"{_percent(row['precision']):>9}  {_percent(row['recall']):>6}  {_percent(row['f1']):>6}"
        yield f"{name[:width]:{width}}  {figures}  {row['support']:>9}"
    if len(rows) > _MOST_ROWS:
        yield f"... and {len(rows) - _MOST_ROWS} classes with a higher F1"
    yield f"mean recall {_percent(report['mean_recall'])}, mean F1 {_percent(report['mean_f1'])}"
    yield (
        f"weight decay {report['weight_decay']:g}; temperature {report['temperature']:.3g} takes the calibration error "
        f"from {report['ece_before']:.2%} to {report['ece']:.2%}"
    )
    if report["abstain_below"]:
        yield (
            f"abstains below {report['abstain_below']:.4f}: decides {_percent(report['decided'])} of the pictures, "
            f"{_percent(report['decided_accuracy'])} of these rightly"
        )


def _class_figures(number: int, counts_CC: NDArray[np.int64]) -> dict[str, Any]:
    hits, support, named = counts_CC[number, number], counts_CC[number].sum(), counts_CC[:, number].sum()
    return {
        "precision": _share(hits, named),
        "recall": _share(hits, support),
        "f1": _share(2 * hits, support + named),
        "support": int(support),
    }


def _share(part: np.integer | int, whole: np.integer | int) -> float | None:
    return float(part / whole) if whole else None


def _mean(figures: Iterator[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
