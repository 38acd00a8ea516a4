"""Options that several commands check alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve.errors import SimclrError

if TYPE_CHECKING:
    from serve.gallery import Gallery


def check_ports(**ports: int) -> None:
    """Raises: SimclrError."""
    for name, port in ports.items():
        if not 0 <= port <= 65535:
            raise SimclrError(f"--{name.replace('_', '-')} is {port}, wanted 0 to 65535")


def check_choice(ids: Sequence[int], where: str | None) -> None:
    """Either of them must say which items. Raises: SimclrError."""
    if bool(ids) == (where is not None):
        raise SimclrError("wanted either ids or --where EXPR to say which items")
    if where is not None and not where.strip():
        raise SimclrError("--where is empty, which would be all items; wanted a condition")


def chosen_ids(gallery: Gallery, ids: Sequence[int], where: str | None) -> list[int]:
    """Those named, or those that pass the filter."""
    return list(ids) if where is None else [int(item_id) for item_id in gallery.ids(where)]


def json_object(option: str, text: str) -> dict[str, Any]:
    """An option's value. Raises: SimclrError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SimclrError(f'{option} is {text!r}, no JSON ({error}); wanted an object such as {{"seen": true}}') from error
    if not isinstance(value, dict):
        raise SimclrError(f'{option} is {text!r}, wanted a JSON object such as {{"seen": true}}')
    return value
