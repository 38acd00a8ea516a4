"""Temperature, calibration error and the threshold of a head, against loops, grids and planted cases."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from serve.errors import TrainingError
from serve.heads.calibrate import calibrated_error, calibration_error, find_temperature, log_loss, threshold_for


def drawn(count, hot=1.0, seed=0, classes=4):
    """Logits `hot` times too large for truths that are drawn from them."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(count, classes))
    truth = np.array([rng.choice(classes, p=row) for row in softmax(logits, axis=1)])
    return hot * logits, truth


def test_log_loss_is_the_mean_written_out():
    logits, truth = drawn(20)
    weight = np.linspace(0, 2, 20)
    total = 0.0
    for row, number, share in zip(logits.tolist(), truth.tolist(), weight.tolist(), strict=True):
        total -= share * math.log(math.exp(row[number]) / sum(map(math.exp, row)))
    assert log_loss(logits, truth, weight) == pytest.approx(total / weight.sum())


@pytest.mark.parametrize("hot", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_what_was_planted_and_is_the_best_of_a_fine_grid(hot):
    logits, truth = drawn(4000, hot)
    weight = np.ones(4000)
    found = find_temperature(logits, truth, weight)
    assert found == pytest.approx(hot, rel=0.1)
    grid = np.geomspace(0.1, 10, 400)
    losses = [log_loss(logits / t, truth, weight) + math.log(t) ** 2 / 4000 for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)


def test_a_handful_of_right_answers_asks_for_no_certainty():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = find_temperature(logits, np.array([0, 1, 0]), np.ones(3))
    assert 0.3 < found < 1


def slow_calibration_error(probabilities, truth, weight):
    bins = [[] for _ in range(15)]
    for row, number, share in zip(probabilities.tolist(), truth.tolist(), weight.tolist(), strict=True):
        confidence = max(row)
        bins[min(int(confidence * 15), 14)].append((share, confidence, row.index(confidence) == number))
    total = 0.0
    for members in filter(None, bins):
        mass = sum(share for share, _, _ in members)
        sure = sum(share * confidence for share, confidence, _ in members) / mass
        right = sum(share * is_right for share, _, is_right in members) / mass
        total += mass * abs(sure - right)
    return total / sum(weight.tolist())


def test_the_calibration_error_is_the_one_written_out():
    logits, truth = drawn(300, 2.0)
    for weight in (np.ones(300), np.random.default_rng(1).uniform(0.1, 3, 300)):
        probabilities = softmax(logits, axis=1)
        found = calibration_error(probabilities, truth, weight)
        assert found == pytest.approx(slow_calibration_error(probabilities, truth, weight))
        assert found > 0.05


def test_calibration_errors_that_are_known():
    certain = np.eye(2)[[0, 0, 1, 1]]
    assert calibration_error(certain, np.array([0, 0, 1, 1]), np.ones(4)) == 0
    assert calibration_error(certain, np.array([0, 1, 1, 0]), np.ones(4)) == 0.5
    assert calibration_error(np.full((4, 2), 0.5), np.array([0, 1, 0, 1]), np.ones(4)) == 0


def test_a_temperature_mends_what_is_overconfident_also_on_pictures_it_was_not_found_on():
    logits, truth = drawn(4000, 4.0)
    weight = np.ones(4000)
    assert calibration_error(softmax(logits, axis=1), truth, weight) > 0.15
    assert calibrated_error(logits, truth, weight) < 0.04


def test_each_half_is_cooled_by_the_others_temperature():
    (hot, truth_hot), (mild, truth_mild) = drawn(500, 5.0), drawn(500, 1.0, seed=1)
    logits, truth = np.empty((1000, 4)), np.empty(1000, int)
    logits[::2], logits[1::2], truth[::2], truth[1::2] = hot, mild, truth_hot, truth_mild
    ones = np.ones(500)
    by_hand = logits.copy()
    by_hand[::2] /= find_temperature(mild, truth_mild, ones)
    by_hand[1::2] /= find_temperature(hot, truth_hot, ones)
    wanted = slow_calibration_error(softmax(by_hand, axis=1), truth, np.ones(1000))
    assert calibrated_error(logits, truth, np.ones(1000)) == pytest.approx(wanted)
    assert calibrated_error(logits[:1], truth[:1], ones[:1]) >= 0, "one picture has no other half"


def slow_threshold(confidence, right, accuracy):
    """The lowest of the confidences at which those as sure or surer are right often enough."""
    for candidate in sorted(set(confidence)):
        decided = [is_right for sure, is_right in zip(confidence, right, strict=True) if sure >= candidate]
        if sum(decided) / len(decided) >= accuracy:
            return candidate
    return None


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_lowest_that_keeps_the_accuracy(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(1, 12, 40) / 12  # many are equal
    right = rng.uniform(size=40) < confidence
    wanted = slow_threshold(confidence.tolist(), right.tolist(), 0.75)
    if wanted is None:
        with pytest.raises(TrainingError, match=r"--accuracy is 75.00%, the most confident answers reach .*; ask for less"):
            threshold_for(confidence, right, 0.75)
    else:
        assert threshold_for(confidence, right, 0.75) == wanted


def test_an_accuracy_out_of_reach_is_refused():
    with pytest.raises(TrainingError, match=r"--accuracy is 99.00%, the most confident answers reach 50.00%"):
        threshold_for(np.array([0.9, 0.9, 0.3]), np.array([True, False, False]), 0.99)
