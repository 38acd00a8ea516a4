"""Filters: `label = cat and not (camera in (1, 2) or extra.blur > 0.5)` -> a small tree -> parametrised SQL.

A row passes or it does not, and `not X` passes exactly those that X does not. A value that is unknown (NULL; in `extra` also a
JSON null or a missing key) equals nothing: it passes `!=` and `is unknown` and fails every other comparison.

label, identity, camera and source are text, time is a number. A value in `extra` is what its JSON says. Numbers compare with
unquoted numbers (5 = 5.0), text with anything else, by code points ("10" < "9"); a number never equals a text. true and false
count as those two words. Lists and objects are known, but compare with nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from serve.errors import GalleryError

MAX_LENGTH, MAX_CONDITIONS, MAX_DEPTH = 100_000, 100, 10
"""Of an expression: characters, conditions, `not` and ( within each other. SQLite allows trees of 1000 and a stack of 100."""
TEXT_FIELDS = ("label", "identity", "camera", "source")
FIELDS = (*TEXT_FIELDS, "time", "extra.NAME")
_FIELD = re.compile(rf"{'|'.join(TEXT_FIELDS)}|time|extra\.[A-Za-z0-9_-]{{1,64}}")  # becomes SQL text
_ORDERS = ("<", "<=", ">", ">=")
_SQL = {
    "=": "IS ?",  # IS knows NULL, = does not
    "!=": "IS NOT ?",
    **{order: f"{order} ?" for order in _ORDERS},
    "in": "IN (SELECT value FROM json_each(?))",  # a list as one parameter: SQLite limits how many there may be
    "is known": "IS NOT NULL",
    "is unknown": "IS NULL",
}
_TOKEN = re.compile(
    r"""\s*(?: (?P<quote>["'])(?P<quoted>(?:(?!(?P=quote)).|(?P=quote){2})*)(?P=quote) | (?P<sign>[=!<>]+|[(),])
         | (?P<word>[^\s"'=!<>(),]+) | (?P<unclosed>["'].*) )""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
_ALLOWED = (
    "wanted conditions joined by `and`, `or`, `not` and parentheses, each FIELD = != < <= > >= VALUE, FIELD in (A, B), "
    f"FIELD between A and B or FIELD is known (or unknown); fields: {', '.join(FIELDS)} (letters, digits, _ and -); "
    "only time and extra are ordered; values with blanks or signs in quotes"
)
_SHOWN = 80  # characters of a long expression, on both sides of what is wrong

Value: TypeAlias = str | float
Sql: TypeAlias = tuple[str, list[Value]]
"""A boolean expression in parentheses, which may be NULL instead of false, and its parameters."""


@dataclass(frozen=True)
class Condition:
    """One field and what it is compared with: one value, those of `in`, or none. All are text, or all are numbers."""

    field: str
    operator: str
    values: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if not _FIELD.fullmatch(self.field) or self.operator not in _SQL:
            raise ValueError(f"no condition {self.field!r} {self.operator!r}; {_ALLOWED}")
        count_fits = self.operator == "in" or len(self.values) == _SQL[self.operator].count("?")
        if not count_fits or len({isinstance(value, str) for value in self.values}) > 1:
            raise ValueError(f"{self.field} {self.operator}: got {self.values!r}, wanted one, `in` some of a kind, `is` none")
        for value in self.values:
            if isinstance(value, str) and _NO_TEXT.search(value):
                raise GalleryError(f"filter value {_clipped(value)!r}: holds NUL or half a character; leave that out")

    def sql(self) -> Sql:
        """Parametrised SQL over a row of the catalog's items."""
        values = [json.dumps(self.values)] if self.operator == "in" else self.values
        return f"({self._compared()} {_SQL[self.operator]})", [*values]

    def _compared(self) -> str:
        """The column; of `extra`, what is of the kind of the values, else NULL."""
        if not self.field.startswith("extra."):
            return self.field
        place = f"""(extra, '$."{self.field.removeprefix("extra.")}"')"""
        if not self.values:
            return f"json_extract{place}"
        if isinstance(self.values[0], str):  # json_extract makes 1 and 0 of true and false, and text of lists
            words = "WHEN 'true' THEN 'true' WHEN 'false' THEN 'false'"
            return f"CASE json_type{place} WHEN 'text' THEN json_extract{place} {words} END"
        return f"CASE WHEN json_type{place} IN ('integer', 'real') THEN json_extract{place} END"


@dataclass(frozen=True)
class And:
    """Passes what passes all of its parts; without parts, everything. `bool()` is False if nothing is left out."""

    parts: tuple[Where, ...] = ()

    def __bool__(self) -> bool:
        return any(self.parts)

    def sql(self) -> Sql:
        """As of a Condition."""
        return _joined(self.parts, " AND ", "TRUE")


@dataclass(frozen=True)
class Or:
    """Passes what passes one of its parts."""

    parts: tuple[Where, ...]

    def sql(self) -> Sql:
        """As of a Condition."""
        return _joined(self.parts, " OR ", "FALSE")


@dataclass(frozen=True)
class Not:
    """Passes what its part does not."""

    part: Where

    def sql(self) -> Sql:
        """As of a Condition."""
        text, parameters = self.part.sql()
        return f"({text} IS NOT TRUE)", parameters  # NOT would leave NULL as it is; AND, OR and WHERE take it as false


Where: TypeAlias = Condition | And | Or | Not
EVERYTHING = And()


def _joined(parts: Sequence[Where], word: str, none: str) -> Sql:
    compiled = [part.sql() for part in parts]
    return f"({word.join(text for text, _ in compiled) or none})", [value for _, values in compiled for value in values]


def parse_where(text: str) -> Where:
    """Read a filter expression; a blank one lets everything through. Raises: GalleryError saying what is allowed."""
    if len(text) > MAX_LENGTH:
        raise GalleryError(f"filter: has {len(text):,} characters, wanted {MAX_LENGTH:,} at most; shorten it")
    return _Parser(text).whole()


def as_where(where: str | Where | None) -> Where:
    """A filter as callers give it: an expression, a tree, or none. Raises: GalleryError."""
    return where if isinstance(where, Where) else parse_where(where or "")


class _Parser:
    """Recursive descent: `not` binds closest, then `and`, then `or`."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip()
        self._tokens = list(_TOKEN.finditer(self._text))
        self._place = self._conditions = 0

    def whole(self) -> Where:
        where = self._alternatives(0) if self._tokens else EVERYTHING
        if self._place < len(self._tokens):
            raise self._error("and, or or the end")
        return where

    def _alternatives(self, depth: int) -> Where:
        parts = [self._together(depth)]
        while self._took("or"):
            parts.append(self._together(depth))
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _together(self, depth: int) -> Where:
        parts = [self._part(depth)]
        while self._took("and"):
            parts.append(self._part(depth))
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _part(self, depth: int) -> Where:
        if depth > MAX_DEPTH:
            raise GalleryError(f"filter: `not` and ( nest deeper than {MAX_DEPTH}; write it flatter")
        if self._took("not"):
            return Not(self._part(depth + 1))
        if self._took("("):
            where = self._alternatives(depth + 1)
            self._expect(")", "and, or or )")
            return where
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise GalleryError(f"filter: has more than {MAX_CONDITIONS} conditions; list the values of a field with `in`")
        return self._condition()

    def _condition(self) -> Where:
        field = self._next()
        if not _FIELD.fullmatch(field):
            raise self._error("a field")
        self._place += 1
        if self._next().lower() in (*_ORDERS, "between") and field in TEXT_FIELDS:
            raise self._error("= != in or is")
        for operator in ("=", "!=", *_ORDERS):
            if self._took(operator):
                return Condition(field, operator, (self._value(field),))
        if self._took("in"):
            return Condition(field, "in", self._list(field))
        if self._took("between"):
            return self._between(field)
        self._expect("is", "an operator")
        if self._took("known"):
            return Condition(field, "is known")
        self._expect("unknown", "known or unknown")
        return Condition(field, "is unknown")

    def _between(self, field: str) -> And:
        low = self._value(field)
        self._expect("and", "and")
        return And((Condition(field, ">=", (low,)), Condition(field, "<=", (self._value(field, low),))))

    def _list(self, field: str) -> tuple[Value, ...]:
        self._expect("(", "(")
        values = [self._value(field)]
        while self._took(","):
            values.append(self._value(field, values[0]))
        self._expect(")", ", or )")
        return tuple(values)

    def _value(self, field: str, like: Value | None = None) -> Value:
        """The next value, of the kind of `like`."""
        token = self._token()
        if token is None or token["sign"] or token["unclosed"]:
            raise self._error("a number" if field == "time" else "a value")
        text = token["word"] or token["quoted"].replace(2 * token["quote"], token["quote"])
        number = _number(text) if field == "time" or (token["word"] and field not in TEXT_FIELDS) else None
        if field == "time" and number is None:
            raise self._error("a number (seconds)")
        value = text if number is None else number
        if like is not None and isinstance(value, str) != isinstance(like, str):
            raise self._error("text in quotes, as before," if isinstance(like, str) else "a number, as before,")
        self._place += 1
        return value

    def _token(self) -> re.Match[str] | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _next(self) -> str:
        """The word or sign that comes; "" for quoted text and at the end."""
        token = self._token()
        return (token["word"] or token["sign"] or "") if token else ""

    def _took(self, wanted: str) -> bool:
        took = self._next().lower() == wanted
        self._place += took
        return took

    def _expect(self, wanted: str, named: str) -> None:
        if not self._took(wanted):
            raise self._error(named)

    def _error(self, wanted: str) -> GalleryError:
        token = self._token()
        found = f"found {_clipped(token[0].strip())!r}" if token else "the expression ends"
        at = token.start() if token else len(self._text)
        shown = self._text if len(self._text) <= 2 * _SHOWN else f"...{self._text[max(0, at - _SHOWN) : at + _SHOWN]}..."
        return GalleryError(f"filter {shown!r}: {found} where {wanted} should stand; {_ALLOWED}")


def _number(text: str) -> float | None:
    """The number that `text` is, whole ones exactly as long as SQLite's are; None if it is none."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(number := float(text)):
        return None
    return int(text) if _INTEGER.fullmatch(text) and abs(number) < 2**63 else number


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
