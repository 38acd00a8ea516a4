"""Vectors of the encoder to come, in a table of the catalog beside those that are searched, and their taking over.

The items stay where they are: ids, what is known, and what is changed meanwhile need no copying. A vector is good as long
as its transaction is newer than the one that set the item's present vector. What a killed process has stored, the next finds.
"""
# ruff: noqa: S608  (what is pasted into the SQL comes from the schema's constants and an encoder's id, a digest)

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.catalog import Catalog
from serve.encoder import Encoder
from serve.storage.catalog_schema import (
    AMONG,
    ENCODER_SPEC,
    INSERT,
    VECTORS_INDEX,
    sealed,
    vector_row,
    vectors_table,
    write_facts,
)
from serve.store import facts_of

_PREFIX = "next_"
Version: TypeAlias = tuple[int, int]
"""An item's id, and the transaction that set its present vector."""


@dataclass(frozen=True)
class Pending:
    """An item that has no vector of the new encoder yet, or one of a former picture."""

    source: str
    version: Version
    added: int
    """The transaction that made the item."""


class NextVectors:
    """Safe beside other processes: each method is one transaction."""

    def __init__(self, catalog: Catalog, encoder: Encoder) -> None:
        """Make the table unless it is there. Raises: GalleryError."""
        self._catalog, self._encoder = catalog, encoder
        self._table = f"{_PREFIX}{encoder.encoder_id}"
        with catalog.changing() as (db, _):
            if self._table not in _tables(db):
                db.execute(vectors_table(self._table))
                db.execute(  # what is removed is removed from here as well
                    f"CREATE TRIGGER {self._table}_removed AFTER DELETE ON items "
                    f"BEGIN DELETE FROM {self._table} WHERE id = old.id; END"
                )

    def __len__(self) -> int:
        """How many vectors there are."""
        with self._catalog.reading() as db:
            return int(db.execute(f"SELECT count(*) FROM {self._table}").fetchone()[0])

    def pending(self, after: int, limit: int) -> list[Pending]:
        """The first so many items beyond id `after` that have yet to be embedded, by growing id."""
        query = f"SELECT source, items.id, vectors.seq, added {self._pending} AND items.id > ? ORDER BY items.id LIMIT ?"
        with self._catalog.reading() as db:
            return [Pending(source, (i, seq), added) for source, i, seq, added in db.execute(query, [after, limit])]

    @property
    def _pending(self) -> str:
        return (
            f"FROM items JOIN vectors USING (id) LEFT JOIN (SELECT id, seq FROM {self._table}) AS made USING (id) "
            "WHERE (made.seq IS NULL OR made.seq < vectors.seq)"
        )

    def put(self, items: Sequence[Pending], vectors_ND: NDArray[np.float32]) -> None:
        """Store vectors, except of items that were removed or changed since they were `pending`."""
        with self._catalog.changing() as (db, seq):
            ids = json.dumps([item.version[0] for item in items])
            present = set(db.execute(f"SELECT id, seq FROM vectors WHERE id {AMONG}", [ids]))
            rows = [
                vector_row(item.version[0], item.added, seq, vector)
                for item, vector in zip(items, vectors_ND, strict=True)
                if item.version in present
            ]
            db.executemany(f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?, ?, ?, ?)", rows)

    def take_over(self, spec: str | None, removing: Collection[Version]) -> bool:
        """Put these vectors in the place of the present ones, and remove the items `removing`, in one transaction.

        `spec`: where the encoder was opened. Returns: False if another item is pending now; nothing is changed then.
        """
        with self._catalog.changing() as (db, seq):
            left = set(db.execute(f"SELECT items.id, vectors.seq {self._pending}"))
            if not left <= set(removing):
                return False
            db.executemany(INSERT["removed"], [sealed(item_id, seq) for item_id, _ in left])
            db.executemany("DELETE FROM items WHERE id = ?", [(item_id,) for item_id, _ in left])
            db.execute("DROP TABLE vectors")
            db.execute(f"DROP TRIGGER {self._table}_removed")
            db.execute(f"ALTER TABLE {self._table} RENAME TO vectors")
            db.execute(VECTORS_INDEX)
            for table in _tables(db):  # of encoders that never took over
                db.execute(f"DROP TRIGGER {table}_removed")
                db.execute(f"DROP TABLE {table}")
            self._rewrite_facts(db, seq, spec)
        return True

    def _rewrite_facts(self, db: sqlite3.Connection, seq: int, spec: str | None) -> None:
        db.execute("DELETE FROM facts")
        write_facts(db, replace(facts_of(self._encoder), since=seq))
        if spec is not None:
            db.execute(INSERT["facts"], sealed(ENCODER_SPEC, spec))


def _tables(db: sqlite3.Connection) -> list[str]:
    names = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name GLOB ?", [f"{_PREFIX}*"])
    return [name for (name,) in names]
