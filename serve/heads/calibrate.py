"""Probabilities that mean what they say: temperature, calibration error, and the confidence below which a head abstains.

Shapes: M pictures that the head was not fitted on, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from scipy.special import log_softmax, softmax  # type: ignore[import-untyped]

from serve.errors import TrainingError

Reals = NDArray[np.float64]
BINS = 15
_HOTTEST = 20.0


def log_loss(logits_MC: Reals, truth_M: NDArray[np.int64], weight_M: Reals) -> float:
    """Mean of -log p(truth), each picture by its weight."""
    log_p_MC = log_softmax(logits_MC, axis=1)
    return -float(np.average(log_p_MC[np.arange(len(truth_M)), truth_M], weights=weight_M))


def find_temperature(logits_MC: Reals, truth_M: NDArray[np.int64], weight_M: Reals) -> float:
    """T that makes softmax(logits / T) likeliest (Guo et al. 2017), from 1/20 to 20.

    log(T)^2 / M is added to the mean loss: a handful of pictures, all of them right, would ask for T = 0.
    """

    def loss(log_t: float) -> float:
        return log_loss(logits_MC / np.exp(log_t), truth_M, weight_M) + log_t**2 / len(truth_M)

    edge = np.log(_HOTTEST)
    return float(np.exp(minimize_scalar(loss, bounds=(-edge, edge), method="bounded").x))


def calibration_error(probability_MC: Reals, truth_M: NDArray[np.int64], weight_M: Reals) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over 15 bins of confidence of equal width."""
    confidence_M, right_M = probability_MC.max(axis=1), probability_MC.argmax(axis=1) == truth_M
    bin_M = np.minimum((confidence_M * BINS).astype(int), BINS - 1)
    gap_B = np.bincount(bin_M, weight_M * (confidence_M - right_M), BINS)
    return float(np.abs(gap_B).sum() / weight_M.sum())


def calibrated_error(logits_MC: Reals, truth_M: NDArray[np.int64], weight_M: Reals) -> float:
    """The calibration error that a temperature leaves on pictures it was not found on: each half with the other half's."""
    if len(truth_M) < 2:
        return calibration_error(softmax(logits_MC, axis=1), truth_M, weight_M)
    cooled_MC, even_M = logits_MC.copy(), np.arange(len(truth_M)) % 2 == 0
    for half_M in (even_M, ~even_M):
        cooled_MC[half_M] /= find_temperature(logits_MC[~half_M], truth_M[~half_M], weight_M[~half_M])
    return calibration_error(softmax(cooled_MC, axis=1), truth_M, weight_M)


def threshold_for(confidence_M: Reals, right_M: NDArray[np.bool_], accuracy: float) -> float:
    """The lowest confidence from which on so large a share is right. Raises: TrainingError if none is enough."""
    if not len(right_M):
        raise TrainingError("--accuracy needs a class with two pictures or more: none could be held back; label more")
    order = np.argsort(-confidence_M, kind="stable")
    falling_M = confidence_M[order]
    share_M = np.cumsum(right_M[order]) / np.arange(1, len(order) + 1)
    last_of_equals_M = np.append(np.diff(falling_M) != 0, True)
    enough = np.flatnonzero((share_M >= accuracy) & last_of_equals_M)
    if not len(enough):
        reached = share_M[last_of_equals_M].max()
        raise TrainingError(
            f"--accuracy is {accuracy:.2%}, the most confident answers reach {reached:.2%}; ask for less, or label more"
        )
    return float(falling_M[enough[-1]])
