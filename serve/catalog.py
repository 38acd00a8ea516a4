"""The truth of a gallery: items, metadata and vectors in SQLite.

What a method has returned is on disk (WAL, synchronous=FULL). Each transaction that changes items takes the next sequence
number and a random stamp, so that a derived index can tell what it lacks, and whether it ever belonged to this history.
"""
# ruff: noqa: S608  (what is pasted into the SQL comes from the constants below and from Where, never from a user)

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.errors import GalleryError
from serve.filters import TEXT_FIELDS, Where
from serve.sources import Sample

SCHEMA_VERSION = 1
_ENCODER_SPEC = "encoder_spec"
_APPLICATION_ID = 0x51C18  # marks the file as ours in SQLite's header
_SCHEMA = (
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE changes (seq INTEGER PRIMARY KEY, stamp TEXT NOT NULL) STRICT",
    # The vector stands last: SQLite reads a row from its start, and filters need only the start.
    "CREATE TABLE items (id INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER NOT NULL, source TEXT NOT NULL UNIQUE, label TEXT,"
    " identity TEXT, camera TEXT, time REAL, extra TEXT NOT NULL, vector BLOB NOT NULL) STRICT",
    "CREATE TABLE removed (id INTEGER PRIMARY KEY, seq INTEGER NOT NULL) STRICT",
    "CREATE INDEX removed_seq ON removed (seq)",
    *(f"CREATE INDEX items_{column} ON items ({column})" for column in ("seq", "label", "camera", "time")),
    "CREATE INDEX items_identity ON items (identity, camera)",  # the same-camera rule asks for both
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_INSERT = (
    "INSERT INTO items (seq, source, label, identity, camera, time, extra, vector)"
    " VALUES (:seq, :source, :label, :identity, :camera, :time, :extra, :vector) ON CONFLICT (source) DO NOTHING RETURNING id"
)
_COLUMNS = "id, source, label, identity, camera, time, extra"
_AMONG = "IN (SELECT value FROM json_each(?))"  # a list as one parameter: SQLite limits how many there may be


@dataclass(frozen=True)
class Facts:
    """What holds for a whole gallery: the encoder that made its vectors."""

    encoder_id: str
    encoder_name: str
    embedding_dim: int
    manifest: str
    """The encoder's manifest, as JSON."""


@dataclass(frozen=True)
class Item:
    """One picture of a gallery. `id` is the gallery's own and never used again; `time` is in seconds."""

    id: int
    source: str
    label: str | None
    identity: str | None
    camera: str | None
    time: float | None
    extra: dict[str, JsonValue]


class Change(NamedTuple):
    """One transaction: its sequence number, and a stamp that no other history shares. (0, "") is the beginning."""

    seq: int
    stamp: str


class Catalog:
    """One SQLite connection behind a lock: safe from several threads, and beside other processes."""

    def __init__(self, path: Path, create: Facts | None = None) -> None:
        """Open `path`; with `create`, make it first if it is missing or empty. Raises: GalleryError."""
        self._path, self._closed, self._lock = path, False, threading.Lock()
        if create is None and not path.is_file():
            raise GalleryError(f"{path}: no such file, so this is no gallery; make one with `simclr gallery add`")
        with self._translated():
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._open(create)
        except BaseException:
            self._db.close()
            raise
        with self._session() as db:
            facts = dict(db.execute("SELECT key, value FROM facts WHERE key <> ?", [_ENCODER_SPEC]))
        self.facts = Facts(**{**facts, "embedding_dim": int(facts["embedding_dim"])})

    @property
    def encoder_spec(self) -> str | None:
        """Where the encoder was last opened, a path or address; None if nobody said."""
        with self._session() as db:
            found = db.execute("SELECT value FROM facts WHERE key = ?", [_ENCODER_SPEC]).fetchone()
        return str(found[0]) if found else None

    @encoder_spec.setter
    def encoder_spec(self, spec: str) -> None:
        with self._session(write=True) as db:
            db.execute(
                "INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", [_ENCODER_SPEC, spec]
            )

    def _open(self, create: Facts | None) -> None:
        with self._session() as db:
            if create is None or not self._is_empty(db):
                self._check_ours(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA cache_size = -65536")  # KiB
            db.execute("PRAGMA temp_store = MEMORY")  # a question must not fail because /tmp is full
        if create is not None:
            with self._session(write=True) as db:
                if self._is_empty(db):  # another process may have been quicker
                    for statement in _SCHEMA:
                        db.execute(statement)
                    db.executemany(
                        "INSERT INTO facts VALUES (?, ?)", [(key, str(value)) for key, value in vars(create).items()]
                    )

    @staticmethod
    def _is_empty(db: sqlite3.Connection) -> bool:
        return bool(db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,))

    def _check_ours(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise GalleryError(f"{self._path}: an SQLite file, but not a gallery's; give a folder made by `simclr gallery add`")
        if version != SCHEMA_VERSION:
            raise GalleryError(
                f"{self._path}: has schema {version}, this simclr-serve reads {SCHEMA_VERSION}; install the one that made it"
            )

    def add(
        self, samples: Sequence[Sample], vectors_ND: NDArray[np.float32], extra: Mapping[str, Mapping[str, JsonValue]]
    ) -> list[int]:
        """Add items in one transaction; a source that is there already is left alone. `extra` goes by source.

        Returns: the new ids. Raises: GalleryError, and then nothing was added.
        """
        if vectors_ND.shape != (len(samples), self.facts.embedding_dim):
            raise ValueError(f"vectors are {vectors_ND.shape}, wanted {(len(samples), self.facts.embedding_dim)}")
        ids: list[int] = []
        with self._session(write=True) as db:
            seq = self._next_change(db)
            for sample, vector in zip(samples, vectors_ND, strict=True):
                more = json.dumps(dict(extra.get(sample.source, {})), allow_nan=False)
                row = {**vars(sample), "seq": seq, "extra": more, "vector": vector.astype("<f4").tobytes()}
                ids += _column(db.execute(_INSERT, row))
        return ids

    def remove(self, ids: Sequence[int]) -> None:
        """Remove items in one transaction. Raises: GalleryError naming unknown ids, and then nothing was removed."""
        wanted = json.dumps(ids)
        with self._session(write=True) as db:
            known = set(_column(db.execute(f"SELECT id FROM items WHERE id {_AMONG}", [wanted])))
            if unknown := sorted(set(ids) - known):
                raise GalleryError(f"{self._path.parent}: no item with id {_listed(unknown)}; nothing was removed")
            seq = self._next_change(db)
            db.execute(f"INSERT INTO removed (id, seq) SELECT id, ? FROM items WHERE id {_AMONG}", [seq, wanted])
            db.execute(f"DELETE FROM items WHERE id {_AMONG}", [wanted])

    def __len__(self) -> int:
        with self._session() as db:
            (count,) = db.execute("SELECT count(*) FROM items").fetchone()
        return int(count)

    def items(self, where: Where, limit: int | None = None, offset: int = 0) -> list[Item]:
        """Items in the order they were added."""
        condition, parameters = where.sql()
        query = f"SELECT {_COLUMNS} FROM items WHERE {condition} ORDER BY id LIMIT ? OFFSET ?"
        with self._session() as db:
            return [_item(row) for row in db.execute(query, [*parameters, -1 if limit is None else limit, offset])]

    def ids(self, where: Where) -> NDArray[np.int64]:
        """Ids of the items that pass, growing."""
        condition, parameters = where.sql()
        with self._session() as db:  # as one text: fetching 100,000 rows one by one takes four times as long
            (text,) = db.execute(f"SELECT group_concat(id) FROM items WHERE {condition}", parameters).fetchone()
        return np.sort(np.fromstring(text or "", np.int64, sep=","))

    def lookup(self, ids: Sequence[int]) -> dict[int, Item]:
        """Those of these items that exist."""
        with self._session() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM items WHERE id {_AMONG}", [json.dumps(ids)])
            return {row[0]: _item(row) for row in rows}

    def vector(self, item_id: int) -> NDArray[np.float32] | None:
        """The vector (D,) of one item; None if there is no such item."""
        with self._session() as db:
            blobs = _column(db.execute(f"SELECT vector FROM items WHERE id {_AMONG}", [json.dumps([item_id])]))
        return np.frombuffer(blobs[0], "<f4").copy() if blobs else None

    def known_sources(self, sources: Iterable[str], block: int = 10_000) -> list[str]:
        """Those of these sources that are in the catalog."""
        wanted, known = list(sources), list[str]()
        for start in range(0, len(wanted), block):
            with self._session() as db:
                some = json.dumps(wanted[start : start + block])
                known += _column(db.execute(f"SELECT source FROM items WHERE source {_AMONG}", [some]))
        return known

    def distinct(self, field: str) -> list[str]:
        """The values of a text field, sorted naturally (2 before 10)."""
        if field not in TEXT_FIELDS:
            raise GalleryError(f"distinct: got field {field!r}, wanted one of {', '.join(TEXT_FIELDS)}")
        with self._session() as db:
            values = _column(db.execute(f"SELECT DISTINCT {field} FROM items WHERE {field} IS NOT NULL"))
        return sorted(values, key=natural_key)

    def last_change(self) -> Change:
        """The newest transaction."""
        with self._session() as db:
            row = db.execute("SELECT seq, stamp FROM changes ORDER BY seq DESC LIMIT 1").fetchone()
        return Change(*row) if row else Change(0, "")

    def has_change(self, change: Change) -> bool:
        """Whether this history contains `change`."""
        with self._session() as db:
            return db.execute("SELECT 1 FROM changes WHERE (seq, stamp) = (?, ?)", change).fetchone() is not None

    def vectors(self, after: int, upto: int, rows: int = 4096) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids and vectors (n, D) of what transactions `after` < seq <= `upto` added and is still there, in blocks."""
        # A vector of the wrong size is left out: it must not keep the rest from being served, and `verify` names it.
        query = (
            "SELECT seq, id, vector FROM items WHERE (seq, id) > (?, ?) AND seq <= ? AND length(vector) = ?"
            " ORDER BY seq, id LIMIT ?"
        )
        dim, last = self.facts.embedding_dim, (after, 2**63 - 1)
        while True:
            with self._session() as db:
                block = db.execute(query, [*last, upto, 4 * dim, rows]).fetchall()
            if not block:
                return
            last = block[-1][:2]
            vectors = np.frombuffer(b"".join(row[2] for row in block), "<f4").reshape(-1, dim)
            yield np.array([row[1] for row in block], np.int64), vectors

    def removed(self, after: int, upto: int) -> NDArray[np.int64]:
        """Ids of what transactions `after` < seq <= `upto` removed."""
        with self._session() as db:
            found = _column(db.execute("SELECT id FROM removed WHERE seq > ? AND seq <= ?", [after, upto]))
        return np.asarray(found, np.int64)

    def problems(self) -> list[str]:
        """What is wrong with the file: SQLite's own check, and vectors of the wrong size."""
        dim = self.facts.embedding_dim
        with self._session() as db:
            found = [f"catalog: {line}" for line in _column(db.execute("PRAGMA integrity_check")) if line != "ok"]
            odd = db.execute("SELECT id, length(vector) FROM items WHERE length(vector) != ?", [4 * dim])
            return found + [f"item {item_id}: vector of {size} bytes, wanted {4 * dim}" for item_id, size in odd]

    def close(self) -> None:
        """Close the file; safe to call twice."""
        with self._lock, self._translated():
            self._closed = True
            self._db.close()

    @staticmethod
    def _next_change(db: sqlite3.Connection) -> int:
        (seq,) = _column(db.execute("INSERT INTO changes (stamp) VALUES (lower(hex(randomblob(8)))) RETURNING seq"))
        return int(seq)

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time; a write session is one transaction."""
        with self._lock, self._translated():
            if self._closed:
                raise GalleryError(f"{self._path.parent}: this gallery has been closed; open it again")
            try:
                if write:
                    self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                if write:
                    self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.rollback()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors, once, as ours."""
        try:
            yield
        except sqlite3.Error as error:
            hint = "is the disk full or read-only, or the file no gallery's? what was added before is kept"
            raise GalleryError(f"{self._path}: SQLite says: {error}; {hint}") from error


def _item(row: tuple[Any, ...]) -> Item:
    *columns, extra = row
    return Item(*[*columns, json.loads(extra)])


def _column(cursor: sqlite3.Cursor) -> list[Any]:
    return [row[0] for row in cursor]


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that orders runs of digits by their value."""
    parts = [part.lstrip("0") if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
    # re.split puts the digits at the odd places: a longer run of digits is a greater number
    return [(0, len(part), part) if place % 2 else (1, 0, part) for place, part in enumerate(parts)], text
