import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import neighbours
from serve.rerank import k_reciprocal


def slow_lists(distances, k):
    """The k nearest of each, itself among them, and those as near as the k-th."""
    radius = [sorted(row)[min(k, len(row)) - 1] for row in distances]
    return [{j for j in range(len(distances)) if distances[i][j] <= radius[i]} for i in range(len(distances))]


def slow_sets(distances, k1):
    """R*(i): the reciprocal ones of i, and the half-sets of those of which i holds over two thirds."""

    def reciprocal(k):
        lists = slow_lists(distances, k)
        return [{j for j in its if i in lists[j]} for i, its in enumerate(lists)]

    whole, half = reciprocal(k1 + 1), reciprocal(round(k1 / 2) + 1)
    grown = []
    for its in whole:
        grown.append(set(its))
        for candidate in its:
            if 3 * len(half[candidate] & its) > 2 * len(half[candidate]):
                grown[-1] |= half[candidate]
    return grown


def slow_transductive(queries, gallery, k1, k2, lambda_value):
    """Zhong et al. 2017 word by word, with matrices of everything."""
    everyone = np.concatenate([queries, gallery]).astype(np.float64)
    squared = ((everyone[:, None] - everyone[None]) ** 2).sum(-1)
    scaled = squared / np.maximum(squared.max(axis=1, keepdims=True), 1e-38)
    weights = np.zeros_like(scaled)
    for i, members in enumerate(slow_sets(squared, k1)):
        for j in members:
            weights[i, j] = np.exp(-scaled[i, j])
        weights[i] /= weights[i].sum()
    averaged = np.array([weights[sorted(its)].mean(axis=0) for its in slow_lists(squared, k2)])
    count = len(queries)
    common = np.array([[np.minimum(averaged[q], averaged[g]).sum() for g in range(count, len(everyone))] for q in range(count)])
    return (1 - lambda_value) * (1 - common / (2 - common)) + lambda_value * scaled[:count, count:]


def slow_alone(queries, gallery, *parameters):
    return np.concatenate([slow_transductive(query[None], gallery, *parameters) for query in queries])


def vectors(rng, count, kind):
    if kind == "clusters":
        centres = rng.standard_normal((4, 5))
        found = centres[rng.integers(4, size=count)] + 0.4 * rng.standard_normal((count, 5))
        found /= np.linalg.norm(found, axis=1, keepdims=True)
    elif kind == "ties":
        found = rng.integers(0, 3, (count, 3))  # whole numbers: many at the very same distance, many twins
    else:
        found = rng.standard_normal((count, 5))
    return found.astype(np.float32)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["clusters", "ties", "noise"]), st.booleans())
def test_equals_the_dense_form_in_both_modes(seed, kind, transductive):
    rng = np.random.default_rng(seed)
    queries, gallery = vectors(rng, int(rng.integers(1, 6)), kind), vectors(rng, int(rng.integers(1, 40)), kind)
    parameters = int(rng.integers(1, 9)), int(rng.integers(1, 5)), float(rng.random())
    slow = slow_transductive if transductive else slow_alone
    found = k_reciprocal(queries, gallery, *parameters, transductive=transductive)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow(queries, gallery, *parameters), atol=2e-6)


def test_equals_the_dense_form_with_the_published_parameters(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", 50)
    monkeypatch.setattr(neighbours, "_BLOCK_VALUES", 1000)
    monkeypatch.setattr("serve.reciprocal.graph._BLOCK_PAIRS", 100)
    monkeypatch.setattr("serve.rerank._BLOCK_PROBES", 7)
    monkeypatch.setattr("serve.rerank._BLOCK_GALLERY", 30)
    rng = np.random.default_rng(0)
    queries, gallery = vectors(rng, 20, "clusters"), vectors(rng, 150, "clusters")
    for transductive, slow in ((False, slow_alone), (True, slow_transductive)):
        found = k_reciprocal(queries, gallery, transductive=transductive)
        wanted = slow(queries, gallery, 20, 6, 0.3)
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        np.testing.assert_array_equal(np.argsort(found, axis=1)[:, :10], np.argsort(wanted, axis=1)[:, :10])


@pytest.mark.parametrize("transductive", [False, True])
def test_the_order_of_queries_and_gallery_changes_nothing(transductive):
    rng = np.random.default_rng(1)
    queries, gallery = vectors(rng, 9, "ties"), vectors(rng, 60, "ties")
    rows, columns = rng.permutation(9), rng.permutation(60)
    found = k_reciprocal(queries, gallery, 6, 3, transductive=transductive)
    moved = k_reciprocal(queries[rows], gallery[columns], 6, 3, transductive=transductive)
    np.testing.assert_allclose(moved, found[rows][:, columns], atol=1e-6)
    np.testing.assert_array_equal(found, k_reciprocal(queries, gallery, 6, 3, transductive=transductive))


def test_twins_in_the_gallery_get_the_very_same_distance():
    rng = np.random.default_rng(2)
    gallery = rng.standard_normal((90, 33)).astype(np.float32)
    gallery[[3, 50, 89]] = gallery[7]
    queries = gallery[:4] + 0.1 * rng.standard_normal((4, 33)).astype(np.float32)
    for transductive in (False, True):
        found = k_reciprocal(queries, gallery, transductive=transductive)
        assert (found[:, [3, 50, 89]] == found[:, [7]]).all()


def test_other_probes_do_not_change_an_answer_unless_asked_for():
    rng = np.random.default_rng(3)
    queries, gallery = vectors(rng, 12, "clusters"), vectors(rng, 80, "clusters")
    np.testing.assert_array_equal(k_reciprocal(queries, gallery)[:1], k_reciprocal(queries[:1], gallery))
    together = k_reciprocal(queries, gallery, transductive=True)[:1]
    assert not np.allclose(together, k_reciprocal(queries[:1], gallery, transductive=True))


def test_lambda_one_is_the_old_distance_and_a_collapsed_encoder_has_none():
    rng = np.random.default_rng(4)
    queries, gallery = vectors(rng, 3, "noise"), vectors(rng, 20, "noise")
    squared = ((queries[:, None] - gallery[None]) ** 2).sum(-1)
    np.testing.assert_allclose(
        k_reciprocal(queries, gallery, lambda_value=1), squared / squared.max(axis=1, keepdims=True), rtol=1e-5
    )
    same = np.ones((30, 4), np.float32)
    assert np.ptp(k_reciprocal(same[:2], same)) == 0


def test_too_many_equal_vectors_are_told(monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_TIES", 40)
    with pytest.raises(ValueError, match="collapsed"):
        k_reciprocal(np.ones((1, 4)), np.ones((100, 4)), 3, 2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((np.ones((2, 3)), np.ones((2, 4))), "wanted (Q, D)"),
        ((np.ones((2, 3)), np.ones((0, 3))), "G of 1 or more"),
        ((np.ones(3), np.ones((2, 3))), "wanted (Q, D)"),
        ((np.ones((1, 2)), np.array([[0, 1], [np.nan, 1]])), "gallery vector 1 is infinite"),
        ((np.full((1, 2), np.inf), np.ones((1, 2))), "query vector 0 is infinite"),
        ((np.ones((1, 2)), np.ones((1, 2)), 0), "k1=0"),
        ((np.ones((1, 2)), np.ones((1, 2)), 20, 0), "k2=0"),
        ((np.ones((1, 2)), np.ones((1, 2)), 20, 6, 1.5), "lambda_value=1.5"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, complaint):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        k_reciprocal(*arguments)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
