"""The tables of a gallery's catalog: their SQL, the checksum of a row, how they are made and brought up to date."""
# ruff: noqa: S608  (what is pasted into the SQL comes from the constants below, never from a user)

from __future__ import annotations

import logging
import math
import sqlite3
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError
from serve.storage.catalog_file import CatalogFile

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_APPLICATION_ID = 0x51C18  # marks the file as ours in SQLite's header
ENCODER_SPEC = "encoder_spec"
"""The fact that is no part of `Facts`: where the encoder was last opened."""
SINCE = "since"
"""The fact that a new encoder's taking over changes for certain; see `Facts`."""
COLUMNS = {
    "facts": ("key", "value"),
    "changes": ("seq", "stamp"),
    "items": ("id", "source", "label", "identity", "camera", "time", "extra"),
    "vectors": ("id", "added", "seq", "vector"),
    "removed": ("id", "seq"),
}
"""The columns of every table; one more, `checksum`, stands behind them."""
INSERT = {table: f"INSERT INTO {table} VALUES ({', '.join('?' * (len(names) + 1))})" for table, names in COLUMNS.items()}
VECTORS_INDEX = "CREATE INDEX vectors_seq ON vectors (seq)"
AMONG = "IN (SELECT value FROM json_each(?))"
"""A list as one parameter: SQLite limits how many there may be."""


def vectors_table(name: str) -> str:
    """The SQL of a table of vectors. `added` and `seq`: the transactions that made the item and that set this vector."""
    return (
        f"CREATE TABLE {name} (id INTEGER PRIMARY KEY REFERENCES items, added INTEGER NOT NULL, seq INTEGER NOT NULL,"
        " vector BLOB NOT NULL, checksum INTEGER NOT NULL) STRICT"
    )


_CREATE = (
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL) STRICT",
    "CREATE TABLE changes (seq INTEGER PRIMARY KEY, stamp TEXT NOT NULL, checksum INTEGER NOT NULL) STRICT",
    # Apart from the vectors, a filter reads a tenth of the bytes.
    "CREATE TABLE items (id INTEGER PRIMARY KEY, source TEXT NOT NULL UNIQUE, label TEXT, identity TEXT, camera TEXT,"
    " time REAL, extra TEXT NOT NULL, checksum INTEGER NOT NULL) STRICT",
    vectors_table("vectors"),
    "CREATE TABLE removed (id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, checksum INTEGER NOT NULL) STRICT",
    VECTORS_INDEX,
    "CREATE INDEX removed_seq ON removed (seq)",
    *(f"CREATE INDEX items_{column} ON items ({column})" for column in ("label", "camera", "time")),
    "CREATE INDEX items_identity ON items (identity, camera)",  # the same-camera rule asks for both
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_FROM_1 = {
    "facts": "SELECT key, value FROM old_facts",
    "changes": "SELECT seq, stamp FROM old_changes",
    "items": "SELECT id, source, label, identity, camera, time, extra FROM old_items",
    "vectors": "SELECT id, seq, seq, vector FROM old_items",
    "removed": "SELECT id, seq FROM old_removed",
}


@dataclass(frozen=True)
class Facts:
    """What holds for a whole gallery: the encoder that made its vectors."""

    encoder_id: str
    encoder_name: str
    embedding_dim: int
    manifest: str
    """The encoder's manifest, as JSON."""
    since: int = 0
    """The transaction with which this encoder took the place of another; 0 for the first."""


def row_checksum(*columns: object) -> int:
    """CRC-32 over all columns of a row. Text counts alike as str and as the bytes in the file."""
    return zlib.crc32(b"\xff".join(_bytes(value) for value in columns))  # 0xff and 0xfe never occur in UTF-8


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    return b"\xfe" if value is None else str(value).encode()


def sealed(*columns: object) -> tuple[object, ...]:
    """A row as it is stored: its columns and their checksum."""
    return (*columns, row_checksum(*columns))


def vector_row(item_id: int, added: int, seq: int, vector_D: NDArray[np.float32]) -> tuple[object, ...]:
    """A row of a table of vectors, as it is stored."""
    return sealed(item_id, added, seq, vector_D.astype("<f4").tobytes())


def write_facts(db: sqlite3.Connection, facts: Facts) -> None:
    """Store what holds for the whole gallery, where none of it is stored."""
    db.executemany(INSERT["facts"], [sealed(key, str(value)) for key, value in vars(facts).items()])


def prepare(file: CatalogFile, create: Facts | None) -> Facts:
    """Make the tables if `create` is given and there are none, bring old ones up to date. Raises: GalleryError."""
    with file.translated(), closing(file.connect()) as db:
        new = create is not None and _is_empty(db)
        if create is not None and new:
            db.execute(f"PRAGMA page_size = {page_bytes(create.embedding_dim)}")
        old = not new and _version(db, file.path) < SCHEMA_VERSION
        db.execute("PRAGMA journal_mode = WAL")
    if new or old:
        with file.writing() as db:
            if create is not None and _is_empty(db):  # else another process was quicker
                _create(db, create)
            elif _version(db, file.path) < SCHEMA_VERSION:
                log.warning("%s: of schema 1, being brought up to date", file.path)
                _migrate(db)
    return _read_facts(file)


def _is_empty(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,))


def _create(db: sqlite3.Connection, facts: Facts) -> None:
    for statement in _CREATE:
        db.execute(statement)
    write_facts(db, facts)


def _read_facts(file: CatalogFile) -> Facts:
    with file.reading() as db:
        rows = db.execute("SELECT key, value, checksum FROM facts WHERE key <> ?", [ENCODER_SPEC]).fetchall()
    for key, value, checksum in rows:
        if checksum != row_checksum(key, value):
            raise GalleryError(f"{file.path}: {key} was changed on the disk (checksum); take this file from a backup")
    facts = {key: value for key, value, _ in rows}
    return Facts(**{**facts, "embedding_dim": int(facts["embedding_dim"]), SINCE: int(facts.get(SINCE, 0))})


def _version(db: sqlite3.Connection, path: Path) -> int:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise GalleryError(f"{path}: an SQLite file, but not a gallery's; give a folder made by `simclr gallery add`")
    if version not in (1, SCHEMA_VERSION):
        raise GalleryError(
            f"{path}: has schema {version}, this simclr-serve reads {SCHEMA_VERSION}; install the one that made it"
        )
    return int(version)


def _migrate(db: sqlite3.Connection) -> None:
    old = ("facts", "changes", "items", "removed")
    for column in ("seq", "label", "camera", "time", "identity"):
        db.execute(f"DROP INDEX items_{column}")
    db.execute("DROP INDEX removed_seq")
    for table in old:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for statement in _CREATE:
        db.execute(statement)
    for table, query in _FROM_1.items():
        db.executemany(INSERT[table], (sealed(*row) for row in db.execute(query)))
    for table in old:
        db.execute(f"DROP TABLE old_{table}")


def page_bytes(dim: int) -> int:
    """The smallest page in which vectors of `dim` waste little space (https://sqlite.org/fileformat2.html, section 1.6)."""
    row = 4 * dim + 24  # with its id, seq, checksum and headers

    def bytes_each(page: int) -> float:
        if row > page - 35:  # about an eighth of a page stays in the tree, the rest goes to whole pages of its own
            return page / 8 + math.ceil((row - page / 8) / page) * page
        return page / ((page - 8) // row)

    sizes = (4096, 8192, 16384)
    least = min(map(bytes_each, sizes))
    return next(page for page in sizes if bytes_each(page) < 1.05 * least)  # a small page is less to write for one item
