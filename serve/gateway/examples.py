"""What OpenAPI shows as examples."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, JsonValue

ENCODER_ID = "9f86d081884c7d65"
VECTOR: list[JsonValue] = [0.6, 0.0, -0.8]
ITEM: dict[str, Any] = {
    "id": 7,
    "source": "cats/7.jpg",
    "label": "cat",
    "identity": "felix",
    "camera": "2",
    "time": 12.5,
    "extra": {"seen": True},
}


def example(answer: dict[str, Any]) -> ConfigDict:
    """The configuration of a model with an example of it."""
    return {"json_schema_extra": {"examples": [answer]}}


def item_example(status: int) -> dict[int | str, dict[str, Any]]:
    """The answer of a route that tells of an item."""
    return {status: {"content": {"application/json": {"example": ITEM}}}}
