"""One collection of Milvus: what the store asks of pymilvus, with its errors as ours.

Reads are strongly consistent: what a write has returned, every client sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError
from serve.milvus.address import Address
from serve.milvus.connection import connect, disconnect, translated
from serve.milvus.rows import Row, schema

CONSISTENCY = "Strong"
MOST_FOUND = 16_384
"""Of a search, and rows of one query. Milvus refuses more."""
BLOCK_ROWS = 1000
"""Rows with vectors in one message, which may have 64 MiB."""
_TIMEOUT_S, _LOAD_TIMEOUT_S = 60, 600
_MARK = "simclr."
_METRIC = "COSINE"
_Value = TypeVar("_Value")


class Collection:
    """Safe from several threads. Every method raises GalleryError."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client, self._closed = connect(address), False

    def exists(self) -> bool:
        """Whether the server has it."""
        with self._translated():
            return bool(self._client.has_collection(self.address.collection, timeout=_TIMEOUT_S))

    def create(self, dim: int, properties: Mapping[str, str]) -> None:
        """Make it, with an index of the server's choice; an exact one in Milvus Lite, which has no need of another."""
        with self._translated():
            index = self._client.prepare_index_params()
            index.add_index("vector", index_type="FLAT" if self.address.file else "AUTOINDEX", metric_type=_METRIC)
            self._client.create_collection(
                self.address.collection,
                schema=schema(dim),
                index_params=index,
                consistency_level=CONSISTENCY,
                properties=_marked(properties),
                timeout=_TIMEOUT_S,
            )

    def load(self) -> None:
        """Have the server hold it in memory, ready to be searched."""
        with self._translated():
            self._client.load_collection(self.address.collection, timeout=_LOAD_TIMEOUT_S)

    def properties(self) -> dict[str, str]:
        """Ours, as they were set last."""
        with self._translated():
            all_of_them = self._client.describe_collection(self.address.collection, timeout=_TIMEOUT_S)["properties"]
        return {key.removeprefix(_MARK): value for key, value in all_of_them.items() if key.startswith(_MARK)}

    def set_properties(self, properties: Mapping[str, str]) -> None:
        """Set some of them; the others stay."""
        with self._translated():
            self._client.alter_collection_properties(self.address.collection, _marked(properties), timeout=_TIMEOUT_S)

    def index_type(self) -> str:
        """The kind of index over the vectors."""
        with self._translated():
            return str(self._client.describe_index(self.address.collection, "vector", timeout=_TIMEOUT_S)["index_type"])

    def version(self) -> str:
        """Of the server."""
        with self._translated():
            return str(self._client.get_server_version(timeout=_TIMEOUT_S))

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows with ids that are not there. Each block of them goes in whole or not at all."""
        for block in blocks(rows):
            with self._translated():
                self._client.insert(self.address.collection, block, timeout=_TIMEOUT_S)

    def upsert(self, rows: Sequence[Row]) -> None:
        """Put rows in the place of those with their ids."""
        for block in blocks(rows):
            with self._translated():
                self._client.upsert(self.address.collection, block, timeout=_TIMEOUT_S)

    def delete(self, ids: Sequence[int]) -> None:
        """Remove the rows with these ids."""
        for block in blocks(ids):
            with self._translated():
                self._client.delete(self.address.collection, ids=block, timeout=_TIMEOUT_S)

    def flush(self) -> None:
        """Have the server write what it holds in memory."""
        with self._translated():
            self._client.flush(self.address.collection, timeout=_TIMEOUT_S)

    def count(self, expression: str) -> int:
        """How many rows pass."""
        (row,) = self.some(expression, ["count(*)"])
        return int(row["count(*)"])

    def some(self, expression: str, fields: Sequence[str], limit: int | None = None) -> list[Row]:
        """Rows that pass, in no order: as many as one answer holds."""
        most = {} if limit is None else {"limit": limit}
        with self._translated():
            found: list[Row] = self._client.query(
                self.address.collection,
                filter=expression,
                output_fields=list(fields),
                consistency_level=CONSISTENCY,
                timeout=_TIMEOUT_S,
                **most,
            )
        return found

    def pages(self, expression: str, fields: Sequence[str], rows: int = MOST_FOUND) -> Iterator[list[Row]]:
        """All rows that pass at this moment, by growing id, so many at a time."""
        with self._translated():
            pages = self._client.query_iterator(
                self.address.collection,
                batch_size=rows,
                filter=expression,
                output_fields=list(fields),
                consistency_level=CONSISTENCY,
                timeout=_TIMEOUT_S,
            )
            try:
                while page := pages.next():
                    yield page
            finally:
                pages.close()

    def search(self, queries_QD: NDArray[np.float32], k: int, expression: str) -> list[list[tuple[float, int]]]:
        """For each query, the score and id of the `k` most similar rows that pass, by falling score."""
        with self._translated():
            found = self._client.search(
                self.address.collection,
                data=list(queries_QD),
                anns_field="vector",
                filter=expression,
                limit=k,
                search_params={"metric_type": _METRIC},
                consistency_level=CONSISTENCY,
                timeout=_TIMEOUT_S,
            )
            return [[(hit["distance"], hit["id"]) for hit in hits] for hits in found]

    def close(self) -> None:
        """Close; safe to call twice."""
        if not self._closed:
            self._closed = True
            disconnect(self.address, self._client)

    def _translated(self) -> AbstractContextManager[None]:
        if self._closed:
            raise GalleryError(f"{self.address.text}: this gallery has been closed; open it again")
        return translated(self.address)


def _marked(properties: Mapping[str, str]) -> dict[str, str]:
    return {f"{_MARK}{key}": value for key, value in properties.items()}


def blocks(values: Sequence[_Value]) -> Iterator[list[_Value]]:
    """As many at a time as one message takes."""
    for start in range(0, len(values), BLOCK_ROWS):
        yield list(values[start : start + BLOCK_ROWS])
