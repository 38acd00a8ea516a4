import numpy as np
import pytest

from serve.errors import GalleryError
from serve.pooling import expand_queries, pool, pool_groups


def slow_expanded(query, gallery, k, alpha):
    query, gallery = query / np.linalg.norm(query), [row / np.linalg.norm(row) for row in gallery]
    total = query.copy()
    for row in sorted(gallery, key=lambda row: -(row @ query))[:k]:
        total = total + row * (max(row @ query, 0) ** alpha if row @ query > 0 else 0)
    return total / np.linalg.norm(total)


@pytest.mark.parametrize("alpha", [0, 1, 2.5, 3])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_expansion_equals_the_slow_form(alpha, k):
    rng = np.random.default_rng(0)
    queries, gallery = rng.standard_normal((7, 6)), rng.standard_normal((30, 6))
    found = expand_queries(queries, gallery, k, alpha)
    np.testing.assert_allclose(found, [slow_expanded(query, gallery, k, alpha) for query in queries], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found[:1], expand_queries(queries[:1], gallery, k, alpha))  # each alone


def test_expansion_takes_twins_together_wherever_they_stand():
    gallery = np.array([[1, 0.2], [1, 0.2], [0.5, 1], [1, 0.2]])
    found = expand_queries(np.array([[1.0, 0]]), gallery, k=2, alpha=0)
    np.testing.assert_array_equal(found, expand_queries(np.array([[1.0, 0]]), gallery[[2, 0, 3, 1]], k=2, alpha=0))
    three = np.array([1.0, 0]) + 3 * gallery[0] / np.linalg.norm(gallery[0])
    np.testing.assert_allclose(found[0], three / np.linalg.norm(three), atol=1e-6)


def test_who_points_away_has_no_weight_and_nothing_is_not_a_number():
    for alpha in (0, 2.5):
        found = expand_queries(np.array([[1.0, 0]]), np.array([[-1.0, 0]]), alpha=alpha)
        np.testing.assert_allclose(found, [[1, 0]], atol=1e-6)


def test_pooling_equals_the_slow_forms():
    rng = np.random.default_rng(0)
    vectors, quality = rng.standard_normal((5, 4)), rng.random(5)
    unit = [row / np.linalg.norm(row) for row in vectors]
    wanted = {
        "mean": sum(unit),
        "max": np.array([max(row[i] for row in unit) for i in range(4)]),
        "quality": sum(q * row for q, row in zip(quality, unit, strict=True)),
    }
    found = {"mean": pool(vectors), "max": pool(vectors, "max"), "quality": pool(vectors, quality_N=quality)}
    for name, vector in wanted.items():
        np.testing.assert_allclose(found[name], vector / np.linalg.norm(vector), atol=1e-6)
        assert found[name].dtype == np.float32


def test_groups_are_pooled_each_alone_and_sorted_by_name():
    rng = np.random.default_rng(1)
    vectors, quality = rng.standard_normal((6, 3)), rng.random(6)
    groups = ["t2", "t10", "t2", "t1", "t10", "t2"]
    pooled, names = pool_groups(vectors, groups, quality_N=quality)
    assert names == ["t1", "t10", "t2"]
    for vector, its in zip(pooled, ([3], [1, 4], [0, 2, 5]), strict=True):
        np.testing.assert_array_equal(vector, pool(vectors[its], quality_N=quality[its]))


@pytest.mark.parametrize(
    ("call", "error", "complaint"),
    [
        (lambda: pool(np.array([[1.0, 0], [-1, 0]])), GalleryError, "pooled vector: row 0 is zero"),
        (lambda: pool(np.array([[1.0, 0], [0, 0]])), GalleryError, "row 1 is zero"),
        (lambda: pool(np.zeros((0, 3))), ValueError, "N of 1 or more"),
        (lambda: pool(np.ones((2, 3)), "max", [1, 2]), ValueError, "quality weighs the mean only"),
        (lambda: pool(np.ones((2, 3)), quality_N=[1, -1]), ValueError, "numbers of 0 or more"),
        (lambda: pool(np.ones((2, 3)), quality_N=[0, 0]), ValueError, "not all 0"),
        (lambda: pool(np.ones((2, 3)), quality_N=[1]), ValueError, "wanted 2 numbers"),
        (lambda: pool_groups(np.ones((2, 3)), ["a"]), ValueError, "one for each"),
        (lambda: expand_queries(np.ones((1, 2)), np.ones((1, 2)), k=0), ValueError, "k=0"),
        (lambda: expand_queries(np.ones((1, 2)), np.ones((1, 2)), alpha=-1), ValueError, "alpha=-1"),
    ],
)
def test_what_cannot_be_pooled_is_told(call, error, complaint):
    with pytest.raises(error, match=complaint):
        call()
