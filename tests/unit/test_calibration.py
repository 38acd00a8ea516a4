import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import ContractError, EncoderMismatch
from serve.identity.calibration import Calibration, fit_logistic
from tests.thresholds import calibration, measured


def test_a_file_comes_back_as_it_was(tmp_path):
    calibration().save(tmp_path / "threshold.json")
    assert Calibration.load(tmp_path / "threshold.json") == calibration()
    assert [path.name for path in tmp_path.iterdir()] == ["threshold.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"threshold": "0.7"}, "threshold: Input should be a valid number"),
        ({"threshold": None}, "threshold"),
        ({"slope": -1}, "slope"),
        ({"metric": "euclidean"}, "metric"),
        ({"format": "simclr-threshold-2"}, "format"),
        ({"asked_fpir": 1}, "asked_fpir"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_is_none_is_refused_by_what_is_wrong(tmp_path, change, complaint):
    path = tmp_path / "threshold.json"
    path.write_text(json.dumps(calibration().model_dump(mode="json") | change))
    with pytest.raises(ContractError, match=complaint) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)
    assert "simclr reid calibrate" in str(caught.value)


@pytest.mark.parametrize("text", ["", "no JSON", '{"threshold": NaN}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other").write_text(text)
    with pytest.raises(ContractError, match="simclr reid calibrate"):
        Calibration.load(tmp_path / "other")
    with pytest.raises(ContractError, match="cannot be read"):
        Calibration.load(tmp_path / "missing")


def test_another_encoder_is_refused_with_both_ids_and_the_command():
    calibration().require("0123456789abcdef")
    with pytest.raises(EncoderMismatch, match=r"0123456789abcdef.*fedcba9876543210.*simclr reid calibrate GALLERY"):
        calibration().require("fedcba9876543210")


@pytest.mark.parametrize(
    ("identities", "complaint"),
    [(299, "too few to show an FPIR of 0.01: it may be up to 0.05; wanted 300 at least"), (300, "wanted 3000"), (3000, None)],
)
def test_too_few_strangers_are_told_in_one_sentence(identities, complaint):
    warning = calibration(fpir=measured(identities=identities)).warning()
    assert warning is None if complaint is None else complaint in warning


def slow_fit(scores, right):
    """Platt's loss on a grid that shrinks around its best point; slopes below 0 are not on it."""
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def loss(slope, intercept):
        p = 1 / (1 + np.exp(-(slope[..., None] * scores + intercept[..., None])))
        p = p.clip(1e-300, 1 - 1e-16)
        return -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean(-1)

    best, width = np.zeros(2), np.array([60.0, 60.0])
    for _ in range(60):
        slopes = np.maximum(0, best[0] + width[0] * np.linspace(-1, 1, 21))
        grid = np.meshgrid(slopes, best[1] + width[1] * np.linspace(-1, 1, 21), indexing="ij")
        losses = loss(*grid)
        place = np.unravel_index(np.argmin(losses), losses.shape)
        best, width = np.array([grid[0][place], grid[1][place]]), width * 0.75
    return float(loss(best[0][None], best[1][None])[0]), loss


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(-6, 12))
def test_the_fit_is_as_good_as_the_best_point_of_a_grid(seed, steepness):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1, 1, 80)
    right = rng.random(80) < 1 / (1 + np.exp(-steepness * scores))
    slope, intercept = fit_logistic(scores, right)
    best, loss = slow_fit(scores, right)
    assert slope >= 0
    assert loss(np.array([slope]), np.array([intercept]))[0] <= best + 1e-6


def test_probabilities_grow_and_never_reach_the_ends():
    for right in (np.arange(20) >= 10, np.ones(20, bool), np.zeros(20, bool), np.arange(20) < 10):
        slope, intercept = fit_logistic(np.linspace(0, 0.9, 20), right)
        found = [calibration(slope=slope, intercept=intercept).probability(score) for score in np.linspace(0, 0.9, 20)]
        assert (np.diff(found) >= 0).all()
        assert 0 < found[0] <= found[-1] < 1
        assert np.mean(found) == pytest.approx(right.mean(), abs=0.06)


def test_probabilities_hold_on_other_answers():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.2, 0.9, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-(15 * scores - 9)))
    slope, intercept = fit_logistic(scores[:2000], right[:2000])
    sure = calibration(slope=slope, intercept=intercept)
    found = np.array([sure.probability(score) for score in scores[2000:]])
    for low in (0, 0.25, 0.5, 0.75):
        bin_ = (found >= low) & (found < low + 0.25)
        assert found[bin_].mean() == pytest.approx(right[2000:][bin_].mean(), abs=0.06)


def test_scores_that_are_all_alike():
    slope, intercept = fit_logistic(np.full(10, 0.5), np.arange(10) < 3)
    assert calibration(slope=slope, intercept=intercept).probability(0.5) == pytest.approx(0.3, abs=0.1)
    assert math.isfinite(slope)
