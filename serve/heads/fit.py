"""How a head is fitted: the weight decay, the temperature and the figures come from pictures held back, the weights from all.

Shapes: N pictures, D dimensions, C classes, E = D + 1 (serve/heads/logistic.py), M pictures held back.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax  # type: ignore[import-untyped]

from serve.classify import Head
from serve.errors import TrainingError
from serve.heads.calibrate import calibrated_error, calibration_error, find_temperature, log_loss, threshold_for
from serve.heads.logistic import Reals, logistic_regression, logits
from serve.heads.scores import figures_of

HOW_TO_LABEL = "put each class in a sub-folder, or name it in a CSV's label column"
DECAYS = (100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Strong first: each fit starts where the one before ended. Few pictures want the strong ones."""
_WORSE = 1.05
"""Where the loss is by so much above the least, the decays still weaker are not tried: they are the slow ones."""
DECAY_UNSEEN = 1.0
"""With one picture of each class there is nothing to choose by."""
FOLDS, MANY = 5, 5000
"""Every fifth of a class is held back, each in its turn; of more pictures than MANY one such fifth is enough."""


@dataclass(frozen=True, eq=False)
class Examples:
    """What a head is fitted on."""

    vectors: NDArray[np.float32]
    """(N, D): of unit length."""
    groups: Sequence[str]
    """The class of each."""
    kin: Sequence[Hashable] | None = None
    """Pictures that share it, as those of one animal, are held back together; None: each stands alone."""


@dataclass(frozen=True, eq=False)
class HeldBack:
    """What heads said of pictures they were not fitted on."""

    truth: NDArray[np.int64]
    """(M,)"""
    logits: Reals
    """(M, C)"""
    weight: Reals
    """(M,)"""


def fit_head(
    examples: Examples,
    encoder_id: str,
    *,
    balanced: bool = False,
    abstain_below: float = 0.0,
    wanted_accuracy: float | None = None,
) -> Head:
    """Logistic regression with calibrated probabilities.

    Args: balanced, every class weighs the same, however many pictures it has; abstain_below, the confidence below which the
    head does not decide; wanted_accuracy, choose that confidence so that so large a share of what it decides is right.
    Raises: TrainingError with fewer than two classes, or where wanted_accuracy is out of reach.
    """
    vectors, classes = examples.vectors, sorted(set(examples.groups))
    if len(classes) < 2:
        raise TrainingError(f"a head needs at least two classes, got {classes}; {HOW_TO_LABEL}")
    number = {name: index for index, name in enumerate(classes)}
    y_N = np.array([number[name] for name in examples.groups])
    weight_N = class_weights(y_N, balanced=balanced)
    start_CE = np.zeros((len(classes), vectors.shape[1] + 1))
    decay, held = sweep(vectors, y_N, weight_N, start_CE, validation_folds(y_N, _kin_numbers(examples)))
    temperature = find_temperature(held.logits, held.truth, held.weight) if len(held.truth) else 1.0
    probability_MC = softmax(held.logits / temperature, axis=1)
    if wanted_accuracy is not None:
        right_M = probability_MC.argmax(axis=1) == held.truth
        abstain_below = threshold_for(probability_MC.max(axis=1), right_M, wanted_accuracy)
    theta_CE = logistic_regression(vectors, y_N, weight_N, decay, start_CE) / temperature  # folded in: every server has it
    return Head(
        weight=theta_CE[:, :-1].astype(np.float32),
        bias=theta_CE[:, -1].astype(np.float32),
        classes=tuple(classes),
        encoder_id=encoder_id,
        abstain_below=abstain_below,
        report={
            "fit": "L-BFGS logistic regression",
            "balanced": balanced,
            "pictures": len(y_N),
            "weight_decay": decay,
            "temperature": temperature,
            **_calibration(held),
            **figures_of(probability_MC, held.truth, classes, abstain_below),
        },
    )


def class_weights(y_N: NDArray[np.int64], *, balanced: bool) -> Reals:
    """What each picture weighs, 1 on average."""
    count_C = np.bincount(y_N)
    return len(y_N) / (len(count_C) * count_C[y_N]) if balanced else np.ones(len(y_N))


def sweep(
    x_ND: NDArray[np.float32], y_N: NDArray[np.int64], weight_N: Reals, start_CE: Reals, folds: Sequence[NDArray[np.bool_]]
) -> tuple[float, HeldBack]:
    """The weight decay with the least log loss on what is held back, and what was said there."""
    place_M = np.concatenate([np.flatnonzero(held_N) for held_N in folds] or [np.zeros(0, np.int64)])
    truth_M, weight_M = y_N[place_M], weight_N[place_M]
    best = DECAY_UNSEEN, HeldBack(truth_M, np.zeros((0, len(start_CE))), weight_M)
    least, thetas = np.inf, [start_CE] * len(folds)
    for decay in DECAYS if folds else ():
        pairs = list(zip(folds, thetas, strict=True))
        thetas = [logistic_regression(x_ND, y_N, weight_N * ~held_N, decay, theta_CE) for held_N, theta_CE in pairs]
        logits_MC = np.concatenate([logits(theta, x_ND[held]) for held, theta in zip(folds, thetas, strict=True)])
        loss = log_loss(logits_MC, truth_M, weight_M)
        if loss < least:
            least, best = loss, (decay, HeldBack(truth_M, logits_MC, weight_M))
        elif loss > _WORSE * least:
            break
    return best


def validation_folds(y_N: NDArray[np.int64], kin_N: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Masks (N,) of what is held back in each turn, kin together. A class that would be gone is only learned from there."""
    turn_N, folds = _turns(y_N, kin_N), []
    for turn in range(FOLDS):
        held_N = turn_N == turn
        left_C = np.bincount(y_N[~held_N], minlength=y_N.max() + 1)
        folds.append(held_N & (left_C[y_N] > 0))
    return [held_N for held_N in folds if held_N.any()][: 1 if len(y_N) > MANY else FOLDS]


def _turns(y_N: NDArray[np.int64], kin_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,): kin take turns within the class of their first picture; of a class that has one kin only, the pictures do."""
    _, first_K, number_N = np.unique(kin_N, return_index=True, return_inverse=True)
    turn_N = _places(y_N[first_K])[number_N] % FOLDS
    for one in range(y_N.max() + 1):
        its = np.flatnonzero(y_N == one)
        if len(its) and (kin_N[its] == kin_N[its[0]]).all():
            turn_N[its] = np.arange(len(its)) % FOLDS
    return turn_N


def _places(class_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """(K,): how many of the same class come before each."""
    order_K = np.argsort(class_K, kind="stable")
    place_K = np.empty(len(class_K), np.int64)
    place_K[order_K] = np.concatenate([np.arange(count) for count in np.bincount(class_K)])
    return place_K


def _kin_numbers(examples: Examples) -> NDArray[np.int64]:
    """(N,): from 0, in the order of their first pictures."""
    numbers: dict[Hashable, int] = {}
    kin = range(len(examples.groups)) if examples.kin is None else examples.kin
    return np.array([numbers.setdefault(key, len(numbers)) for key in kin], np.int64)


def _calibration(held: HeldBack) -> dict[str, float | None]:
    """Calibration error with the plain logits, and with a temperature."""
    if not len(held.truth):
        return {"ece_before": None, "ece": None}
    before = calibration_error(softmax(held.logits, axis=1), held.truth, held.weight)
    return {"ece_before": before, "ece": calibrated_error(held.logits, held.truth, held.weight)}
