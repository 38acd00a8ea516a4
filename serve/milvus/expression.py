"""Filters as Milvus expressions, with the meaning of serve/filters.py.

Milvus compares NULL in three-valued logic, and its releases differ in what `not` makes of that, of missing JSON keys and of
values of another kind (issues 46820, 48441 and 50698 of milvus-io/milvus). So no expression here says `not` of a comparison: it
is carried down to the conditions, each of which says what becomes of the unknown. `and` and `or` of those come out the same
whether the unknown counts as unknown or as false.

An item's `extra` is kept twice: as its JSON, and sorted by kind as `facts`, so that Milvus never compares two kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from serve.filters import TEXT_FIELDS, And, Condition, Not, Or, Value, Where

EVERYTHING, NOTHING = "(id >= 0)", "(id < 0)"
"""Constants: ids are positive, and not every release takes `true`."""
_OPPOSITE = {"==": "!=", "<": ">=", "<=": ">", ">": "<=", ">=": "<", "in": "not in"}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


def expression(where: Where) -> str:
    """What passes exactly the rows that `where` lets through."""
    return _of(where, negated=False)


def facts_of(extra: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What filters see of `extra`: `known:NAME`, and `number:NAME` or `text:NAME` if it compares as one of those."""
    facts: dict[str, JsonValue] = {}
    for name, value in extra.items():
        if value is None:
            continue
        facts[f"known:{name}"] = True
        if isinstance(value, bool):
            facts[f"text:{name}"] = "true" if value else "false"
        elif isinstance(value, str):
            facts[f"text:{name}"] = value
        elif isinstance(value, int | float):
            facts[f"number:{name}"] = value if -(2**63) <= value < 2**63 else float(value)
    return facts


def among(field: str, values: Iterable[Value]) -> str:
    """`field` is one of these, which are all text or all whole numbers."""
    return f"({field} in [{', '.join(map(_literal, values))}])"


def _literal(value: Value) -> str:
    return f'"{value.translate(_ESCAPES)}"' if isinstance(value, str) else repr(value)


def _of(where: Where, *, negated: bool) -> str:
    if isinstance(where, Condition):
        return _condition(where, negated=negated)
    if isinstance(where, Not):
        return _of(where.part, negated=not negated)
    all_of = isinstance(where, And) != negated
    parts = [_of(part, negated=negated) for part in where.parts]
    return f"({(' and ' if all_of else ' or ').join(parts)})" if parts else EVERYTHING if all_of else NOTHING


def _condition(condition: Condition, *, negated: bool) -> str:
    field, operator, values = condition.field, condition.operator, condition.values
    place, known, unknown = _place(condition)
    if operator.startswith("is "):
        return known if (operator == "is known") != negated else unknown
    if operator == "!=":
        return _of(Condition(field, "=", values), negated=not negated)
    if operator == "in" and (field not in TEXT_FIELDS or not values):  # Milvus' `in` takes one kind of number, Lite's no JSON
        return _of(Or(tuple(Condition(field, "=", (value,)) for value in values)), negated=negated)
    if field == "time" and isinstance(values[0], int):
        return _of(_in_doubles(operator, values[0]), negated=negated)
    compared = f"[{', '.join(map(_literal, values))}]" if operator == "in" else _literal(values[0])
    operator = "==" if operator == "=" else operator
    return f"({place} {_OPPOSITE[operator]} {compared} or {unknown})" if negated else f"({place} {operator} {compared})"


def _place(condition: Condition) -> tuple[str, str, str]:
    """Where the value stands, and the conditions that it is known (and of the kind asked for), and that it is not."""
    field, values = condition.field, condition.values
    if not field.startswith("extra."):
        return field, f"({field} is not null)", f"({field} is null)"
    kind = "known" if not values else "text" if isinstance(values[0], str) else "number"
    place = f'facts["{kind}:{field.removeprefix("extra.")}"]'
    return place, f"(exists {place})", f"(not exists {place})"


def _in_doubles(operator: str, value: int) -> Where:
    """The same said of a double; large whole numbers stand between two of these."""
    nearest = float(value)
    if nearest != value and operator == "=":
        return Or(())
    if nearest != value:
        operator = operator[0] + "=" * ((nearest > value) == operator.startswith(">"))
    return Condition("time", operator, (nearest,))
