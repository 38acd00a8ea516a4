from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import EncoderMismatch, GalleryError
from serve.identity.decision import summary
from serve.identity.identify import identify, outgrown, rank_identities
from serve.samples import Sample
from tests.thresholds import calibration

DIM = 16


def some(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def filled(gallery, count=60):
    """Six identities very uneven in size, junk, distractors, and items of nobody."""
    names = [["a"] * 30, ["b"] * 10, ["c", "d", "e", "f"], ["-1"] * 3, ["0000"] * 3, [None] * 10]
    identities = [name for group in names for name in group]
    samples = [Sample(f"{i}", identity=one, camera=str(i % 3), time=float(i)) for i, one in enumerate(identities)]
    if not len(gallery):
        gallery.add(samples, some(len(samples)))
    return samples, some(len(samples))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 500), k=st.integers(1, 8), camera=st.sampled_from([None, "0", "2"]))
def test_identities_rank_by_their_best_picture(gallery, seed, k, camera):
    samples, vectors = filled(gallery)
    query = some(1, seed)[0]
    cosine = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    best = {}
    for sample, score in zip(samples, cosine, strict=True):
        if sample.identity not in (None, "-1", "0000") and camera in (None, sample.camera):
            best[sample.identity] = max(best.get(sample.identity, -1), score)
    wanted = sorted(best.items(), key=lambda pair: -pair[1])[:k]
    hits = rank_identities(gallery, query, k, f"camera = {camera}" if camera else None)
    assert [hit.identity for hit in hits] == [name for name, _ in wanted]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in wanted], atol=1e-5)


def test_many_pictures_of_one_do_not_hide_the_others(gallery):
    vectors = np.eye(DIM)[0] + 0.01 * some(200)
    gallery.add([Sample(f"a{i}", identity="a") for i in range(200)], vectors.astype(np.float32))
    gallery.add([Sample("b", identity="b")], some(1))
    assert [hit.identity for hit in rank_identities(gallery, np.eye(DIM)[0], 2)] == ["a", "b"]


def test_more_identities_than_there_are_do_not_read_the_whole_gallery(gallery, monkeypatch):
    gallery.add([Sample(f"{i}", identity="ab"[i % 2]) for i in range(500)], some(500))
    looked_at, search = [], gallery.search
    monkeypatch.setattr(gallery, "search", lambda *asked: looked_at.append(len(found := search(*asked))) or found)
    assert len(rank_identities(gallery, some(1)[0], 5)) == 2
    assert sum(looked_at) < 100


def test_pictures_of_a_probe_are_pooled_by_direction(gallery):
    gallery.add([Sample("a", identity="a")], np.eye(DIM, dtype=np.float32)[:1])
    assert identify(gallery, np.eye(DIM)[:2] * [[9], [0.1]]).score == pytest.approx(np.sqrt(0.5))
    with pytest.raises(GalleryError, match="no direction"):
        identify(gallery, np.stack([np.eye(DIM)[0], -np.eye(DIM)[0]]))


def test_the_threshold_decides(gallery):
    gallery.add([Sample("a", identity="a"), Sample("b", identity="b")], np.eye(DIM, dtype=np.float32)[:2])
    probe = np.eye(DIM)[[0]] + np.eye(DIM)[[2]]
    score = float(np.sqrt(0.5))
    undecided = identify(gallery, probe)
    assert (undecided.verdict, undecided.identity, undecided.probability) == ("undecided", None, None)
    assert [hit.identity for hit in undecided.candidates] == ["a", "b"]
    strict, mild = (calibration(encoder_id=gallery.encoder_id, threshold=score + change) for change in (0.001, -0.001))
    assert identify(gallery, probe, mild).identity == "a"
    refused = identify(gallery, probe, strict)
    assert (refused.verdict, refused.identity) == ("unknown", None)
    assert refused.score == pytest.approx(score)
    assert refused.probability == pytest.approx(1 / (1 + np.exp(-(20 * score - 12))), abs=1e-5)
    assert summary(refused).startswith("UNKNOWN")
    assert summary(identify(gallery, probe, mild)).startswith("a  probability of the best 0.")
    assert asdict(refused)["candidates"][0]["identity"] == "a"


def test_a_score_equal_to_the_threshold_is_named(gallery):
    gallery.add([Sample("a", identity="a")], np.eye(DIM, dtype=np.float32)[:1])
    exactly = calibration(encoder_id=gallery.encoder_id, threshold=1.0)
    assert identify(gallery, np.eye(DIM)[[0]], exactly).verdict == "known"


def test_nobody_to_be_found_is_unknown(gallery):
    gallery.add([Sample("-", identity="-1"), Sample("?")], some(2))
    decision = identify(gallery, some(1), calibration(encoder_id=gallery.encoder_id))
    assert (decision.verdict, decision.score, decision.probability, decision.candidates) == ("unknown", None, None, ())


def test_what_cannot_be_asked_is_refused(gallery):
    with pytest.raises(EncoderMismatch, match="simclr reid calibrate"):
        identify(gallery, some(1), calibration())
    with pytest.raises(GalleryError, match="k is 0"):
        identify(gallery, some(1), k=0)
    with pytest.raises(ValueError, match="wanted"):
        identify(gallery, some(1)[0])


def test_a_gallery_that_has_outgrown_its_threshold(gallery):
    chosen = calibration(encoder_id=gallery.encoder_id, identities=4)
    gallery.add([Sample(f"{i}", identity=str(i)) for i in range(6)] + [Sample("-", identity="-1")], some(7))
    assert outgrown(gallery, chosen) is None
    gallery.add([Sample("6", identity="6"), Sample("7", identity="7")], some(2))
    assert "4 identities, now there are 8: expect an FPIR of about 0.02, not 0.01" in outgrown(gallery, chosen)
