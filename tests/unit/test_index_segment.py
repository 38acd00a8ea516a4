"""Segments of every kind against brute force: complete, never a wrong score, near the truth."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serve.ann.segment
from serve.ann.cells import Pool, find_centres, nearest_centres
from serve.ann.method import Method, cells_of, keys_for, set_effort, trained
from serve.ann.segment import Segment, ranked, top
from tests.gallery_items import clustered

DIM, ROWS = 16, 3000
KINDS = ["exact", *keys_for(256, DIM)]


@functools.cache
def segment_of(kind):
    """3000 rows whose ids begin with 100; ids and rows are not in the same order."""
    vectors, ids = clustered(ROWS), np.random.default_rng(1).permutation(ROWS) + 100
    if kind == "exact":
        return Segment.of(ids, vectors)
    centres = find_centres(vectors, 256)
    index = trained(kind, centres, vectors)
    index.add(vectors)
    method = Method(kind, 64 if kind.startswith("HNSW") else 16, 1 if kind.endswith("Flat") else 20)
    set_effort(index, method.effort)
    return Segment.of(ids, vectors, method, index, cells_of(index, centres, vectors))


@pytest.fixture(autouse=True)
def few_rows_count_as_many(monkeypatch):
    monkeypatch.setattr(serve.ann.segment, "_BRUTE_ROWS", 60)


def truth(segment, query, k, allowed=None):
    """By brute force over the live rows: ids, and the score of every id."""
    rows = np.flatnonzero(segment.alive if allowed is None else segment.alive & np.isin(segment.ids, allowed))
    scores = segment.vectors[rows].astype(float) @ query
    order = np.argsort(-scores, kind="stable")[:k]
    return segment.ids[rows[order]], dict(zip(segment.ids[rows].tolist(), scores, strict=True))


def assert_true_and_complete(segment, queries, k, allowed=None):
    """As many results as there can be, none twice, all allowed and alive, with exact scores. Returns: recall."""
    scores, ids = segment.search(queries, k, allowed)
    found = []
    for query, line_scores, line in zip(queries, scores, ids, strict=True):
        wanted, exact = truth(segment, query, k, allowed)
        assert len(set(line.tolist())) == len(line) == len(wanted)
        np.testing.assert_allclose(line_scores, [exact[i] for i in line.tolist()], atol=1e-6)
        found.append(len(set(line) & set(wanted)) / max(1, len(wanted)))
    return float(np.mean(found))


@pytest.mark.parametrize("kind", KINDS)
def test_recall_of_every_kind(kind):
    segment, queries = segment_of(kind), clustered(50, seed=5)
    for some in (queries, queries[:1]):
        assert assert_true_and_complete(segment, some, 10) >= (1 if kind == "exact" else 0.95)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.1, 0.03, 0.01, 0.001])
def test_filters_of_every_selectivity(kind, share):
    segment, queries = segment_of(kind), clustered(50, seed=6)
    allowed = np.sort(np.random.default_rng(2).choice(segment.ids, round(share * ROWS), replace=False))
    recall = assert_true_and_complete(segment, queries, 10, allowed)
    assert recall >= (0.95 if kind != "exact" and len(allowed) > 60 else 1)
    assert np.mean([assert_true_and_complete(segment, query[None], 10, allowed) for query in queries[:10]]) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_that_takes_a_far_corner(kind):
    """The clusters that hold the allowed rows are not where the queries are."""
    segment, queries = segment_of(kind), clustered(60, seed=7)
    far = segment.vectors[int(np.argmin(segment.vectors @ queries[0]))]
    allowed = np.sort(segment.ids[np.argsort(-(segment.vectors @ far))[:400]])
    assert assert_true_and_complete(segment, queries, 10, allowed) >= 0.95


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    dead=st.sampled_from([0, 1, 300, 2500, 2995, ROWS]),
    size=st.sampled_from([None, 0, 1, 5, 59, 61, 700, 2999, ROWS]),
    k=st.sampled_from([1, 10, 150, 3500]),
    near_ones=st.booleans(),
)
def test_never_fewer_than_there_are(kind, seed, dead, size, k, near_ones):
    """Dead rows and filters at random, or just those that are nearest to the queries."""
    rng, queries = np.random.default_rng(seed), clustered(3, seed=seed)
    segment = segment_of(kind)
    order = np.argsort(-(segment.vectors @ queries[0])) if near_ones else rng.permutation(ROWS)
    segment = segment.without(np.sort(segment.ids[order[:dead]]))
    allowed = None if size is None else np.sort(segment.ids[rng.permutation(ROWS)[:size]])
    assert_true_and_complete(segment, queries, k, allowed)
    assert_true_and_complete(segment, queries[:1], k, allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beside_a_base(kind):
    """What comes after the base was built is found as well, and may be removed and set anew."""
    base, empty = segment_of(kind), Segment.of(np.empty(0, np.int64), np.empty((0, DIM), np.float32))
    one, two = clustered(300, seed=8), clustered(200, seed=9)
    beside = empty.listed_beside(base, np.arange(300), one).without(np.array([7, 8, *range(150, 300)]))
    beside = beside.listed_beside(base, np.arange(150, 350), two)
    assert beside.ids[beside.rows_of(np.array([7, 149, 150, 349]))].tolist() == [149, 150, 349]
    np.testing.assert_array_equal(beside.vectors[beside.rows_of(np.array([150, 349]))], two[[0, -1]])
    assert (beside.live, beside.ann is None) == (348, kind == "exact")
    queries = clustered(50, seed=10)
    assert_true_and_complete(beside, queries, 10)
    scores, ids = (np.hstack(parts) for parts in zip(base.search(queries, 10), beside.search(queries, 10), strict=True))
    found = ranked(scores, ids, 10)[0]
    wanted = np.sort(queries @ np.concatenate([base.vectors, beside.living()[1]]).T)[:, :-11:-1]
    assert np.mean(np.abs(found - wanted) < 1e-5) >= 0.95  # among all rows: those beside are few, and lie apart


def test_ids_and_rows():
    vectors = clustered(4)
    segment = Segment.of(np.array([5, -1, 3, 5]), vectors)
    assert (segment.live, segment.dead) == (3, 1)
    assert segment.rows_of(np.array([3, 4, 5, 6])).tolist() == [2, 3]  # of two rows with one id, the last
    after = segment.without(np.array([3, 9]))
    assert (after.live, segment.live) == (2, 3)
    assert after.without(np.array([3])) is after
    ids, rows = after.followed_by(np.array([8]), vectors[:1]).living()
    assert ids.tolist() == [5, 5, 8]
    np.testing.assert_array_equal(rows, vectors[[0, 3, 0]])


def test_a_filter_is_remembered_unless_it_may_change():
    segment, allowed = segment_of("exact"), np.array([101, 102])
    assert segment.pool(allowed) is not segment.pool(allowed)
    allowed.flags.writeable = False
    assert segment.pool(allowed) is segment.pool(allowed)
    for _ in range(20):  # and not for ever
        other = np.array([103])
        other.flags.writeable = False
        assert segment.pool(other).rows.tolist() == segment.rows_of(other).tolist()
    assert len(segment._pools) <= 8


def test_pools_by_cell():
    """Against a loop over queries, cells and rows."""
    segment, queries = segment_of(KINDS[1]), clustered(5, seed=3)
    rows = np.sort(np.random.default_rng(4).permutation(ROWS)[:500])
    pool = Pool.of(rows, segment.cells)
    of_rows = nearest_centres(segment.vectors, segment.cells.centres)
    np.testing.assert_array_equal(of_rows, segment.cells.of_rows)
    held = sorted(set(of_rows[rows].tolist()))
    for width in (1, 3, len(held)):
        for query, near in zip(queries, pool.near(queries, width), strict=True):
            cells = sorted(held, key=lambda cell: -float(segment.cells.centres[cell] @ query))[:width]
            assert sorted(near[near >= 0].tolist()) == [row for row in rows.tolist() if of_rows[row] in cells]


def test_top_and_ranked():
    scores = np.array([[0.5, 0.9, 0.5, 0.1, -np.inf]], np.float32)
    ids = np.array([[7, 3, 2, 9, -1]])
    assert set(top(scores, ids, 3)[1][0].tolist()) == {3, 7, 2}
    assert ranked(scores, ids, 9)[1].tolist() == [[3, 2, 7, 9, -1]]
    assert ranked(scores, ids, 1)[0].tolist() == [[pytest.approx(0.9)]]
