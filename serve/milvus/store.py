"""The store of a gallery in Milvus.

Milvus has neither transactions nor unique values. So a method that changes many items does it in blocks of 1,000, each whole,
and one that fails leaves the former ones changed; and one process may write at a time: two that add at once may give out the
same ids, or take in one source twice. Any number may read meanwhile, and see at once what a write has returned. An id is never
used again, also after a crash: how far the ids go is noted before items are removed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import Unpack

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.errors import GalleryError
from serve.filters import EVERYTHING, TEXT_FIELDS, Where
from serve.item import Item, Known, natural_key, new_item, relabelled, require_known, require_unused
from serve.milvus.address import Address
from serve.milvus.collection import BLOCK_ROWS, MOST_FOUND, Collection, blocks
from serve.milvus.expression import among, expression
from serve.milvus.rows import FIELDS, Row, item_of, row_of
from serve.samples import Sample
from serve.sources import name_fault
from serve.storage.catalog_schema import ENCODER_SPEC, Facts
from serve.storage.gallery_folder import bytes_on_disk
from serve.store import Description, Found, needed

_BLOCK_QUERIES = 256
_NEXT_ID = "next_id"


def open_milvus(text: str, facts: Facts | None, *, create: bool) -> MilvusStore:
    """The gallery at an address; with `create`, it is made if there is none. Raises: GalleryError."""
    address = Address.parse(text)
    if address.file and not (create or address.file.exists()):
        raise _no_gallery(text)
    if address.file and create:
        address.file.parent.mkdir(parents=True, exist_ok=True)
    collection = Collection(address)
    try:
        if not collection.exists():
            if not create:
                raise _no_gallery(text)
            made_of = needed(text, facts)
            collection.create(made_of.embedding_dim, {**{k: str(v) for k, v in vars(made_of).items()}, _NEXT_ID: "1"})
        return MilvusStore(collection)
    except BaseException:
        collection.close()
        raise


def _no_gallery(text: str) -> GalleryError:
    return GalleryError(f"{text}: no such gallery; make one: simclr gallery add {text} --images SRC --encoder ENC")


class MilvusStore:
    """Safe from several threads. See above for several processes."""

    def __init__(self, collection: Collection) -> None:
        self.address = collection.address.text
        self._collection, self._writing = collection, threading.Lock()
        properties = collection.properties()
        if "manifest" not in properties:
            raise GalleryError(f"{self.address}: a collection, but not a gallery's; give another name")
        self.facts = Facts(
            encoder_id=properties["encoder_id"],
            encoder_name=properties["encoder_name"],
            embedding_dim=int(properties["embedding_dim"]),
            manifest=properties["manifest"],
        )
        self._next_id = int(properties[_NEXT_ID])
        collection.load()

    @property
    def encoder_spec(self) -> str | None:
        """Where the encoder was last opened; None if nobody said."""
        return self._collection.properties().get(ENCODER_SPEC)

    @encoder_spec.setter
    def encoder_spec(self, spec: str) -> None:
        self._collection.set_properties({ENCODER_SPEC: spec})

    def add(
        self,
        samples: Sequence[Sample],
        vectors_ND: NDArray[np.float32],
        extra: Mapping[str, Mapping[str, JsonValue]],
        given_ids: Mapping[str, int] | None = None,
    ) -> list[int]:
        """As of a Store."""
        with self._writing:
            known = set(self.known_sources(sample.source for sample in samples))
            fresh: dict[str, tuple[Sample, NDArray[np.float32]]] = {}
            for sample, vector in zip(samples, vectors_ND, strict=True):
                if sample.source not in known:
                    fresh.setdefault(sample.source, (sample, vector))
            if given_ids is None:
                first = self.next_id
                ids = list(range(first, first + len(fresh)))
            else:
                ids = self._unused([given_ids[source] for source in fresh])
            rows = [
                row_of(new_item(i, sample, extra.get(source, {})), vector)
                for i, (source, (sample, vector)) in zip(ids, fresh.items(), strict=True)
            ]
            self._collection.insert(rows)
            self._next_id = max([self._next_id, *(i + 1 for i in ids)])
        return ids

    @property
    def next_id(self) -> int:
        """As of a Store."""
        free = max(self._next_id, self._noted_id())
        while found := self._collection.some(f"id >= {free}", ["id"], MOST_FOUND):  # of others, or of a session that broke off
            free = 1 + max(row["id"] for row in found)
        return free

    def _unused(self, ids: list[int]) -> list[int]:
        """These ids. Raises: GalleryError unless they can be given."""
        noted = self._noted_id()
        require_unused(ids, [*(i for i in ids if 1 <= i < noted), *self.lookup(ids)], self.address)
        return ids

    def _noted_id(self) -> int:
        return int(self._collection.properties()[_NEXT_ID])

    def update(self, item_id: int, vector_D: NDArray[np.float32], source: str | None = None) -> None:
        """As of a Store."""
        if source is not None and (fault := name_fault(source)) is not None:
            raise GalleryError(fault)
        with self._writing:
            item = self._required([item_id], "nothing was changed")[item_id]
            if source is not None:
                for row in self._collection.some(among("source", [source]), ["id"]):
                    if row["id"] != item_id:
                        raise GalleryError(f"{self.address}: {source} is item {row['id']}; nothing was changed")
                item = replace(item, source=source)
            self._collection.upsert([row_of(item, vector_D)])

    def relabel(self, ids: Sequence[int], **known: Unpack[Known]) -> None:
        """As of a Store."""
        with self._writing:
            self._required(ids, "nothing was changed")
            for block in blocks(ids):
                rows = self._collection.some(among("id", block), [*FIELDS, "vector"])
                self._collection.upsert([row_of(relabelled(item_of(row), known), row["vector"]) for row in rows])

    def remove(self, ids: Sequence[int]) -> None:
        """As of a Store."""
        with self._writing:
            items = self._required(ids, "nothing was removed")
            self._next_id = max([self._next_id, *(item_id + 1 for item_id in items)])
            self._note_next_id()
            self._collection.delete(list(items))

    def _note_next_id(self) -> None:
        if self._next_id > self._noted_id():
            self._collection.set_properties({_NEXT_ID: str(self._next_id)})

    def _required(self, ids: Sequence[int], otherwise: str) -> dict[int, Item]:
        items = self.lookup(ids)
        require_known(ids, items, self.address, otherwise)
        return items

    def __len__(self) -> int:
        return self.count(EVERYTHING)

    def count(self, where: Where) -> int:
        """How many items pass."""
        return self._collection.count(expression(where) if where else "")

    def items(self, where: Where, limit: int | None = None, offset: int = 0) -> list[Item]:
        """Items in the order of their ids."""
        last = None if limit is None else offset + limit
        rows = BLOCK_ROWS if last is None else max(1, min(last, BLOCK_ROWS))
        return [item_of(row) for row in islice(self._every(expression(where), FIELDS, rows), offset, last)]

    def ids(self, where: Where) -> NDArray[np.int64]:
        """Ids of the items that pass, growing."""
        return np.fromiter((row["id"] for row in self._every(expression(where), ["id"])), np.int64)

    def _every(self, passing: str, fields: Sequence[str], page_rows: int = MOST_FOUND) -> Iterator[Row]:
        return chain.from_iterable(self._collection.pages(passing, fields, page_rows))

    def lookup(self, ids: Sequence[int], where: Where = EVERYTHING) -> dict[int, Item]:
        """Those of these items that exist and pass."""
        passing = f" and {expression(where)}" if where else ""
        found = (self._collection.some(among("id", block) + passing, FIELDS) for block in blocks(ids))
        return {row["id"]: item_of(row) for rows in found for row in rows}

    def rows(self, where: Where) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Items that pass and their vectors (n, D), in blocks, by growing id; all of one state."""
        for page in self._collection.pages(expression(where), [*FIELDS, "vector"], BLOCK_ROWS):
            yield [item_of(row) for row in page], np.array([row["vector"] for row in page], np.float32)

    def vector(self, item_id: int) -> NDArray[np.float32] | None:
        """The vector (D,) of one item; None if there is no such item."""
        found = self._collection.some(among("id", [item_id]), ["vector"])
        return np.asarray(found[0]["vector"], np.float32) if found else None

    def known_sources(self, sources: Iterable[str]) -> list[str]:
        """Those of these sources that are there."""
        found = (self._collection.some(among("source", block), ["source"]) for block in blocks(list(sources)))
        return [row["source"] for rows in found for row in rows]

    def distinct(self, field: str) -> list[str]:
        """The values of a text field, sorted naturally. Reads that field of every item."""
        if field not in TEXT_FIELDS:
            raise GalleryError(f"distinct: got field {field!r}, wanted one of {', '.join(TEXT_FIELDS)}")
        rows = self._every(f"{field} is not null", ["id", field])
        return sorted({row[field] for row in rows}, key=natural_key)

    def nearest(self, queries_QD: NDArray[np.float32], k: int, where: Where, excluded: NDArray[np.int64]) -> Found:
        """As of a folder, except that Milvus may have an approximate index, and finds 16,383 at most."""
        if k > MOST_FOUND:
            raise GalleryError(f"{self.address}: Milvus finds {MOST_FOUND - 1:,} items at most; ask for fewer, or filter")
        left = f" and (id not in {excluded.tolist()})" if len(excluded) else ""
        scores = np.full((len(queries_QD), k), -np.inf, np.float32)
        ids = np.full((len(queries_QD), k), -1, np.int64)
        for start in range(0, len(queries_QD), _BLOCK_QUERIES):
            found = self._collection.search(queries_QD[start : start + _BLOCK_QUERIES], k, expression(where) + left)
            for row, hits in enumerate(found, start):
                scores[row, : len(hits)] = [score for score, _ in hits]
                ids[row, : len(hits)] = [item_id for _, item_id in hits]
        return scores, ids

    def describe(self) -> Description:
        """What it is."""
        file = self._collection.address.file
        index = f"{self._collection.index_type()} in {self._collection.version()}"
        return Description(index, "", bytes_on_disk(file) if file else None)

    def save(self) -> None:
        """Have the server write what it holds in memory."""
        self._collection.flush()

    def close(self) -> None:
        """Close; safe to call twice."""
        with suppress(GalleryError):  # this note only saves the next session a look
            self._note_next_id()
        self._collection.close()
