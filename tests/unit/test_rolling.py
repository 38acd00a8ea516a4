import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.identity.rolling import RollingReid
from serve.samples import Sample

DIM = 16
AXES = np.eye(DIM)


def rolling(**changes):
    return RollingReid(**{"threshold": 0.9, "dim": DIM, "evidence": 2} | changes)


def near(axis, seed, noise=0.05):
    return AXES[axis] + noise * np.random.default_rng(seed).standard_normal(DIM)


class SlowRolling:
    """The rules of the module as they stand there, over the whole history, in loops."""

    def __init__(self, threshold, evidence, memory_s):
        self.threshold, self.evidence, self.memory_s = threshold, evidence, memory_s
        self.seen, self.identity, self.count = {}, {}, 0

    def feed(self, track, camera, time_s, vector):
        me = (camera, track)
        self.seen.setdefault(me, []).append((time_s, vector / np.linalg.norm(vector)))
        for key in [key for key, seen in self.seen.items() if max(t for t, _ in seen) < time_s - self.memory_s]:
            del self.seen[key]
            self.identity.pop(key, None)
        others = [key for key in self.seen if key != me and self.identity.get(key) is not None]
        barred = {self.identity[key] for key in others if key[0] == camera and self._overlap(key, me)}
        best = {}
        for key in others:
            if (name := self.identity[key]) not in barred:
                best[name] = max(best.get(name, -1), float(self._mean(key) @ self._mean(me)))
        answer = self.identity.get(me)
        if best and max(best.values()) >= self.threshold:
            answer = max(best, key=lambda name: (best[name], name))
        elif answer is None or answer in barred:
            answer = None
            if len(self.seen[me]) >= self.evidence:
                self.count += 1
                answer = f"new-{self.count}"
        self.identity[me] = answer
        return answer

    def _mean(self, key):
        mean = np.sum([vector for _, vector in self.seen[key]], axis=0)
        return mean / np.linalg.norm(mean)

    def _overlap(self, one, other):
        a, b = ([t for t, _ in self.seen[key]] for key in (one, other))
        return min(a) <= max(b) and min(b) <= max(a)


steps = st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("12"), st.integers(0, 6), st.integers(0, 3)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(1, 3), st.sampled_from([5.0, 20.0, math.inf]), st.sampled_from([0.3, 0.8, 0.95]))
def test_it_follows_its_rules(steps, evidence, memory_s, threshold):
    fast, slow = rolling(threshold=threshold, evidence=evidence, memory_s=memory_s), SlowRolling(threshold, evidence, memory_s)
    now = 0.0
    for number, (track, camera, wait_s, axis) in enumerate(steps):
        now += wait_s
        vector = near(axis, number, noise=0.3)
        assert fast.feed(track, camera, now, vector) == slow.feed(track, camera, now, vector)
        for one, other in combinations(slow.seen, 2):
            if one[0] == other[0] and slow._overlap(one, other) and slow.identity.get(one):
                assert slow.identity[one] != slow.identity.get(other)


def test_a_track_becomes_somebody_and_is_met_again():
    reid = rolling()
    assert reid.feed("1", "A", 0, near(0, 1)) is None
    assert reid.feed("1", "A", 1, near(0, 2)) == "new-1"
    assert reid.feed("9", "B", 50, near(0, 3)) == "new-1"
    assert reid.feed("9", "B", 51, near(0, 4)) == "new-1"
    assert reid.feed("2", "B", 90, near(1, 5)) is None
    assert reid.feed("2", "B", 91, near(1, 6)) == "new-2"


def test_a_track_that_grows_clear_changes_its_identity():
    reid = rolling(evidence=1)
    assert reid.feed("1", "A", 0, AXES[0]) == "new-1"
    assert reid.feed("2", "B", 5, AXES[0] + AXES[1]) == "new-2"  # half of it hidden
    assert reid.feed("2", "B", 6, AXES[0]) == "new-1"


def test_two_at_once_in_one_camera_are_two():
    reid = rolling(evidence=1)
    assert reid.feed("1", "A", 0, AXES[0]) == "new-1"
    assert reid.feed("1", "A", 10, AXES[0]) == "new-1"
    assert reid.feed("2", "A", 5, AXES[0]) == "new-2"
    assert reid.feed("3", "B", 5, AXES[0]) in ("new-1", "new-2")
    assert reid.feed("4", "A", 20, AXES[0]) in ("new-1", "new-2")


def test_a_track_that_comes_back_while_another_bears_its_name_yields():
    reid = rolling(evidence=1)
    assert reid.feed("1", "A", 0, AXES[0]) == "new-1"
    assert reid.feed("2", "A", 5, AXES[0]) == "new-1"
    assert reid.feed("1", "A", 6, AXES[0]) == "new-2"
    assert reid.feed("2", "A", 7, AXES[0]) == "new-1"


def test_who_was_not_seen_for_long_is_forgotten():
    reid = rolling(evidence=1, memory_s=10)
    assert reid.feed("1", "A", 0, AXES[0]) == "new-1"
    assert reid.feed("2", "B", 10, AXES[0]) == "new-1"
    assert reid.feed("3", "C", 20.5, AXES[0]) == "new-2"
    assert len(reid._tracks) == 1


def test_many_tracks():
    reid = rolling(evidence=1, threshold=2)
    for number in range(200):
        assert reid.feed(str(number), "A", number, near(number % DIM, number)) == f"new-{number + 1}"


def test_enrolled_identities_are_met(tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        samples = [Sample("a", identity="anna"), Sample("b", identity="berta"), Sample("n", identity="new-1")]
        gallery.add(samples, np.array([AXES[0], AXES[0] + 0.1 * AXES[1], AXES[5]], np.float32))
        reid = rolling(gallery=gallery, evidence=2)
        assert reid.feed("1", "A", 0, AXES[0]) == "anna"
        assert reid.feed("2", "A", 0, AXES[0]) == "berta"
        assert reid.feed("3", "A", 0, AXES[0]) is None
        assert reid.feed("3", "A", 0, AXES[0]) == "new-2"
        assert len(gallery) == 3


@pytest.mark.parametrize("wrong", [{"threshold": -2}, {"threshold": math.nan}, {"evidence": 0}, {"memory_s": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="wanted"):
        rolling(**wrong)


@pytest.mark.parametrize("vector", [np.zeros(DIM), np.full(DIM, np.nan), np.ones(DIM + 1)])
def test_a_picture_without_direction_is_refused_and_leaves_nothing(vector):
    reid = rolling()
    with pytest.raises(GalleryError, match="the track's picture"):
        reid.feed("1", "A", 0, vector)
    assert reid._tracks == {}
