"""Linear heads: the fit, what is held back, and the figures, against loops and cases whose answer is known."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from serve.classify import Head
from serve.errors import TrainingError
from serve.gallery import Gallery
from serve.heads.fit import DECAY_UNSEEN, DECAYS, FOLDS, MANY, Examples, class_weights, fit_head, sweep, validation_folds
from serve.heads.labelled import kin_of, labelled_items
from serve.heads.logistic import logistic_regression, logits, loss_and_gradient
from serve.heads.plot import save_confusion
from serve.heads.scores import confusion_matrix, figures_of, report_lines
from serve.samples import Sample


def unit_vectors(count, dim, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def blobs(counts, dim=16, noise=0.7, seed=0):
    """Unit vectors around a centre for each class, and the names of the classes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(counts), dim))
    numbers = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    vectors = centres[numbers] + noise * rng.normal(size=(len(numbers), dim))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32), [f"class {number}" for number in numbers]


# --- the loss ---------------------------------------------------------------------------------------------------------


def slow_loss(theta, x, y, weight, decay):
    total = 0.0
    for vector, number, share in zip(x.tolist(), y.tolist(), weight.tolist(), strict=True):
        scores = [sum(w * v for w, v in zip(row[:-1], vector, strict=True)) + row[-1] for row in theta.tolist()]
        total -= share * (scores[number] - math.log(sum(math.exp(score) for score in scores)))
    squares = sum(w * w for row in theta.tolist() for w in row[:-1])
    return total / sum(weight.tolist()) + decay / 2 * squares / x.shape[1]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_those_written_out(decay):
    rng = np.random.default_rng(0)
    x, y, weight, theta = unit_vectors(12, 4), rng.integers(0, 3, 12), rng.uniform(0, 2, 12), rng.normal(size=(3, 5))
    loss, slope = loss_and_gradient(theta, x, y, weight, decay)
    assert loss == pytest.approx(slow_loss(theta, x, y, weight, decay), rel=1e-6)
    for place in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[place] = 1e-5
        up, down = (slow_loss(theta + sign * step, x, y, weight, decay) for sign in (1, -1))
        assert slope[place] == pytest.approx((up - down) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_the_fit_is_as_low_as_a_long_descent_and_level(decay):
    x, y, weight = unit_vectors(80, 6), np.random.default_rng(1).integers(0, 3, 80), np.ones(80)
    theta = logistic_regression(x, y, weight, decay, np.zeros((3, 7)))
    found, slope = loss_and_gradient(theta, x, y, weight, decay)
    assert np.abs(slope).max() < 1e-4
    slow, speed = np.zeros((3, 7)), np.zeros((3, 7))
    for _ in range(3000):
        lowest, down = loss_and_gradient(slow, x, y, weight, decay)
        speed = 0.95 * speed - 2 * down
        slow = slow + speed
    assert found == pytest.approx(lowest, rel=1e-5)
    assert found < math.log(3) - 0.01


def test_a_picture_of_weight_two_is_one_that_is_there_twice_and_of_weight_zero_one_that_is_not_there():
    x, y, start = unit_vectors(30, 5), np.random.default_rng(2).integers(0, 2, 30), np.zeros((2, 6))
    weight = np.tile([0.0, 1.0, 2.0], 10)
    often = np.repeat(np.arange(30), weight.astype(int))
    np.testing.assert_allclose(
        logistic_regression(x, y, weight, 0.1, start),
        logistic_regression(x[often], y[often], np.ones(30), 0.1, start),
        atol=2e-3,
    )


def test_separable_classes_are_separated():
    x = unit_vectors(50, 8)
    y = (x[:, 0] > 0).astype(int)
    theta = logistic_regression(x, y, np.ones(50), 1e-6, np.zeros((2, 9)))
    np.testing.assert_array_equal(logits(theta, x).argmax(1), y)


# --- what is held back ------------------------------------------------------------------------------------------------


def test_each_picture_is_held_back_once_and_its_class_stays_behind():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [1, 2, 3, 7, 40]))
    folds = validation_folds(y, np.arange(len(y)))
    np.testing.assert_array_equal(np.sum(folds, axis=0), y != 0)
    for held in folds:
        assert set(y[~held]) == set(range(5))
    assert [int(held[y == 4].sum()) for held in folds] == [8] * FOLDS


def test_of_many_pictures_a_fifth_is_held_back():
    y = np.arange(MANY + 5) % 2
    (held,) = validation_folds(y, np.arange(len(y)))
    assert held.mean() == pytest.approx(1 / FOLDS, abs=1e-3)


def test_kin_are_held_back_together():
    """Also kin of two classes, and unless a class has no others."""
    rng = np.random.default_rng(0)
    kin = rng.permutation(np.repeat(np.arange(12), 10))
    y = kin % 3
    y[kin == 4] = rng.integers(0, 3, 10)
    y[kin == 11] = 3  # a class of one kin
    folds = validation_folds(y, kin)
    np.testing.assert_array_equal(np.sum(folds, axis=0), np.ones(120))
    for held in folds:
        assert set(kin[held]) & set(kin[~held]) == {11}
        assert set(y[~held]) == set(range(4))


def test_pictures_of_one_animal_do_not_vouch_for_each_other():
    """Each animal has a look of its own that tells nothing about its class: only other animals show how good the head is."""
    rng = np.random.default_rng(0)
    animal = np.repeat(np.arange(40), 8)
    vectors = rng.normal(size=(40, 64))[animal] + 0.1 * rng.normal(size=(320, 64))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    groups = [f"class {number % 2}" for number in animal]
    alone, together = (fit_head(Examples(unit, groups, kin), "x").report for kin in (None, animal.tolist()))
    assert alone["held_back_accuracy"] == 1
    assert together["held_back_accuracy"] < 0.7
    assert together["weight_decay"] > alone["weight_decay"]


def test_pictures_of_one_identity_or_else_of_one_track_are_kin():
    samples = [
        Sample("a", identity="lion", track="1"),
        Sample("b", identity="lion"),
        Sample("c", camera="1", track="7"),
        Sample("d", camera="1", track="7"),
        Sample("e", camera="2", track="7"),
        Sample("f"),
    ]
    kin = kin_of(samples)
    assert [kin.index(key) for key in kin] == [0, 0, 2, 2, 4, 5]


def test_the_decay_is_that_of_the_least_loss_on_pictures_held_back():
    vectors, groups = blobs([12, 12, 12], noise=2.0)
    y = np.unique(groups, return_inverse=True)[1]
    decay, held = sweep(vectors, y, np.ones(36), np.zeros((3, 17)), validation_folds(y, np.arange(36)))
    losses = {}
    for candidate in DECAYS:
        losses[candidate] = 0.0
        for fold in validation_folds(y, np.arange(len(y))):
            theta = logistic_regression(vectors[~fold], y[~fold], np.ones(int((~fold).sum())), candidate, np.zeros((3, 17)))
            for scores, number in zip(logits(theta, vectors[fold]), y[fold], strict=True):
                losses[candidate] -= math.log(softmax(scores)[number])
    assert decay == min(losses, key=losses.get) not in (DECAYS[0], DECAYS[-1])
    assert sorted(held.truth) == sorted(y)


def test_balanced_weights_give_every_class_the_same_and_one_on_average():
    y = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(class_weights(y, balanced=True), [2 / 3, 2 / 3, 2 / 3, 2])
    np.testing.assert_array_equal(class_weights(y, balanced=False), np.ones(4))


def test_balanced_heads_find_more_of_a_rare_class():
    vectors, groups = blobs([300, 15], noise=2.5)
    plain, balanced = (fit_head(Examples(vectors, groups), "x", balanced=flag).report for flag in (False, True))
    rare = "class 1"
    assert balanced["per_class"][rare]["recall"] > plain["per_class"][rare]["recall"] + 0.1
    assert balanced["mean_recall"] > plain["mean_recall"]


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_head_names_fresh_pictures_as_the_nearest_centre_does():
    vectors, groups = blobs([60, 60, 60], noise=1.0)
    head = fit_head(Examples(vectors[:120], groups[:120]), "abc")
    assert (head.classes, head.encoder_id) == (("class 0", "class 1", "class 2"), "abc")
    named = np.array(head.classes)[head.probabilities(vectors[120:]).argmax(1)]
    centres = np.array([vectors[:120][np.array(groups[:120]) == name].mean(0) for name in head.classes])
    by_centre = np.array(head.classes)[(vectors[120:] @ centres.T).argmax(1)]
    assert (named == by_centre).mean() > 0.9
    assert head.report["held_back_accuracy"] == pytest.approx((named == np.array(groups[120:])).mean(), abs=0.1)


def test_the_temperature_is_in_the_weights():
    vectors, groups = blobs([30, 30], noise=2.0)
    head = fit_head(Examples(vectors, groups), "x")
    y = np.unique(groups, return_inverse=True)[1]
    theta = logistic_regression(vectors, y, np.ones(60), head.report["weight_decay"], np.zeros((2, 17)))
    assert head.report["temperature"] != pytest.approx(1, abs=0.01)
    wanted = softmax(logits(theta, vectors) / head.report["temperature"], axis=1)
    np.testing.assert_allclose(head.probabilities(vectors), wanted, atol=1e-5)


def test_five_pictures_of_each_class_are_enough():
    vectors, groups = blobs([105] * 10, dim=128, noise=1.0)
    few = [place for place in range(len(groups)) if groups[:place].count(groups[place]) < 5]
    head = fit_head(Examples(vectors[few], [groups[place] for place in few]), "x")
    named = np.array(head.classes)[head.probabilities(vectors).argmax(1)]
    assert (named == np.array(groups)).mean() > 0.9
    assert head.report["held_back_pictures"] == 50, "each of the few is held back in its turn"


def test_one_picture_of_each_class_measures_nothing():
    head = fit_head(Examples(np.eye(3, dtype=np.float32), ["a", "b", "c"]), "x")
    assert (head.report["weight_decay"], head.report["temperature"]) == (DECAY_UNSEEN, 1)
    assert head.report["held_back_accuracy"] is head.report["ece"] is head.report["decided"] is None
    assert [head.decide(row) for row in head.probabilities(np.eye(3, dtype=np.float32))] == ["a", "b", "c"]
    assert "nothing was measured" in " ".join(report_lines(head.report))
    with pytest.raises(TrainingError, match="none could be held back"):
        fit_head(Examples(np.eye(3, dtype=np.float32), ["a", "b", "c"]), "x", wanted_accuracy=0.9)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_head_on_very_few_pictures_still_has_a_score(count):
    head = fit_head(Examples(unit_vectors(count, 4), ["a", "b", "a", "b", "a"][:count]), "abc")
    assert 0 <= head.report["held_back_accuracy"] <= 1


@pytest.mark.parametrize("groups", [["only"] * 6, []])
def test_a_head_for_one_class_is_refused(groups):
    with pytest.raises(TrainingError, match=r"a head needs at least two classes, got .*; put each class in a sub-folder"):
        fit_head(Examples(unit_vectors(len(groups), 4), groups), "abc")


def test_a_threshold_for_an_accuracy_is_kept_by_the_head_and_its_file(tmp_path):
    vectors, groups = blobs([100, 100, 100], noise=2.0)
    plain, head = (fit_head(Examples(vectors, groups), "x", wanted_accuracy=wanted) for wanted in (None, 0.95))
    assert plain.report["held_back_accuracy"] < 0.95
    assert plain.report["decided"] == 1
    assert head.report["decided_accuracy"] >= 0.95
    assert 0.2 < head.report["decided"] < 1
    head.save(tmp_path / "head.npz")
    back = Head.load(tmp_path / "head.npz")
    assert back.abstain_below == head.report["abstain_below"] > 1 / 3
    assert back.report == json.loads(json.dumps(head.report)), "the report is plain JSON"
    decided = [back.decide(row) for row in back.probabilities(vectors)]
    assert {None, *head.classes} == set(decided)


# --- figures ----------------------------------------------------------------------------------------------------------

TRUTH = np.array([0, 0, 0, 1, 1, 2])
NAMED = np.array([0, 0, 1, 1, 1, 0])
SURE = np.array([0.9, 0.8, 0.6, 0.9, 0.5, 0.55])


def planted(below=0.0):
    probabilities = np.full((6, 4), 0.0)
    probabilities[np.arange(6), NAMED] = SURE
    return figures_of(probabilities, TRUTH, ["a", "b", "c", "never"], below)


def test_figures_of_a_planted_case():
    report = planted()
    assert report["held_back_accuracy"] == pytest.approx(4 / 6)
    assert report["per_class"] == {
        "a": {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3), "support": 3},
        "b": {"precision": pytest.approx(2 / 3), "recall": 1, "f1": pytest.approx(4 / 5), "support": 2},
        "c": {"precision": None, "recall": 0, "f1": 0, "support": 1},
        "never": {"precision": None, "recall": None, "f1": None, "support": 0},
    }
    assert report["mean_recall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert report["mean_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    np.testing.assert_array_equal(
        confusion_matrix(report, 4), [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], "rows are true classes"
    )


def test_abstaining_leaves_what_is_sure():
    report = planted(below=0.6)
    assert (report["decided"], report["decided_accuracy"]) == (pytest.approx(4 / 6), pytest.approx(3 / 4))
    assert planted(below=0.95)["decided_accuracy"] is None


def test_the_table_names_the_worst_first():
    report = planted(below=0.6) | {"weight_decay": 0.1, "temperature": 0.5, "ece_before": 0.2, "ece": 0.1}
    lines = list(report_lines(report))
    assert [line.split()[0] for line in lines[1:5]] == ["never", "c", "a", "b"]
    assert lines[3].split() == ["a", "66.7%", "66.7%", "66.7%", "3"]
    assert "from 20.00% to 10.00%" in lines[6]
    assert "decides 66.7% of the pictures, 75.0% of these rightly" in lines[7]


@pytest.mark.parametrize("classes", [2, 4, 130])
def test_the_picture_of_who_was_taken_for_whom(tmp_path, classes):
    counts = np.diag(np.arange(classes))
    names = [f"$x_{number}$ with a long name <&> {number}" for number in range(classes)]
    save_confusion(tmp_path / "c.png", counts, names, "title with $ and _")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


# --- from a gallery ---------------------------------------------------------------------------------------------------


def test_a_gallery_teaches_a_head_without_its_pictures(tmp_path, toy_encoder):
    vectors, groups = blobs([40, 40], dim=toy_encoder.manifest.embedding_dim)
    samples = [Sample(f"gone/{place}.png", label=name, camera=str(place % 2)) for place, name in enumerate(groups)]
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        gallery.add([*samples, Sample("gone/unlabelled.png")], np.concatenate([vectors, vectors[:1]]))
    with Gallery.open(tmp_path / "gallery") as gallery:
        found = labelled_items(gallery)
        half = labelled_items(gallery, "camera = 1")
        with pytest.raises(TrainingError, match=r"no item among .*camera = 9.* has a label; .*simclr gallery relabel"):
            labelled_items(gallery, "camera = 9")
    np.testing.assert_allclose(found.vectors, vectors, atol=1e-6)
    assert found.groups == groups
    assert half.groups == groups[1::2]
    assert fit_head(found, "x").report["held_back_accuracy"] > 0.9
