import numpy as np
import pytest

from serve.errors import GalleryError, SourceError
from serve.gallery import Gallery
from serve.metrics import evaluate_ranking
from serve.reid import evaluate_market, rank
from serve.sources import Sample

#          identity, camera: at growing distance from the probe
PLACED = [("7", "1"), ("7", "2"), ("-1", "2"), ("9", "1"), (None, "3"), ("7", None), ("0", "2"), ("7", "3")]


@pytest.fixture
def gallery(tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        samples = [
            Sample(f"{i}.jpg", identity=identity, camera=camera, time=float(i)) for i, (identity, camera) in enumerate(PLACED)
        ]
        vectors = np.zeros((len(samples), 16), np.float32)
        angles = np.arange(len(samples)) * 0.1
        vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
        gallery.add(samples, vectors)
        yield gallery


PROBE = np.eye(16)[0]


def places(hits):
    return [int(hit.source.removesuffix(".jpg")) for hit in hits]


def test_the_probes_own_camera_and_junk_are_taken_out(gallery):
    hits = rank(gallery, PROBE, identity="7", camera="1")
    assert places(hits) == [1, 3, 4, 5, 6, 7]
    assert [hit.match for hit in hits] == [True, False, None, True, False, True]
    assert hits[0].score == pytest.approx(np.cos(0.1))


def test_an_unknown_probe_keeps_all_but_junk_and_no_verdicts(gallery):
    hits = rank(gallery, PROBE, camera="1")
    assert places(hits) == [0, 1, 3, 4, 5, 6, 7]
    assert {hit.match for hit in hits} == {None}


def test_a_probe_without_camera_keeps_its_own(gallery):
    assert places(rank(gallery, PROBE, identity="7")) == [0, 1, 3, 4, 5, 6, 7]


def test_other_cameras_only(gallery):
    assert places(rank(gallery, PROBE, camera="1", other_cameras_only=True)) == [1, 4, 5, 6, 7]
    assert places(rank(gallery, PROBE, camera="1", other_cameras_only=True, where="time < 6")) == [1, 4, 5]
    with pytest.raises(GalleryError, match="needs the probe's camera"):
        rank(gallery, PROBE, other_cameras_only=True)


def test_k_filters_and_exclusions(gallery):
    assert places(rank(gallery, PROBE, identity="7", camera="1", k=2)) == [1, 3]
    assert places(rank(gallery, PROBE, identity="7", camera="1", where="time >= 4", k=2)) == [4, 5]
    assert places(rank(gallery, PROBE, exclude_ids=[1, 2], k=1)) == [3]
    assert places(rank(gallery, PROBE, where=" ", k=1)) == [0]


def market(rng, count):
    return [Sample(str(i), identity=str(rng.integers(-1, 8)), camera=str(rng.integers(3))) for i in range(count)]


def test_evaluate_market_is_cosine_ranking(monkeypatch):
    monkeypatch.setattr("serve.reid._BLOCK_QUERIES", 4)
    monkeypatch.setattr("serve.reid._BLOCK_GALLERY", 7)
    rng = np.random.default_rng(0)
    queries, gallery = market(rng, 15), market(rng, 60)
    vectors_Q, vectors_G = rng.standard_normal((15, 12)), rng.standard_normal((60, 12))
    cosine = [[q @ g / np.linalg.norm(q) / np.linalg.norm(g) for g in vectors_G] for q in vectors_Q]
    wanted = evaluate_ranking(
        1 - np.array(cosine),
        [s.identity for s in queries],
        [s.identity for s in gallery],
        [s.camera for s in queries],
        [s.camera for s in gallery],
    )
    found = evaluate_market(vectors_Q, queries, vectors_G, gallery)
    assert (found.map_step, found.map_trapezoid, found.minp) == (wanted.map_step, wanted.map_trapezoid, wanted.minp)
    np.testing.assert_array_equal(found.first_match_rank, wanted.first_match_rank)


def test_twins_rank_equal_wherever_they_stand():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 333)).astype(np.float32)
    twins = np.repeat(rng.standard_normal((1, 333)), 101, axis=0)
    for place in (0, 50, 100):
        samples = [Sample(str(i), identity="a" if i == place else "b") for i in range(101)]
        assert evaluate_market(query, [Sample("q", identity="a")], twins, samples).first_match_rank.tolist() == [101]


def test_gallery_pictures_of_unknown_identity_do_not_count():
    vectors = np.array([[1.0, 0], [0.9, 0.1], [0.5, 0.5]])
    gallery = [Sample("?"), Sample("-", identity="-1"), Sample("a", identity="a")]
    assert evaluate_market(vectors[:1], [Sample("q", identity="a")], vectors, gallery).map_step == 1


@pytest.mark.parametrize(
    ("query", "other", "complaint"),
    [
        (Sample("q.jpg"), Sample("g.jpg", identity="a"), "q.jpg: a query without identity"),
        (Sample("q.jpg", identity="a", camera="1"), Sample("g.jpg", identity="a"), "g.jpg: names no camera"),
    ],
)
def test_missing_facts_are_named(query, other, complaint):
    with pytest.raises(SourceError, match=complaint):
        evaluate_market(np.ones((1, 4)), [query], np.ones((1, 4)), [other])
