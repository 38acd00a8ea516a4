"""What may be wrong with a catalog's file: SQLite's own check, rows against their checksums, tables against each other."""
# ruff: noqa: S608  (what is pasted into the SQL comes from the schema's constants)

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

from serve.storage.catalog_file import CatalogFile
from serve.storage.catalog_schema import COLUMNS, row_checksum

_ROW_NAMES = {
    "facts": "fact",
    "changes": "transaction",
    "items": "item",
    "vectors": "vector of item",
    "removed": "removal of item",
}


def problems(file: CatalogFile, dim: int) -> list[str]:
    """One line each. Raises: GalleryError if the damage is such that SQLite cannot go on reading."""
    with file.translated(), closing(file.connect()) as db:
        db.text_factory = bytes  # a flipped bit may leave no UTF-8
        db.execute("BEGIN")
        return [*_of_sqlite(db), *_of_rows(db), *_of_vectors(db, dim), *_of_tables(db)]


def _of_sqlite(db: sqlite3.Connection) -> Iterator[str]:
    for (text,) in db.execute("PRAGMA integrity_check"):
        for line in text.decode(errors="replace").splitlines():
            if line != "ok" and not line.startswith("***"):  # the name of the database
                yield f"catalog: {line}"


def _of_rows(db: sqlite3.Connection) -> Iterator[str]:
    for table, columns in COLUMNS.items():
        for *values, checksum in db.execute(f"SELECT {', '.join(columns)}, checksum FROM {table}"):
            if row_checksum(*values) != checksum:
                name = values[0].decode(errors="replace") if isinstance(values[0], bytes) else values[0]
                yield f"{_ROW_NAMES[table]} {name}: changed on the disk (checksum)"


def _of_vectors(db: sqlite3.Connection, dim: int) -> Iterator[str]:
    for item_id, size in db.execute("SELECT id, length(vector) FROM vectors WHERE length(vector) != ?", [4 * dim]):
        yield f"item {item_id}: vector of {size} bytes, wanted {4 * dim}"


def _of_tables(db: sqlite3.Connection) -> Iterator[str]:
    for (item_id,) in db.execute("SELECT id FROM items EXCEPT SELECT id FROM vectors"):
        yield f"item {item_id}: has no vector"
    for (item_id,) in db.execute("SELECT id FROM vectors EXCEPT SELECT id FROM items"):
        yield f"vector of item {item_id}: there is no such item"
    for (item_id,) in db.execute("SELECT id FROM items INTERSECT SELECT id FROM removed"):
        yield f"item {item_id}: is there, and noted as removed"
    count, last = db.execute("SELECT count(*), coalesce(max(seq), 0) FROM changes").fetchone()
    if count != last:
        yield f"catalog: {last - count} of {last} transactions are missing from its history"
