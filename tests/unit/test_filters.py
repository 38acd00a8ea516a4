import sqlite3
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import GalleryError
from serve.filters import Condition, Where, parse_where


def rows_passing(expression: str) -> list[int]:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE items (id INTEGER, label TEXT, identity TEXT, camera TEXT, source TEXT, time REAL)")
    rows = [
        (1, "cat", "a", "1", "x.jpg", 50.0),
        (2, "cat", "b", "2", "y.jpg", 100.0),
        (3, "dog", "c", "10", "z 1.jpg", 150.5),
        (4, None, None, None, "w.jpg", None),
    ]
    db.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", rows)
    condition, parameters = parse_where(expression).sql()
    return [row[0] for row in db.execute(f"SELECT id FROM items WHERE {condition} ORDER BY id", parameters)]  # noqa: S608


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("", [1, 2, 3, 4]),
        ("label = cat", [1, 2]),
        ("label=cat", [1, 2]),
        ("label != cat", [3, 4]),  # unknown is not known to be a cat
        ("camera != 2 and label = cat", [1]),
        ("camera = 1", [1]),  # text: not 10
        ("time >= 100", [2, 3]),
        ("time > 100 AND time < 1e3", [3]),
        ("time = 100", [2]),
        ("time != 100", [1, 3, 4]),
        ("time <= 100", [1, 2]),
        ("time in (50, 150.5)", [1, 3]),
        ("identity in (a, c)", [1, 3]),
        ("identity IN ('a')", [1]),
        ('source = "z 1.jpg"', [3]),
        ("label = cat and camera != 2 and time >= 10 and identity in (a, b)", [1]),
        ("label = 'cat'' or 1=1'", []),
        ("label = ''", []),
    ],
)
def test_expressions_select_the_right_rows(expression, wanted):
    assert rows_passing(expression) == wanted


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("colour = red", "found 'colour' where a field"),
        ("label", "the expression ends where an operator"),
        ("label =", "the expression ends where a value"),
        ("label == cat", "found '==' where an operator"),
        ("label < cat", "found '<' where = != or in"),
        ("label = traffic light", "found 'light' where and or the end"),
        ("label = cat or label = dog", "found 'or' where and"),
        ("label = cat and", "the expression ends where a field"),
        ("label = 'cat", "where a value"),
        ("label in cat", "found 'cat' where ("),
        ("label in ()", "found ')' where a value"),
        ("label in (a b)", "found 'b' where , or )"),
        ("label in (a", "the expression ends where , or )"),
        ("time > noon", "found 'noon' where a number"),
        ("time > nan", "found 'nan' where a number"),
        ("'label' = cat", "where a field"),
        ("label = cat; DROP TABLE items", "where and or the end"),
    ],
)
def test_a_wrong_expression_says_what_is_allowed_in_one_line(expression, complaint):
    with pytest.raises(GalleryError) as caught:
        parse_where(expression)
    message = str(caught.value)
    assert complaint in message
    assert "fields: label, identity, camera, source, time" in message
    assert "\n" not in message


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\0")))
def test_any_quoted_text_comes_back_as_it_was(text):
    quoted = '"' + text.replace('"', '""') + '"'
    assert parse_where(f"label = {quoted} and source != {quoted}") == Where(
        (Condition("label", "=", (text,)), Condition("source", "!=", (text,)))
    )


@given(st.text())
def test_any_text_is_read_or_refused_in_our_words(text):
    with suppress(GalleryError):
        parse_where(text)


def test_values_never_enter_the_sql_text():
    sql, parameters = parse_where('label = "\'; DROP TABLE items"').sql()
    assert "DROP" not in sql
    assert parameters == ["'; DROP TABLE items"]


def test_conditions_made_by_hand_are_checked_too():
    with pytest.raises(ValueError, match="no condition"):
        Condition("1=1; --", "=", ("x",))
