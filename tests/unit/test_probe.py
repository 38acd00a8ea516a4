"""kNN, linear heads, view retrieval and the baselines, against loops and cases whose answer is known."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve.errors import SourceError, TrainingError
from serve.heads.fit import fit_head
from serve.heads.labelled import labelled_pictures
from serve.pictures import Picture
from serve.preprocess import load_image
from serve.samples import ImageSet, Sample
from serve.sources import open_source
from tests.flat_colours import SIZE, MeanColour, draw_classes
from train.encoder import Encoder, UnitEncoder
from train.probe import (
    embed_pixels,
    evaluate,
    knn_accuracy,
    knn_predict,
    score_head,
    split_for_scoring,
    view_retrieval,
)
from train.torch_encoder import ColourHistogram, TorchEncoder, untrained

pytestmark = pytest.mark.usefixtures("one_cpu")


CARD = MeanColour.manifest.model_copy(
    update={"embedding_dim": 64, "training": {"arch": "resnet18", "width": 0.125, "stem": "small"}}
)


class AlwaysTheSame(MeanColour):
    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        return np.tile(np.float32([1, 0, 0]), (len(images), 1))


def unit_vectors(count: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


# --- kNN --------------------------------------------------------------------------------------------------------------


def slow_knn(bank: list[list[float]], labels: list[int], query: list[float], k: int, temperature: float) -> int:
    cosines = [sum(a * b for a, b in zip(row, query, strict=True)) for row in bank]
    votes: Counter[int] = Counter()
    for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
        votes[labels[index]] += math.exp(cosines[index] / temperature)  # type: ignore[assignment]
    return max(votes, key=lambda name: votes[name])


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("k", [1, 7, 40, 200])
def test_knn_is_the_weighted_vote_of_the_nearest(k: int, temperature: float) -> None:
    bank, queries = unit_vectors(60, 5), unit_vectors(1100, 5, seed=1)
    labels = np.random.default_rng(2).integers(0, 4, 60)
    got = knn_predict(
        torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries), k=k, temperature=temperature, classes=4
    )
    assert got.shape == (1100,)
    for row in (*range(40), 1023, 1024, 1099):
        assert got[row] == slow_knn(bank.tolist(), labels.tolist(), queries[row].tolist(), k, temperature)


def test_a_near_neighbour_outvotes_many_far_ones_at_a_low_temperature() -> None:
    bank = torch.tensor([[1.0, 0], [0.6, 0.8], [0.6, 0.8]])
    query, labels = torch.tensor([[1.0, 0]]), torch.tensor([0, 1, 1])
    assert knn_predict(bank, labels, query, k=3, temperature=0.1, classes=2).item() == 0
    assert knn_predict(bank, labels, query, k=3, temperature=10, classes=2).item() == 1


def test_knn_accuracy_counts_unknown_classes_as_wrong() -> None:
    bank = np.eye(3, dtype=np.float32)
    assert knn_accuracy(bank, ["a", "b", "c"], bank, ["a", "b", "x"]) == pytest.approx(2 / 3)


# --- linear heads -----------------------------------------------------------------------------------------------------


def test_a_head_on_pictures_and_its_score_on_others(tmp_path: Path) -> None:
    examples = labelled_pictures(MeanColour(), str(draw_classes(tmp_path / "train", 10)))
    head = fit_head(examples, MeanColour.encoder_id)
    assert head.classes == ("blue", "green", "red")
    assert head.report["held_back_accuracy"] == 1
    few = open_source(draw_classes(tmp_path / "test", 2)).train
    mislabelled = [*few, Sample(few[0].source, label="red"), Sample(few[0].source)]
    scored = score_head(head, MeanColour(), mislabelled)
    assert scored.report["test_pictures"] == 7, "what has no label does not count"
    assert scored.report["test_accuracy"] == pytest.approx(6 / 7)
    assert scored.report["held_back_accuracy"] == 1


def test_pictures_without_labels_teach_no_head(tmp_path: Path) -> None:
    images = draw_classes(tmp_path / "train", 10) / "red"
    with pytest.raises(TrainingError, match="no labels to learn from; put each class in a sub-folder"):
        labelled_pictures(MeanColour(), str(images))


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_a_perfect_encoder_scores_one_and_a_constant_one_chance(tmp_path: Path, protocol: str) -> None:
    images = str(draw_classes(tmp_path / "images", 10))
    report = evaluate(MeanColour(), images, None, protocol)  # type: ignore[arg-type]
    assert report["accuracy"] == 1
    assert (report["bank"], report["queries"], report["classes"], report["unreadable"]) == (24, 6, 3, 0)
    assert report["chance"] == pytest.approx(1 / 3)
    assert report["encoder_id"] == MeanColour.encoder_id
    assert evaluate(AlwaysTheSame(), images, None, protocol)["accuracy"] == pytest.approx(1 / 3)  # type: ignore[arg-type]


def test_a_test_source_is_scored_and_all_of_the_other_learned(tmp_path: Path) -> None:
    images, test = draw_classes(tmp_path / "images", 10), draw_classes(tmp_path / "test", 2)
    (test / "red" / "red_0.png").write_bytes(b"no picture")
    report = evaluate(MeanColour(), str(images), str(test), "knn")
    assert (report["bank"], report["queries"], report["unreadable"], report["accuracy"]) == (30, 5, 1, 1)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_evaluation_needs_labels_and_readable_pictures(tmp_path: Path, protocol: str) -> None:
    images = draw_classes(tmp_path / "images", 10)
    with pytest.raises(TrainingError, match="no labels to score on; put each class in a sub-folder"):
        evaluate(MeanColour(), str(images / "red"), None, protocol)  # type: ignore[arg-type]
    for path in images.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(SourceError, match="none of 24 pictures can be read") as refusal:
        evaluate(MeanColour(), str(images), None, protocol)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_every_fifth_is_held_back_where_there_is_no_test_split() -> None:
    samples = tuple(Sample(str(number), label="x") for number in range(12))
    unlabelled = (Sample("u"),)
    bank, queries = split_for_scoring(ImageSet(train=unlabelled + samples))
    assert [sample.source for sample in queries] == ["4", "9"]
    assert [sample.source for sample in bank] == [str(number) for number in range(12) if number not in (4, 9)]
    assert split_for_scoring(ImageSet(train=samples[:9], test=unlabelled + samples[9:])) == (
        list(samples[:9]),
        list(samples[9:]),
    )


# --- during training --------------------------------------------------------------------------------------------------


def small_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder("resnet18", 0.125, "small")


def test_embedded_pixels_are_unit_vectors_of_the_evaluated_network() -> None:
    pixels = torch.randint(0, 256, (300, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = small_encoder()
    vectors = embed_pixels(encoder, pixels, torch.device("cpu"))
    assert vectors.shape == (300, 64)
    with torch.inference_mode():
        wanted = UnitEncoder(encoder).eval()(pixels[[7, 299]].permute(0, 2, 3, 1))
    np.testing.assert_allclose(vectors[[7, 299]], wanted.numpy(), atol=1e-5)


# --- without labels ---------------------------------------------------------------------------------------------------


def test_view_retrieval_of_a_perfect_and_of_a_constant_encoder(tmp_path: Path) -> None:
    """Six pure hues, far apart: jitter of strength 0.5 hardly confuses them, only a grey view is lost."""
    hues = {
        "r": (230, 10, 10),
        "g": (10, 230, 10),
        "b": (10, 10, 230),
        "y": (230, 230, 10),
        "c": (10, 230, 230),
        "m": (230, 10, 230),
    }
    samples = open_source(draw_classes(tmp_path / "images", 1, hues)).train
    scores = [view_retrieval(MeanColour(), samples, seed=seed) for seed in range(10)]
    assert sum(scores) / 10 > 0.6
    assert view_retrieval(MeanColour(), samples, seed=3) == scores[3]
    assert len(set(scores)) > 1
    assert view_retrieval(AlwaysTheSame(), samples) == pytest.approx(1 / 6)


def test_view_retrieval_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    samples = list(open_source(draw_classes(tmp_path / "images", 2)).train)
    Path(samples[1].source).write_bytes(b"no picture")
    assert 0 <= view_retrieval(MeanColour(), samples) <= 1


def test_the_colour_histogram_counts_as_a_loop_does(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[1, :, :, 1:] //= 100
    wanted = np.zeros((2, 512))
    for picture, y, x in np.ndindex(2, SIZE, SIZE):
        red, green, blue = (int(value) // 32 for value in pixels[picture, y, x])
        wanted[picture, 64 * red + 8 * green + blue] += 1
    histogram = ColourHistogram(CARD)
    vectors = histogram.embed(list(pixels))
    np.testing.assert_allclose(vectors, np.sqrt(wanted / SIZE**2), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert histogram.manifest.embedding_dim == 512
    assert histogram.encoder_id != CARD.encoder_id
    assert histogram.embed([]).shape == (0, 512)


def test_the_untrained_baseline_is_seeded_calibrated_and_not_the_trained_one(tmp_path: Path) -> None:
    samples = open_source(draw_classes(tmp_path / "images", 10)).train
    images = list(np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8))
    trained = TorchEncoder(small_encoder(seed=5), CARD)
    vectors = untrained(CARD, samples).embed(images)
    assert not np.allclose(vectors, trained.embed(images), atol=1e-3)
    np.testing.assert_array_equal(vectors, untrained(CARD, samples).embed(images))
    assert not np.allclose(vectors, untrained(CARD, samples, seed=1).embed(images), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    fresh = TorchEncoder(small_encoder(seed=0), CARD)
    assert not np.allclose(vectors, fresh.embed(images), atol=1e-3), "its batch norms have seen pictures"


def test_plain_features_are_those_that_the_unit_vectors_are_made_of() -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8))
    unit, plain = (TorchEncoder(small_encoder(), CARD, unit=unit) for unit in (True, False))
    features = plain.embed(images)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).any()
    np.testing.assert_allclose(features / lengths, unit.embed(images), atol=1e-5)
    assert plain.encoder_id != unit.encoder_id, "the two are never mixed"


def test_a_torch_encoder_prepares_pictures_as_serving_does(tmp_path: Path) -> None:
    sample = open_source(draw_classes(tmp_path / "images", 1)).train[0]
    encoder = TorchEncoder(small_encoder(), CARD, batch_size=2)
    as_path, as_pixels, as_bytes = encoder.embed(
        [sample.source, load_image(sample.source, encoder.manifest.preprocess), Path(sample.source).read_bytes()]
    )
    np.testing.assert_allclose(as_path, as_pixels, atol=1e-6)
    np.testing.assert_allclose(as_path, as_bytes, atol=1e-6)
    assert encoder.embed([]).shape == (0, 64)
