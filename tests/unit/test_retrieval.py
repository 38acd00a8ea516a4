"""What a precision costs a search: every figure against a slow twin."""

from collections import Counter

import numpy as np
import pytest

from export.retrieval import knn_accuracy, nearest, overlap


def unit(count, dim=6, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest_by_hand(queries, gallery):
    rows = []
    for number, query in enumerate(queries):
        scores = [(-float(np.dot(query, other)), row) for row, other in enumerate(gallery) if row != number]
        rows.append([row for _, row in sorted(scores)[:10]])
    return rows


@pytest.mark.parametrize("block", [7, 1000])
def test_the_ten_nearest_without_the_picture_itself(monkeypatch, block):
    monkeypatch.setattr("export.retrieval._BLOCK", block)
    queries, gallery = unit(40), unit(40, seed=1)
    assert nearest(queries, gallery).tolist() == nearest_by_hand(queries, gallery)
    assert nearest(gallery, gallery).tolist() == nearest_by_hand(gallery, gallery)


def test_equal_vectors_come_in_the_order_of_their_rows():
    same = np.tile(unit(1), (13, 1))
    assert nearest(same, same)[0].tolist() == list(range(1, 11))
    assert nearest(same, same)[12].tolist() == list(range(10))


def test_overlap_counts_what_both_found():
    found, wanted = nearest(unit(30), unit(30)), nearest(unit(30, seed=2), unit(30, seed=2))
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])
    assert overlap(found, wanted) == pytest.approx(by_hand)
    assert 0 < by_hand < 1
    assert overlap(found, found[:, ::-1]) == 1


def test_knn_votes_leave_unlabelled_pictures_out():
    vectors = unit(60)
    labels = np.array(["cat", "dog", "", "ant"] * 15)
    rows = nearest(vectors, vectors)
    right = []
    for number, neighbours in enumerate(rows):
        if labels[number]:
            votes = Counter(labels[row] for row in neighbours if labels[row])
            best = min(votes, key=lambda name: (-votes[name], name), default="ant")
            right.append(best == labels[number])
    assert knn_accuracy(rows, labels) == pytest.approx(np.mean(right))
