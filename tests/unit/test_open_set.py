import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.identity.open_set import curve, fpir, interval, threshold_at, tpir

score = st.one_of(st.just(-math.inf), st.integers(-8, 8).map(lambda n: n / 8))  # a coarse grid: many ties
scores = st.lists(score, min_size=1, max_size=30)
pairs = st.lists(st.tuples(score, score), min_size=1, max_size=30)


def slow_fpir(top, threshold):
    return sum(1 for one in top if one >= threshold) / len(top)


def slow_tpir(mated, threshold):
    """Somebody is named if the best score reaches the threshold, and rightly if that is the own one alone."""
    right = 0
    for own, rival in mated:
        named = max(own, rival) >= threshold
        right += named and own > rival
    return right / len(mated)


@settings(deadline=None)
@given(pairs, scores, score)
def test_the_rates_are_counts(mated, top, threshold):
    own, rival = zip(*mated, strict=True)
    assert fpir(top, threshold) == slow_fpir(top, threshold)
    assert tpir(own, rival, threshold) == slow_tpir(mated, threshold)


@settings(deadline=None)
@given(scores, st.fractions(Fraction(1, 1000), Fraction(999, 1000)))
def test_the_threshold_keeps_the_rate_and_is_the_lowest_that_does(top, rate):
    threshold = threshold_at(top, float(rate))
    assert fpir(top, threshold) <= float(rate)
    with np.errstate(over="ignore"):  # just above -inf
        assert fpir(top, np.nextafter(threshold, -math.inf)) > float(rate)


@pytest.mark.parametrize(("count", "rate", "named"), [(100, 0.29, 29), (30, 0.1, 3), (1000, 0.001, 1), (99, 0.01, 0)])
def test_a_rate_that_fits_exactly_is_used_up(count, rate, named):
    assert fpir(np.arange(count) / count, threshold_at(np.arange(count) / count, rate)) == named / count


@settings(deadline=None)
@given(pairs, scores)
def test_the_curve_is_both_rates_at_every_threshold(mated, top):
    own, rival = zip(*mated, strict=True)
    whole = curve(own, rival, top)
    assert (np.diff(whole.threshold) < 0).all()
    assert (np.diff(whole.fpir) >= 0).all()
    assert (np.diff(whole.tpir) >= 0).all()
    assert set(whole.threshold) >= set(top)
    for threshold, false, true in zip(whole.threshold, whole.fpir, whole.tpir, strict=True):
        assert (false, true) == (slow_fpir(top, threshold), slow_tpir(mated, threshold))


@settings(deadline=None)
@given(pairs, scores, st.randoms(use_true_random=False))
def test_the_order_of_the_probes_changes_nothing(mated, top, random):
    before = curve(*zip(*mated, strict=True), top)
    random.shuffle(mated)
    random.shuffle(top)
    after = curve(*zip(*mated, strict=True), top)
    for name in ("threshold", "fpir", "tpir"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data())
def test_the_interval_is_where_the_binomial_tails_are_a_fortieth_each(count, data):
    hits = data.draw(st.integers(0, count))
    low, high = interval(hits / count, count)

    def at_most(k, p):
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    assert low == 0 if hits == 0 else 1 - at_most(hits - 1, low) == pytest.approx(0.025, rel=1e-6)
    assert high == 1 if hits == count else at_most(hits, high) == pytest.approx(0.025, rel=1e-6)


def test_the_rule_of_three():
    assert interval(0, 300, confidence=0.9)[1] == pytest.approx(3 / 300, rel=0.01)


NAN = [0.5, math.nan]


@pytest.mark.parametrize(
    "ask",
    [
        lambda: fpir(NAN, 0.5),
        lambda: fpir([], 0.5),
        lambda: tpir(NAN, [0, 0], 0.5),
        lambda: tpir([0, 0], NAN, 0.5),
        lambda: tpir([0, 0], [0], 0.5),
        lambda: threshold_at(NAN, 0.1),
        lambda: threshold_at([0.5], 0),
        lambda: threshold_at([0.5], 1),
        lambda: curve([0.5], [0.1], NAN),
        lambda: interval(1.1, 10),
        lambda: interval(0.5, 0),
    ],
)
def test_what_cannot_be_scored_is_refused(ask):
    with pytest.raises(ValueError, match="wanted"):
        ask()
