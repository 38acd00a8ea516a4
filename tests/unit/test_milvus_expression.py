"""Filters as Milvus expressions: the same rows as in a folder and as the slow twin, whatever is asked."""

import operator
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve.errors import GalleryError
from serve.filters import MAX_CONDITIONS, MAX_DEPTH, And, Condition, Not, Or, parse_where
from serve.gallery import Gallery
from serve.milvus.expression import expression, facts_of
from serve.samples import Sample
from tests.gallery_items import vectors_of
from tests.unit.conftest import ToyEncoder
from tests.unit.test_filters import NUMBERS, WORDS, passes, quoted, trees

COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
NAMES = ("a", "5", "a-b", "_", "not in a filter")
EXTRAS = (*WORDS, *NUMBERS, True, False, None, ["a"], [], {"a": "a"}, {})


def draw_samples(rng):
    """Every odd value in every place, and many of them unknown."""
    texts, times = [None, *WORDS], [None, *map(float, NUMBERS)]
    sources = [*(word for word in WORDS if word), *(f"source {i}" for i in range(60))]
    samples = [
        Sample(source, *(texts[rng.randrange(len(texts))] for _ in range(3)), time=times[i % len(times)])
        for i, source in enumerate(sources)
    ]
    extra = {source: {name: EXTRAS[rng.randrange(len(EXTRAS))] for name in NAMES if rng.random() < 0.6} for source in sources}
    return samples, extra


@pytest.fixture(scope="module")
def twins(tmp_path_factory, milvus_lite):
    """The same items in both kinds of gallery."""
    samples, extra = draw_samples(random.Random(0))  # noqa: S311
    vectors = vectors_of(len(samples))
    folder = tmp_path_factory.mktemp("folder") / "gallery"
    with (
        Gallery.open(folder, ToyEncoder(), create=True) as ours,
        Gallery.open(f"{milvus_lite}#twins", ToyEncoder(), create=True) as theirs,
    ):
        for gallery in (ours, theirs):
            gallery.add(samples, vectors, extra=extra)
        assert theirs.items() == ours.items()
        assert len(ours) > 70
        yield ours, theirs, ours.items()


@pytest.mark.milvus
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees)
@example(Or(()))
@example(And(()))
@example(Condition("time", "in", ()))
@example(Not(Condition("label", "in", ())))
def test_both_kinds_of_gallery_let_the_same_pass(twins, where):
    ours, theirs, items = twins
    for asked in (where, Not(where)):
        wanted = [item.id for item in items if passes(asked, item)]
        assert ours.ids(asked).tolist() == wanted
        assert theirs.ids(asked).tolist() == wanted
        assert theirs.count(asked) == len(wanted)


@pytest.mark.milvus
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
    | st.text(alphabet="\"'\\\n\r\t()[]{}=!%_ orandnt01", max_size=20),
    st.sampled_from(["label = {}", "label in ({}, x)", "extra.a = {}", "extra.a in ({}, x)", "not source != {}"]),
)
def test_no_text_gets_out_of_its_quotes(twins, text, form):
    ours, theirs, _ = twins
    where = form.format(quoted(text, '"'))
    assert theirs.ids(where).tolist() == ours.ids(where).tolist()


@pytest.mark.milvus
def test_a_search_through_a_filter_finds_what_passes(twins):
    ours, theirs, _ = twins
    for where in ("extra.a is known and not label = a", "time between 0 and 5 or camera in (a, b)", "extra.5 >= 1"):
        query = vectors_of(1, seed=9)[0]
        assert [hit.id for hit in theirs.search(query, 99, where)] == [hit.id for hit in ours.search(query, 99, where)]


@pytest.mark.milvus
def test_the_largest_filters_are_no_trouble_for_milvus(twins):
    ours, theirs, _ = twins
    deep = "label = a or time > 1 and not (" * (MAX_DEPTH // 2) + "extra.a in (1)" + ")" * (MAX_DEPTH // 2)
    wide = " or ".join(["extra.a between 1 and 2"] * MAX_CONDITIONS)
    names = [f"n{i}" for i in range(5000)]
    long = f"identity in ({', '.join(names)}, a)"
    for where in (deep, wide, long, f"not ({long})", f"not extra.a in ({', '.join(names[:200])}, a)"):
        assert theirs.ids(where).tolist() == ours.ids(where).tolist()


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("label = cat", '(label == "cat")'),
        ("not label = cat", '(label != "cat" or (label is null))'),
        ("label in (a, b)", '(label in ["a", "b"])'),
        ("not (label is known and time < 5)", "((label is null) or (time >= 5.0 or (time is null)))"),
        ("extra.a >= 0.5", '(facts["number:a"] >= 0.5)'),
        ("extra.a != x", '(facts["text:a"] != "x" or (not exists facts["text:a"]))'),
        ("extra.a is unknown", '(not exists facts["known:a"])'),
        ("", "(id >= 0)"),
    ],
)
def test_not_is_carried_down_to_conditions_that_name_the_unknown(where, wanted):
    assert expression(parse_where(where)) == wanted


def test_whole_numbers_beyond_doubles_are_compared_exactly():
    above, below = 2**53 + 1, 2**54 - 1  # between two doubles; they round down and up
    assert expression(Condition("time", "=", (above,))) == "(id < 0)"
    assert expression(Condition("time", "!=", (above,))) == "(id >= 0)"
    for number, shown in ((above, "9007199254740992.0"), (below, "1.8014398509481984e+16")):
        nearest = float(number)
        for asked in COMPARE:
            said, value = expression(Condition("time", asked, (number,))).strip("()").split()[1:]
            assert value == shown
            # of the double itself, which alone stands in question
            assert COMPARE[said](nearest, nearest) == COMPARE[asked](int(nearest), number)


def test_facts_are_sorted_by_kind():
    extra = {"a": 1, "b": 2.5, "c": "x", "d": True, "e": None, "f": [1], "g": {}, "h": 10**30, "i j": "x"}
    known = {f"known:{name}": True for name in (*"abcdfgh", "i j")}
    numbers = {"number:a": 1, "number:b": 2.5, "number:h": 1e30}
    assert facts_of(extra) == known | numbers | {"text:c": "x", "text:d": "true", "text:i j": "x"}


def test_a_value_that_is_no_text_is_refused_before_milvus_sees_it():
    with pytest.raises(GalleryError, match="holds NUL"):
        Condition("label", "=", ("a\0b",))
