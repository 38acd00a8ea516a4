from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.identity.idf1 import idf1

boxes = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["1", "2", "3", "4", None])), min_size=1, max_size=25)


def slow_idf1(truth, assigned):
    """Every one-to-one matching of four names to four names, tried."""
    found = sum(one is not None for one in assigned)
    right = 0
    for names in permutations("1234"):
        matched = dict(zip("abcd", names, strict=True))
        right = max(right, sum(matched[true] == one for true, one in zip(truth, assigned, strict=True)))
    return 2 * right / (len(truth) + found)


@settings(deadline=None)
@given(boxes)
def test_it_is_the_best_of_all_matchings(boxes):
    truth, assigned = zip(*boxes, strict=True)
    assert idf1(truth, assigned) == pytest.approx(slow_idf1(truth, assigned))


@settings(deadline=None)
@given(boxes)
def test_names_do_not_matter(boxes):
    truth, assigned = zip(*boxes, strict=True)
    other = [None if one is None else f"new-{one}" for one in assigned]
    assert idf1(truth, other) == idf1(truth, assigned)


def test_known_cases():
    assert idf1(["a", "a", "b"], ["1", "1", "2"]) == 1
    assert idf1(["a", "a", "b", "b"], ["1", "1", "1", "1"]) == 0.5
    assert idf1(["a", "a", "b"], [None, "1", "2"]) == pytest.approx(2 * 2 / (3 + 2))
    assert idf1(["a"], [None]) == 0


@pytest.mark.parametrize(("truth", "assigned"), [([], []), (["a"], []), (["a"], ["1", "2"])])
def test_boxes_that_do_not_fit_are_refused(truth, assigned):
    with pytest.raises(ValueError, match="wanted one of each"):
        idf1(truth, assigned)
