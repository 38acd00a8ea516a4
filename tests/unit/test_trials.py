from dataclasses import replace

import numpy as np
import pytest

from serve.errors import GalleryError, SourceError
from serve.identity.open_set import fpir, threshold_at, tpir
from serve.identity.trials import CURVE_AT, choose_threshold, draw, run_trials
from serve.samples import Sample

DIM = 16


def people(identities, each, prefix, seed=0):
    """Pictures of some identities, each scattered about its own direction, in three cameras."""
    rng = np.random.default_rng(seed)
    samples, vectors = [], []
    for identity in identities:
        centre = np.random.default_rng(identity).standard_normal(DIM)
        for number in range(each):
            samples.append(Sample(f"{prefix}{identity}-{number}", identity=str(identity), camera=str(number % 3)))
            vectors.append(centre + 0.8 * rng.standard_normal(DIM))
    return samples, np.array(vectors, np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def slow_scores(enrolled, vectors, probe, vector, without=()):
    """Best cosine of the probe's own identity and of the others."""
    cosines = unit(vectors) @ unit(vector[None])[0]
    own = [c for s, c in zip(enrolled, cosines, strict=True) if s.identity == probe.identity and s.source not in without]
    rival = [c for s, c in zip(enrolled, cosines, strict=True) if s.identity not in (probe.identity, "-1", None)]
    return max(own, default=-np.inf), max(rival, default=-np.inf)


def test_mated_and_non_mated_probes_are_told_apart(gallery):
    enrolled, vectors = people(range(8), 3, "g")
    gallery.add([*enrolled, Sample("-", identity="-1"), Sample("?")], np.concatenate([vectors, vectors[:2]]))
    probes, asked = people(range(12), 4, "p", seed=1)
    trials = run_trials(gallery, [*probes, Sample("junk", identity="-1")], np.concatenate([asked, asked[:1]]))
    assert (len(trials.mated), len(trials.nonmated), trials.held_out) == (32, 16, False)
    assert set(trials.nonmated) == {"8", "9", "10", "11"}
    wanted = np.array([slow_scores(enrolled, vectors, *pair) for pair in zip(probes, asked, strict=True)])
    np.testing.assert_allclose(trials.own, wanted[:32, 0], atol=1e-5)
    np.testing.assert_allclose(trials.rival, wanted[:32, 1], atol=1e-5)
    np.testing.assert_allclose(trials.top, wanted[32:, 1], atol=1e-5)


def test_where_all_are_enrolled_each_is_left_out_in_its_turn(gallery):
    enrolled, vectors = people(range(6), 3, "g")
    gallery.add(enrolled, vectors)
    probes, asked = people(range(6), 2, "p", seed=1)
    trials = run_trials(gallery, probes, asked)
    assert trials.held_out
    assert trials.mated == trials.nonmated
    for place, (probe, vector) in enumerate(zip(probes, asked, strict=True)):
        others = [s.identity != probe.identity for s in enrolled]
        left = [s for s in enrolled if s.identity != probe.identity]
        assert trials.top[place] == pytest.approx(slow_scores(left, vectors[others], probe, vector)[1], abs=1e-5)


def test_an_enrolled_picture_does_not_find_itself(gallery):
    enrolled, vectors = people(range(5), 3, "g")
    gallery.add(enrolled, vectors)
    trials = run_trials(gallery, enrolled, vectors)
    wanted = [slow_scores(enrolled, vectors, s, v, without=(s.source,))[0] for s, v in zip(enrolled, vectors, strict=True)]
    np.testing.assert_allclose(trials.own, wanted, atol=1e-5)
    assert trials.own.max() < 0.999


def test_tracks_are_pooled(gallery):
    gallery.add(*people(range(5), 3, "g"))
    probes, asked = people(range(7), 9, "p", seed=1)
    trials = run_trials(gallery, probes, asked, tracks=True)
    assert (len(trials.mated), len(trials.nonmated)) == (5 * 3, 2 * 3)
    of_the_first = unit(unit(asked[[0, 3, 6]]).mean(0, keepdims=True))
    alone = run_trials(gallery, probes[:1], of_the_first)
    assert trials.own[0] == pytest.approx(alone.own[0], abs=1e-6)
    assert trials.own.mean() > run_trials(gallery, probes, asked).own.mean()


def test_strangers_without_a_name_of_their_own_are_not_pooled(gallery):
    gallery.add(*people(range(2), 3, "g"))
    probes, asked = people(range(4), 2, "p", seed=1)
    named = [replace(probe, identity="0000" if place >= 4 else probe.identity) for place, probe in enumerate(probes)]
    assert len(run_trials(gallery, named, asked, tracks=True).nonmated) == 4


def test_a_filter_may_leave_nobody(gallery):
    gallery.add(*people(range(5), 3, "g"))
    probes, asked = people(range(7), 2, "p", seed=1)
    trials = run_trials(gallery, probes, asked, where="camera = 9")
    assert set(trials.own) | set(trials.top) == {-np.inf}
    with pytest.raises(GalleryError, match="wanted a wider --where"):
        choose_threshold(gallery, trials, 0.1)


def test_the_threshold_is_of_the_trials(gallery):
    gallery.add(*people(range(8), 3, "g"))
    trials = run_trials(gallery, *people(range(40), 4, "p", seed=1))
    chosen = choose_threshold(gallery, trials, 0.1, where="")
    assert chosen.threshold == threshold_at(trials.top, 0.1)
    assert chosen.fpir.rate == fpir(trials.top, chosen.threshold) <= 0.1
    assert chosen.tpir.rate == tpir(trials.own, trials.rival, chosen.threshold)
    assert (chosen.fpir.probes, chosen.fpir.identities, chosen.tpir.identities, chosen.identities) == (128, 32, 8, 8)
    assert chosen.encoder_id == gallery.encoder_id
    assert [point.fpir <= rate for point, rate in zip(chosen.curve, CURVE_AT, strict=True)] == [True] * len(CURVE_AT)
    assert chosen.probability(0.9) > chosen.probability(0.2)
    assert "32 identities" in chosen.summary()
    with pytest.raises(GalleryError, match="FPIR is 1"):
        choose_threshold(gallery, trials, 1)


def test_the_fpir_holds_for_other_strangers(gallery):
    gallery.add(*people(range(10), 3, "g"))
    chosen = choose_threshold(gallery, run_trials(gallery, *people(range(210), 2, "p", seed=1)), 0.1)
    others = run_trials(gallery, *people([0, *range(1000, 1200)], 2, "q", seed=2))
    assert fpir(others.top, chosen.threshold) == pytest.approx(0.1, abs=0.05)


def test_the_picture_of_the_curve(gallery, tmp_path):
    gallery.add(*people(range(8), 3, "g"))
    trials = run_trials(gallery, *people(range(20), 4, "p", seed=1))
    draw(trials, choose_threshold(gallery, trials, 0.1), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_probes_that_cannot_calibrate_are_refused(gallery):
    probes, asked = people(range(3), 2, "p")
    with pytest.raises(GalleryError, match="0 identities are enrolled, wanted 2 or more"):
        run_trials(gallery, probes, asked)
    gallery.add(*people(range(10, 13), 2, "g"))
    with pytest.raises(SourceError, match="none of 6 probes is of an enrolled identity"):
        run_trials(gallery, probes, asked)
    with pytest.raises(SourceError, match="who: a probe without identity"):
        run_trials(gallery, [Sample("who")], asked[:1])
