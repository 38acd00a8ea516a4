"""`label = cat and camera != 2 and time >= 100 and identity in (a, b)` -> a small tree -> parametrised SQL.

Values never enter the SQL text, fields and operators come from fixed tables.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from serve.errors import GalleryError

TEXT_FIELDS = ("label", "identity", "camera", "source")
FIELDS = (*TEXT_FIELDS, "time")
_SQL_OPERATOR = {"=": "IS", "!=": "IS NOT", "<": "<", "<=": "<=", ">": ">", ">=": ">="}  # IS knows NULL, = does not
_TOKEN = re.compile(
    r"""\s*(?: "(?P<double>(?:[^"]|"")*)" | '(?P<single>(?:[^']|'')*)' | (?P<sign>[=!<>]+|[(),])
         | (?P<word>[^\s"'=!<>(),]+) )""",
    re.VERBOSE,
)
_ALLOWED = (
    f"wanted conditions joined by `and`, each FIELD = != < <= > >= VALUE or FIELD in (A, B); fields: {', '.join(FIELDS)}; "
    "only time is ordered; values with blanks or signs in quotes"
)


@dataclass(frozen=True)
class Condition:
    """One comparison. `values` holds one value, or those of `in`; numbers for time, else text."""

    field: str
    operator: str
    values: tuple[str | float, ...]

    def __post_init__(self) -> None:
        if self.field not in FIELDS or self.operator not in (*_SQL_OPERATOR, "in"):  # both become SQL text
            raise ValueError(f"no condition {self.field!r} {self.operator!r}; {_ALLOWED}")


@dataclass(frozen=True)
class Where:
    """Conditions that must all hold; none at all lets everything through.

    An unknown value (NULL) equals nothing, so it passes `!=` and fails every other operator.
    """

    conditions: tuple[Condition, ...] = ()

    def sql(self) -> tuple[str, list[str | float]]:
        """A boolean SQL expression and its parameters."""
        parts, parameters = ["TRUE"], list[str | float]()
        for condition in self.conditions:
            if condition.operator == "in":  # one JSON parameter: SQLite limits how many there may be
                parts.append(f"{condition.field} IN (SELECT value FROM json_each(?))")  # noqa: S608 (the field is one of FIELDS)
                parameters.append(json.dumps(condition.values))
            else:
                parts.append(f"{condition.field} {_SQL_OPERATOR[condition.operator]} ?")
                parameters += condition.values
        return " AND ".join(parts), parameters


def parse_where(text: str) -> Where:
    """Read a filter expression; a blank one lets everything through. Raises: GalleryError saying what is allowed."""
    tokens = _Tokens(text)
    if tokens.at_end():
        return Where()
    conditions = [_condition(tokens)]
    while not tokens.at_end():
        if tokens.take("and or the end").lower() != "and":
            raise tokens.error("and or the end")
        conditions.append(_condition(tokens))
    return Where(tuple(conditions))


def _condition(tokens: _Tokens) -> Condition:
    field = tokens.take("a field")
    if field not in FIELDS:
        raise tokens.error("a field")
    operator = tokens.take("an operator").lower()
    if operator not in (*_SQL_OPERATOR, "in"):
        raise tokens.error("an operator")
    if operator in ("<", "<=", ">", ">=") and field != "time":
        raise tokens.error("= != or in")
    values = _list(tokens, field) if operator == "in" else (_value(tokens, field),)
    return Condition(field, operator, values)


def _list(tokens: _Tokens, field: str) -> tuple[str | float, ...]:
    if tokens.take("(") != "(":
        raise tokens.error("(")
    values = [_value(tokens, field)]
    while (sign := tokens.take(", or )")) == ",":
        values.append(_value(tokens, field))
    if sign != ")":
        raise tokens.error(", or )")
    return tuple(values)


def _value(tokens: _Tokens, field: str) -> str | float:
    text = tokens.take("a number" if field == "time" else "a value", value=True)
    if field != "time":
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise tokens.error("a number (seconds)")
    return number


class _Tokens:
    """Reads an expression from left to right and knows where it is, for the error message."""

    def __init__(self, text: str) -> None:
        self._text, self._end, self._last = text.rstrip(), 0, ""

    def at_end(self) -> bool:
        return self._end == len(self._text)

    def take(self, wanted: str, *, value: bool = False) -> str:
        """The next token; quoted text counts as a value only, signs never do."""
        match = _TOKEN.match(self._text, self._end)
        self._last = match[0].strip() if match else self._text[self._end :].strip()
        if match is None or match["sign" if value else "double"] is not None or (not value and match["single"] is not None):
            raise self.error(wanted)
        self._end = match.end()
        if match["double"] is not None:
            return match["double"].replace('""', '"')
        return match["single"].replace("''", "'") if match["single"] is not None else match["word"] or match["sign"]

    def error(self, wanted: str) -> GalleryError:
        found = f"found {self._last!r}" if self._last else "the expression ends"
        return GalleryError(f"filter {self._text!r}: {found} where {wanted} should stand; {_ALLOWED}")
