import json
import sqlite3
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import GalleryError
from serve.filters import (
    EVERYTHING,
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_LENGTH,
    TEXT_FIELDS,
    And,
    Condition,
    Not,
    Or,
    Value,
    Where,
    parse_where,
)
from serve.item import Item

ITEMS = [
    Item(1, "x.jpg", "cat", "a", "1", 50.0, {"blur": 0.5, "place": "yard", "night": True, "shot on": "2024-01-31"}),
    Item(2, "y.jpg", "cat", "b", "2", 100.0, {"blur": 2, "place": "7", "night": False, "day": "2024-02-01"}),
    Item(3, "z 1.jpg", "dog", "c", "10", 150.5, {"blur": "2", "place": None, "tags": ["a"], "day": "2024-03-01"}),
    Item(4, "w.jpg", None, None, None, None, {}),
]
SCHEMA = (
    "CREATE TABLE items (id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL UNIQUE, label TEXT, identity TEXT,"
    " camera TEXT, time REAL, extra TEXT NOT NULL) STRICT"
)


def ids_passing(where: Where, items: list[Item]) -> list[int]:
    """What SQLite says."""
    db = sqlite3.connect(":memory:")
    db.execute(SCHEMA)
    rows = [{**vars(item), "extra": json.dumps(item.extra)} for item in items]
    db.executemany("INSERT INTO items VALUES (:id, :source, :label, :identity, :camera, :time, :extra)", rows)
    condition, parameters = where.sql()
    return [row[0] for row in db.execute(f"SELECT id FROM items WHERE {condition} ORDER BY id", parameters)]  # noqa: S608


def passes(where: Where, item: Item) -> bool:
    """The slow, obvious twin."""
    match where:
        case And(parts):
            return all(passes(part, item) for part in parts)
        case Or(parts):
            return any(passes(part, item) for part in parts)
        case Not(part):
            return not passes(part, item)
    name = where.field.removeprefix("extra.")
    value = getattr(item, name) if name == where.field else item.extra.get(name)
    if where.operator in ("is known", "is unknown"):
        return (value is None) == (where.operator == "is unknown")
    if isinstance(value, bool):
        value = "true" if value else "false"
    if where.operator == "!=":
        return not equal(value, where.values[0])
    if where.operator in ("=", "in"):
        return any(equal(value, wanted) for wanted in where.values)
    wanted = where.values[0]
    if value is None or isinstance(value, list | dict) or isinstance(value, str) != isinstance(wanted, str):
        return False
    return {"<": value < wanted, "<=": value <= wanted, ">": value > wanted, ">=": value >= wanted}[where.operator]


def equal(value, wanted) -> bool:
    return isinstance(value, str) == isinstance(wanted, str) and value == wanted


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("", [1, 2, 3, 4]),
        ("label = cat", [1, 2]),
        ("label=cat", [1, 2]),
        ("label != cat", [3, 4]),  # unknown is not known to be a cat
        ("not label = cat", [3, 4]),
        ("not label != cat", [1, 2]),
        ("label is known", [1, 2, 3]),
        ("label IS Unknown", [4]),
        ("not label is known", [4]),
        ("camera != 2 and label = cat", [1]),
        ("camera = 1", [1]),  # text: not 10
        ("time >= 100", [2, 3]),
        ("not time >= 100", [1, 4]),
        ("time > 100 AND time < 1e3", [3]),
        ("time = 100", [2]),
        ("time != 100", [1, 3, 4]),
        ("time <= '100'", [1, 2]),
        ("time in (50, 150.5)", [1, 3]),
        ("time between 50 and 100 and label = cat", [1, 2]),
        ("not time between 50 and 100", [3, 4]),
        ("time > -5", [1, 2, 3]),
        ("identity in (a, c)", [1, 3]),
        ("not identity in (a, c)", [2, 4]),
        ("identity IN ('a')", [1]),
        ('source = "z 1.jpg"', [3]),
        ("label = dog or label = cat and time > 60", [2, 3]),
        ("(label = dog or label = cat) and time > 60", [2, 3]),
        ("label = cat or label = dog and time > 1000", [1, 2]),
        ("(label = cat or label = dog) and time > 1000", []),
        ("not label = cat and time > 60", [3]),
        ("not (label = cat and time > 60)", [1, 3, 4]),
        ("not (label = dog or identity = b)", [1, 4]),
        ("not not label = cat", [1, 2]),
        ("label = cat and camera != 2 and time >= 10 and identity in (a, b)", [1]),
        ("label = 'cat'' or 1=1'", []),
        ("label = ''", []),
        ("label = and or label = cat", [1, 2]),  # where a value must stand, `and` is one
        ("extra.blur = 2", [2]),  # a number is no text
        ("extra.blur = 2.0", [2]),
        ("extra.blur = '2'", [3]),
        ("extra.blur != 2", [1, 3, 4]),
        ("extra.blur > 0.4", [1, 2]),
        ("not extra.blur > 0.4", [3, 4]),
        ("extra.blur < zzz", [3]),
        ("extra.blur in (0.5, 2)", [1, 2]),
        ("extra.blur in ('0.5', '2')", [3]),
        ("extra.blur between 0 and 1", [1]),
        ("extra.day between 2024-02-01 and 2024-02-29", [2]),
        ("extra.place = '7'", [2]),
        ("extra.place is known", [1, 2]),  # a JSON null is unknown
        ("extra.night = true", [1]),
        ("extra.night = 1", []),
        ("extra.night != true", [2, 3, 4]),
        ("extra.tags is known", [3]),
        ("extra.tags = '[\"a\"]'", []),
        ("extra.tags > ''", []),
        ("extra.no-such_key1 is unknown", [1, 2, 3, 4]),
    ],
)
def test_expressions_select_the_right_rows(expression, wanted):
    where = parse_where(expression)
    assert ids_passing(where, ITEMS) == wanted
    assert [item.id for item in ITEMS if passes(where, item)] == wanted


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("colour = red", "found 'colour' where a field"),
        ("Label = cat", "found 'Label' where a field"),
        ("label", "the expression ends where an operator"),
        ("label =", "the expression ends where a value"),
        ("label == cat", "found '==' where an operator"),
        ("label like cat", "found 'like' where an operator"),
        ("label '=' cat", "found \"'='\" where an operator"),
        ("label < cat", "found '<' where = != in or is"),
        ("label between a and b", "found 'between' where = != in or is"),
        ("label = traffic light", "found 'light' where and, or or the end"),
        ("label = cat xor label = dog", "found 'xor' where and, or or the end"),
        ("label = cat)", "found ')' where and, or or the end"),
        ("label = cat and", "the expression ends where a field"),
        ("label = cat or or", "found 'or' where a field"),
        ("not", "the expression ends where a field"),
        ("(label = cat", "the expression ends where and, or or )"),
        ("(label = cat label = dog)", "found 'label' where and, or or )"),
        ("()", "found ')' where a field"),
        ("label = 'cat", 'found "\'cat" where a value'),
        ("label = (", "found '(' where a value"),
        ("label in cat", "found 'cat' where ("),
        ("label in ()", "found ')' where a value"),
        ("label in (a b)", "found 'b' where , or )"),
        ("label in (a", "the expression ends where , or )"),
        ("label is", "the expression ends where known or unknown"),
        ("label is null", "found 'null' where known or unknown"),
        ("time > noon", "found 'noon' where a number"),
        ("time > nan", "found 'nan' where a number"),
        ("time > 1e999", "found '1e999' where a number"),
        ("time > 1_000", "found '1_000' where a number"),
        ("time between 1", "the expression ends where and"),
        ("time between 1 or 2", "found 'or' where and"),
        ("time between 1 and", "the expression ends where a number"),
        ("extra.blur between 1 and sharp", "found 'sharp' where a number, as before,"),
        ("extra.grade in ('2b', 2)", "found '2' where text in quotes, as before,"),
        ("extra.grade in (2, 2b)", "found '2b' where a number, as before,"),
        ("extra. = 1", "found 'extra.' where a field"),
        ("extra = 1", "found 'extra' where a field"),
        ("extra.größe = 1", "found 'extra.größe' where a field"),
        ('extra."a b" = 1', "found 'extra.' where a field"),
        ("extra.a.b = 1", "found 'extra.a.b' where a field"),
        ("'label' = cat", "where a field"),
        ("label = cat; DROP TABLE items", "where and, or or the end"),
    ],
)
def test_a_wrong_expression_says_what_is_allowed_in_one_line(expression, complaint):
    with pytest.raises(GalleryError) as caught:
        parse_where(expression)
    message = str(caught.value)
    assert complaint in message
    assert "fields: label, identity, camera, source, time, extra.NAME" in message
    assert "\n" not in message


def test_a_fault_in_a_long_expression_is_shown_with_what_stands_around_it():
    names = ", ".join(f"n{i}" for i in range(5000))
    with pytest.raises(GalleryError, match=r"n4999\) and colour = red and label.*found 'colour' where a field") as caught:
        parse_where(f"identity in ({names}) and colour = red and label in ({names})")
    assert len(str(caught.value)) < 800
    with pytest.raises(GalleryError, match="where and, or or the end") as caught:
        parse_where("label = cat " + "x" * 90_000)
    assert len(str(caught.value)) < 800


def quoted(text: str, sign: str) -> str:
    return sign + text.replace(sign, 2 * sign) + sign


def written(where: Where, sign: str) -> str:
    """The expression that reads as `where`, with no more parentheses than it takes."""
    match where:
        case Condition(field, "is known" | "is unknown" as operator):
            return f"{field} {operator}"
        case Condition(field, operator, values):
            shown = [quoted(value, sign) if isinstance(value, str) else repr(value) for value in values]
            return f"{field} {operator} " + (f"({', '.join(shown)})" if operator == "in" else shown[0])
        case Not(part):
            return f"not ({written(part, sign)})" if isinstance(part, And | Or) else f"not {written(part, sign)}"
        case And(parts):
            return " and ".join(f"({written(p, sign)})" if isinstance(p, And | Or) else written(p, sign) for p in parts)
        case Or(parts):
            return " or ".join(f"({written(p, sign)})" if isinstance(p, Or) else written(p, sign) for p in parts)


# few values, so that they meet; the odd ones in every place
WORDS = (
    "",
    "a",
    "A",
    "b",
    "ä",
    "\U0001f431",
    "'",
    '"',
    "a'b",
    "5",
    "05",
    "true",
    "null",
    "%",
    '["a"]',
    "' OR 1=1 --",
    " ",
    "\n",
)
NUMBERS = (-1.5, 0, 1, 5, 5.0, 0.1, 1e300, 2**53 + 1, 2**63 - 1025, -(2**62))
texts, numbers = st.sampled_from(WORDS), st.sampled_from(NUMBERS)
names = st.sampled_from(("a", "5", "a-b", "_"))
extras = st.dictionaries(
    names, st.one_of(texts, numbers, st.booleans(), st.none(), st.just(["a"]), st.just([]), st.just({"a": "a"})), max_size=4
)
rows = st.lists(
    st.builds(Item, st.just(0), st.just(""), *[st.none() | texts] * 3, st.none() | numbers.map(float), extras), max_size=8
)


def conditions_on(field: str, values: st.SearchStrategy[Value], operators: tuple[str, ...]) -> st.SearchStrategy[Condition]:
    return st.one_of(
        st.builds(Condition, st.just(field), st.sampled_from(operators), st.tuples(values)),
        st.builds(Condition, st.just(field), st.just("in"), st.lists(values, min_size=1, max_size=4).map(tuple)),
        st.builds(Condition, st.just(field), st.sampled_from(("is known", "is unknown"))),
    )


ALL = ("=", "!=", "<", "<=", ">", ">=")
conditions = st.one_of(
    st.sampled_from(TEXT_FIELDS).flatmap(lambda field: conditions_on(field, texts, ("=", "!="))),
    conditions_on("time", numbers, ALL),
    names.flatmap(lambda name: conditions_on(f"extra.{name}", texts, ALL) | conditions_on(f"extra.{name}", numbers, ALL)),
)
trees = st.recursive(
    conditions,
    lambda part: st.one_of(
        part.map(Not),
        st.lists(part, min_size=2, max_size=3).map(tuple).map(And),
        st.lists(part, min_size=2, max_size=3).map(tuple).map(Or),
    ),
    max_leaves=8,
)


@given(trees, rows)
def test_sql_selects_what_the_slow_twin_selects(where, found):
    items = [Item(**{**vars(item), "id": i, "source": WORDS[i]}) for i, item in enumerate(found)]
    wanted = [item.id for item in items if passes(where, item)]
    assert ids_passing(where, items) == wanted
    assert ids_passing(Not(where), items) == [item.id for item in items if item.id not in wanted]


@given(trees, st.sampled_from("\"'"))
def test_what_is_written_is_read_back(where, sign):
    assert parse_where(written(where, sign)) == where
    assert len({where, parse_where(written(where, sign))}) == 1  # hashable


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\0")), st.sampled_from("\"'"))
def test_any_quoted_text_comes_back_as_it_was(text, sign):
    where = parse_where(f"label = {quoted(text, sign)} and extra.a in ({quoted(text, sign)})")
    assert where == And((Condition("label", "=", (text,)), Condition("extra.a", "in", (text,))))
    items = [Item(i, str(i), label, None, None, None, {"a": text}) for i, label in enumerate((text, text + "x", None))]
    assert ids_passing(where, items) == [0]


TOKENS = (
    "label",
    "extra.a",
    "time",
    "=",
    "in",
    "is",
    "known",
    "between",
    "(",
    ")",
    ",",
    "not",
    "and",
    "or",
    "'",
    '"',
    "5",
    "x",
)


@given(st.text() | st.lists(st.sampled_from(TOKENS)).map(" ".join))
def test_any_text_is_read_or_refused_in_our_words(text):
    with suppress(GalleryError):
        ids_passing(parse_where(text), ITEMS)


def test_whole_numbers_are_exact():
    item = Item(1, "", None, None, None, None, {"frame": 2**62 + 1})
    assert ids_passing(parse_where(f"extra.frame = {2**62 + 1}"), [item]) == [1]
    assert ids_passing(parse_where(f"extra.frame in ({2**62 + 1})"), [item]) == [1]
    assert ids_passing(parse_where(f"extra.frame = {2**62}"), [item]) == []
    assert ids_passing(parse_where(f"extra.frame < {'9' * 300}"), [item]) == [1]
    assert ids_passing(parse_where(f"extra.frame > {'0' * 5000}7"), [item]) == [1]


@pytest.mark.parametrize("text", ["'; DROP TABLE items; --", "1) OR (1=1", "' OR '1'='1", "?", ":label", "\u202e\ufeff", "a\\"])
def test_values_never_enter_the_sql_text(text):
    value = quoted(text, '"')
    expression = f"label = {value} or extra.a in ({value}) or not source != {value}"
    sql, parameters = parse_where(expression).sql()
    assert sql == parse_where("label = 'harmless' or extra.a in (b) or not source != c").sql()[0]
    assert parameters == [text, json.dumps([text]), text]
    assert ids_passing(parse_where(expression), ITEMS) == []


@pytest.mark.parametrize(
    "field", ["1=1; --", "extra.a')", 'extra.a"', "extra.", "extra.a b", "extra." + "a" * 65, "label\n", "id"]
)
def test_fields_are_checked_in_conditions_made_by_hand_too(field):
    with pytest.raises(ValueError, match="no condition"):
        Condition(field, "=", ("x",))


def test_conditions_made_by_hand_need_an_operator_and_fitting_values():
    with pytest.raises(ValueError, match="no condition"):
        Condition("label", "= 1 OR", ("x",))
    with pytest.raises(ValueError, match="wanted one, `in`"):
        Condition("label", "=", ("x", "y"))
    with pytest.raises(ValueError, match="`is` none"):
        Condition("label", "is known", ("x",))
    with pytest.raises(ValueError, match="some of a kind"):
        Condition("extra.a", "in", ("x", 1))


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x\udfff"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(GalleryError, match="holds NUL or half a character") as caught:
        parse_where(f"label = '{text}'")
    str(caught.value).encode()
    with pytest.raises(GalleryError):
        parse_where(text)


@pytest.mark.parametrize(
    ("hostile", "complaint"),
    [
        ("(" * 10_000 + "label = cat" + ")" * 10_000, "nest deeper than 10"),
        ("(" * 10_000, "nest deeper than 10"),
        ("not " * 10_000 + "label = cat", "nest deeper than 10"),
        (" or ".join(["time=1"] * 5_000), "more than 100 conditions"),
        ("label = " + "x" * 1_000_000, "1,000,008 characters, wanted 100,000 at most"),
        ('"' * 99_999, "where a field"),
        ("label = " + '"' * 99_991, "where a value|where and, or"),
        ("'\"" * 50_000, "where a field"),
        (" " * 99_999 + "'", "where a field"),
        ("=" * 100_000, "where a field"),
    ],
)
def test_hostile_expressions_are_refused_in_our_words(hostile, complaint):
    with pytest.raises(GalleryError, match=complaint) as caught:
        parse_where(hostile)
    assert len(str(caught.value)) < 800


def test_the_largest_expressions_allowed_are_no_trouble_for_sqlite():
    deep = "label = a or time > 1 and (" * MAX_DEPTH + "extra.a in (1)" + ")" * MAX_DEPTH
    negated = "label = a or time > 1 and not (" * (MAX_DEPTH // 2) + "extra.a in (1)" + ")" * (MAX_DEPTH // 2)
    wide = " or ".join(["extra.a between 1 and 2"] * MAX_CONDITIONS)
    full = "identity in (" + "a," * ((MAX_LENGTH - 16) // 2) + "a)"
    assert ids_passing(parse_where(deep), ITEMS) == []
    assert ids_passing(parse_where(negated), ITEMS) == [item.id for item in ITEMS if passes(parse_where(negated), item)]
    assert ids_passing(parse_where(wide), ITEMS) == []
    assert ids_passing(parse_where(full), ITEMS) == [1]


def test_only_a_filter_that_leaves_something_out_is_true():
    assert not EVERYTHING
    assert not parse_where(" ")
    assert not And((EVERYTHING, And((EVERYTHING,))))
    assert And((EVERYTHING, Condition("label", "is known")))
    assert parse_where("not label = a")
    assert ids_passing(Or(()), ITEMS) == []
