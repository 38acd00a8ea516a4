"""An item as a row of a Milvus collection, and the schema of that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError
from serve.item import Item, columns_of
from serve.milvus.expression import facts_of
from serve.sources import printable
from serve.storage.catalog_schema import COLUMNS

if TYPE_CHECKING:
    from pymilvus import CollectionSchema

Row: TypeAlias = dict[str, Any]
FIELDS = COLUMNS["items"]
"""What an item is read from; `facts` and `vector` stand beside it."""
MAX_BYTES = 65_535
"""Of a text in Milvus."""


def schema(dim: int) -> CollectionSchema:
    """Fields that may be unknown are nullable; `source` is too, lest Milvus refuse to be asked whether it is."""
    from pymilvus import DataType, MilvusClient

    fields = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    fields.add_field("id", DataType.INT64, is_primary=True)
    for name in ("source", "label", "identity", "camera"):
        fields.add_field(name, DataType.VARCHAR, max_length=MAX_BYTES, nullable=True)
    fields.add_field("time", DataType.DOUBLE, nullable=True)
    fields.add_field("extra", DataType.VARCHAR, max_length=MAX_BYTES)
    fields.add_field("facts", DataType.JSON)
    fields.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    return fields


def row_of(item: Item, vector_D: NDArray[np.float32]) -> Row:
    """Raises: GalleryError if the item cannot be stored."""
    row = dict(zip(FIELDS, columns_of(item), strict=True))
    for name, value in row.items():
        if isinstance(value, str) and (size := len(value.encode())) > MAX_BYTES:
            raise GalleryError(
                f"{printable(item.source)}: {name} has {size:,} bytes, Milvus takes {MAX_BYTES:,}; nothing was changed"
            )
    return {**row, "facts": facts_of(item.extra), "vector": vector_D}


def item_of(row: Row) -> Item:
    """The item that `row_of` made this row of."""
    return Item(**{**{name: row[name] for name in FIELDS}, "extra": json.loads(row["extra"])})
