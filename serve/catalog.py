"""The truth of a gallery: items, metadata and vectors in SQLite.

What a method has returned is on disk. Each transaction that changes items takes the next sequence number and a random stamp, so
that a derived index can tell what it lacks, and whether it ever belonged to this history.
"""
# ruff: noqa: S608  (what is pasted into the SQL comes from constants and from Where, never from a user)

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.errors import DamagedItem, GalleryError, Reembedded
from serve.filters import EVERYTHING, TEXT_FIELDS, Where
from serve.item import Item, Known, columns_of, natural_key, new_item, relabelled, require_known, require_unused
from serve.samples import Sample
from serve.sources import name_fault
from serve.storage.catalog_check import problems
from serve.storage.catalog_file import CatalogFile
from serve.storage.catalog_schema import AMONG, COLUMNS, ENCODER_SPEC, INSERT, SINCE, Facts, prepare, sealed, vector_row

log = logging.getLogger(__name__)

_REMEMBERED_FILTERS = 8  # of 8 bytes per id
_BLOCK_ROWS = 10_000
_COLUMNS = ", ".join(COLUMNS["items"])
_NEXT_ID = "SELECT 1 + max((SELECT coalesce(max(id), 0) FROM items), (SELECT coalesce(max(id), 0) FROM removed))"


class Change(NamedTuple):
    """One transaction: its sequence number, and a stamp that no other history shares. (0, "") is the beginning."""

    seq: int
    stamp: str


class Catalog:
    """Safe from several threads, and beside other processes: a reader never waits, writers wait for each other."""

    def __init__(self, path: Path, create: Facts | None = None) -> None:
        """Open `path`; with `create`, make it first if it is missing or empty. Raises: GalleryError."""
        if create is None and not path.is_file():
            raise GalleryError(f"{path}: no such file, so this is no gallery; make one with `simclr gallery add`")
        self._path, self._file = path, CatalogFile(path)
        self._remembered = lru_cache(maxsize=_REMEMBERED_FILTERS)(self._read_ids)
        try:
            self.facts = prepare(self._file, create)
            if (lost := self._lost()) is not None:
                log.warning("%s", lost)
        except BaseException:
            self._file.close()
            raise

    def _lost(self) -> str | None:
        """Which acknowledged transaction this file lacks, in words."""
        noted = self._file.acknowledged()
        if noted is None or self.has_change(Change(*noted)):
            return None
        return (
            f"{self._path}: lacks transaction {noted[0]}, which was acknowledged; its last is {self.last_change().seq}: "
            "an older copy, one without its -wal file, or a damaged one; add again what came after"
        )

    @property
    def encoder_spec(self) -> str | None:
        """Where the encoder was last opened, a path or address; None if nobody said."""
        with self._file.reading() as db:
            found = db.execute("SELECT value FROM facts WHERE key = ?", [ENCODER_SPEC]).fetchone()
        return str(found[0]) if found else None

    @encoder_spec.setter
    def encoder_spec(self, spec: str) -> None:
        with self._file.writing() as db:
            self._require_encoder(db)
            db.execute("DELETE FROM facts WHERE key = ?", [ENCODER_SPEC])
            db.execute(INSERT["facts"], sealed(ENCODER_SPEC, spec))

    def add(
        self,
        samples: Sequence[Sample],
        vectors_ND: NDArray[np.float32],
        extra: Mapping[str, Mapping[str, JsonValue]],
        given_ids: Mapping[str, int] | None = None,
    ) -> list[int]:
        """Add items in one transaction; a source that is there already is left alone. `extra` and `given_ids` go by source.

        Returns: the new ids. Raises: GalleryError, and then nothing was added.
        """
        if vectors_ND.shape != (len(samples), self.facts.embedding_dim):
            raise ValueError(f"vectors are {vectors_ND.shape}, wanted {(len(samples), self.facts.embedding_dim)}")
        rows: dict[str, tuple[Sample, NDArray[np.float32]]] = {}
        for sample, vector in zip(samples, vectors_ND, strict=True):
            rows.setdefault(sample.source, (sample, vector))
        with self.changing() as (db, seq):
            for source in _sources(db, list(rows)):
                del rows[source]
            (first,) = db.execute(_NEXT_ID).fetchone()
            ids = list(range(first, first + len(rows)))
            if given_ids is not None:
                ids = [given_ids[source] for source in rows]
                self._require_unused(db, ids)
            fresh = list(zip(ids, rows.values(), strict=True))
            items = [new_item(i, sample, extra.get(sample.source, {})) for i, (sample, _) in fresh]
            db.executemany(INSERT["items"], map(_row, items))
            db.executemany(INSERT["vectors"], [vector_row(i, seq, seq, vector) for i, (_, vector) in fresh])
        return ids

    def update(self, item_id: int, vector_D: NDArray[np.float32], source: str | None = None) -> None:
        """Give an item another vector and, if named, another source. Raises: GalleryError, and then nothing was changed."""
        if vector_D.shape != (self.facts.embedding_dim,):
            raise ValueError(f"vector is {vector_D.shape}, wanted {(self.facts.embedding_dim,)}")
        if source is not None and (fault := name_fault(source)) is not None:
            raise GalleryError(fault)
        with self.changing() as (db, seq):
            self._require(db, [item_id], "nothing was changed")
            if source is not None:
                for other in _column(db.execute("SELECT id FROM items WHERE source = ? AND id <> ?", [source, item_id])):
                    raise GalleryError(f"{self._path.parent}: {source} is item {other}; nothing was changed")
                _revise(db, [replace(item, source=source) for item in _items(db, [item_id])], ["source"])
            (added,) = db.execute("SELECT added FROM vectors WHERE id = ?", [item_id]).fetchone() or (seq,)
            db.execute("DELETE FROM vectors WHERE id = ?", [item_id])
            db.execute(INSERT["vectors"], vector_row(item_id, added, seq, vector_D))

    def relabel(self, ids: Sequence[int], **known: Unpack[Known]) -> None:
        """Say anew what is known about items, in one transaction. Raises: GalleryError, and then nothing was changed."""
        with self.changing() as (db, _):
            self._require(db, ids, "nothing was changed")
            for start in range(0, len(ids), _BLOCK_ROWS):
                items = _items(db, ids[start : start + _BLOCK_ROWS])
                _revise(db, [relabelled(item, known) for item in items], known)

    def remove(self, ids: Sequence[int]) -> None:
        """Remove items in one transaction. Raises: GalleryError naming unknown ids, and then nothing was removed."""
        with self.changing() as (db, seq):
            self._require(db, ids, "nothing was removed")
            db.executemany(INSERT["removed"], [sealed(item_id, seq) for item_id in set(ids)])
            for table in ("vectors", "items"):
                db.execute(f"DELETE FROM {table} WHERE id {AMONG}", [json.dumps(ids)])

    def _require(self, db: sqlite3.Connection, ids: Sequence[int], otherwise: str) -> None:
        known = set(_column(db.execute(f"SELECT id FROM items WHERE id {AMONG}", [json.dumps(ids)])))
        require_known(ids, known, str(self._path.parent), otherwise)

    def _require_unused(self, db: sqlite3.Connection, ids: Sequence[int]) -> None:
        used = [
            item_id
            for table in ("items", "removed")
            for item_id in _column(db.execute(f"SELECT id FROM {table} WHERE id {AMONG}", [json.dumps(ids)]))
        ]
        require_unused(ids, used, str(self._path.parent))

    def __len__(self) -> int:
        return self.count(EVERYTHING)

    def count(self, where: Where) -> int:
        """How many items pass."""
        condition, parameters = where.sql()
        with self._file.reading() as db:
            (count,) = db.execute(f"SELECT count(*) FROM items WHERE {condition}", parameters).fetchone()
        return int(count)

    def items(self, where: Where, limit: int | None = None, offset: int = 0) -> list[Item]:
        """Items in the order they were added."""
        condition, parameters = where.sql()
        query = f"SELECT {_COLUMNS} FROM items WHERE {condition} ORDER BY id LIMIT ? OFFSET ?"
        with self._file.reading() as db:
            return [_item(row) for row in db.execute(query, [*parameters, -1 if limit is None else limit, offset])]

    def ids(self, where: Where) -> NDArray[np.int64]:
        """Ids of the items that pass, growing; not to be written into, for they are remembered until something changes."""
        return self._remembered(where, self.last_change())

    def _read_ids(self, where: Where, _: Change) -> NDArray[np.int64]:
        condition, parameters = where.sql()
        with self._file.reading() as db:  # as one text: fetching 100,000 rows one by one takes four times as long
            (text,) = db.execute(f"SELECT group_concat(id) FROM items WHERE {condition}", parameters).fetchone()
        ids = np.sort(np.fromstring(text or "", np.int64, sep=","))
        ids.flags.writeable = False
        return ids

    def lookup(self, ids: Sequence[int], where: Where = EVERYTHING) -> dict[int, Item]:
        """Those of these items that exist and pass."""
        condition, parameters = where.sql()
        with self._file.reading() as db:
            return {item.id: item for item in _items(db, ids, f"AND {condition}", parameters)}

    def vector(self, item_id: int) -> NDArray[np.float32] | None:
        """The vector (D,) of one item; None if there is no such item. Raises: DamagedItem, GalleryError."""
        with self.reading() as db:
            query = f"SELECT vector FROM items LEFT JOIN vectors USING (id) WHERE id {AMONG}"
            found = db.execute(query, [json.dumps([item_id])]).fetchone()  # as JSON: it may be larger than SQLite's numbers
        if found is None:
            return None
        self._require_whole(item_id, found[0])
        return np.frombuffer(found[0], "<f4").copy()

    def _require_whole(self, item_id: int, vector: bytes | None) -> None:
        if vector is None or len(vector) != 4 * self.facts.embedding_dim:
            raise DamagedItem(f"item {item_id}: its vector is damaged or missing; update or remove it")

    def rows(self, where: Where, rows: int = 1024) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Items that pass and their vectors (n, D), in blocks, by growing id; all of one state. Raises: GalleryError."""
        condition, parameters = where.sql()
        query = f"SELECT {_COLUMNS}, vector FROM items JOIN vectors USING (id) WHERE {condition} ORDER BY id"
        with self.reading() as db:
            cursor = db.execute(query, parameters)
            while block := cursor.fetchmany(rows):
                for item_id, *_, vector in block:
                    self._require_whole(item_id, vector)
                vectors = np.frombuffer(b"".join(row[-1] for row in block), "<f4").reshape(len(block), -1)
                yield [_item(row[:-1]) for row in block], vectors

    def known_sources(self, sources: Iterable[str]) -> list[str]:
        """Those of these sources that are in the catalog."""
        wanted, known = list(sources), list[str]()
        for start in range(0, len(wanted), _BLOCK_ROWS):
            with self._file.reading() as db:
                known += _sources(db, wanted[start : start + _BLOCK_ROWS])
        return known

    def distinct(self, field: str) -> list[str]:
        """The values of a text field, sorted naturally (2 before 10)."""
        if field not in TEXT_FIELDS:
            raise GalleryError(f"distinct: got field {field!r}, wanted one of {', '.join(TEXT_FIELDS)}")
        with self._file.reading() as db:
            values = _column(db.execute(f"SELECT DISTINCT {field} FROM items WHERE {field} IS NOT NULL"))
        return sorted(values, key=natural_key)

    @property
    def next_id(self) -> int:
        """The id that the next item gets: none that is as high was ever used."""
        with self._file.reading() as db:
            return int(db.execute(_NEXT_ID).fetchone()[0])

    def version(self) -> int:
        """A number that is another one as soon as anyone has committed anything; quicker to ask for than the last change."""
        return self._file.version()

    def last_change(self) -> Change:
        """The newest transaction."""
        with self._file.reading() as db:
            row = db.execute("SELECT seq, stamp FROM changes ORDER BY seq DESC LIMIT 1").fetchone()
        return Change(*row) if row else Change(0, "")

    def has_change(self, change: Change) -> bool:
        """Whether this history contains `change`."""
        with self.reading() as db:
            return db.execute("SELECT 1 FROM changes WHERE (seq, stamp) = (?, ?)", change).fetchone() is not None

    def vectors(self, after: int, upto: int, rows: int = 4096) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids and vectors (n, D) of items that `upto` knew of and whose vector was set since `after`, in blocks of `rows`.

        The vectors are those of now: one that was set again after `upto` comes as well, lest its item be missing meanwhile.
        """
        # A vector of the wrong size is left out: it must not keep the rest from being served, and `verify` names it.
        query = "SELECT id, vector FROM vectors WHERE seq > ? AND added <= ? AND length(vector) = ? ORDER BY seq, id"
        dim = self.facts.embedding_dim
        with self.reading() as db:
            cursor = db.execute(query, [after, upto, 4 * dim])
            while block := cursor.fetchmany(rows):
                vectors = np.frombuffer(b"".join(blob for _, blob in block), "<f4").reshape(-1, dim)
                yield np.array([item_id for item_id, _ in block], np.int64), vectors

    def removed(self, after: int, upto: int) -> NDArray[np.int64]:
        """Ids of what transactions `after` < seq <= `upto` removed."""
        with self._file.reading() as db:
            found = _column(db.execute("SELECT id FROM removed WHERE seq > ? AND seq <= ?", [after, upto]))
        return np.asarray(found, np.int64)

    def problems(self) -> list[str]:
        """What is wrong, one line each: lost transactions, SQLite's own check, rows that differ from their checksum."""
        lost = self._lost()
        return ([] if lost is None else [lost]) + problems(self._file, self.facts.embedding_dim)

    def scrub(self) -> None:
        """Write the file anew, without the bytes that removed and changed items leave in it. Raises: GalleryError."""
        self._file.rewrite()

    def repair(self) -> None:
        """Derive SQLite's own indexes anew from the tables. Raises: GalleryError."""
        with self._file.writing() as db:
            db.execute("REINDEX")

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot, whose vectors are of the encoder that this was opened with. Raises: Reembedded, GalleryError."""
        with self._file.reading() as db:
            self._require_encoder(db)
            yield db

    def _require_encoder(self, db: sqlite3.Connection) -> None:
        found = db.execute("SELECT value FROM facts WHERE key = ?", [SINCE]).fetchone()
        if found is not None and int(found[0]) != self.facts.since:
            raise Reembedded(f"{self._path.parent}: has another encoder now; close it, and open it again with that")

    @contextmanager
    def changing(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """A transaction and its sequence number. Raises: Reembedded, GalleryError."""
        stamp = secrets.token_hex(8)
        with self._file.writing() as db:
            self._require_encoder(db)
            (seq,) = db.execute("SELECT 1 + coalesce(max(seq), 0) FROM changes").fetchone()
            db.execute(INSERT["changes"], sealed(seq, stamp))
            yield db, seq
        self._file.acknowledge(seq, stamp)


def _items(db: sqlite3.Connection, ids: Sequence[int], condition: str = "", parameters: Sequence[Any] = ()) -> list[Item]:
    # NOT INDEXED leaves the way by id alone: SQLite might take it to be quicker to look at every item of one camera.
    query = f"SELECT {_COLUMNS} FROM items NOT INDEXED WHERE id {AMONG} {condition}"
    return [_item(row) for row in db.execute(query, [json.dumps(ids), *parameters])]


def _sources(db: sqlite3.Connection, sources: Sequence[str]) -> list[str]:
    return _column(db.execute(f"SELECT source FROM items WHERE source {AMONG}", [json.dumps(sources)]))


def _item(row: tuple[Any, ...]) -> Item:
    *columns, extra = row
    try:
        return Item(*[*columns, json.loads(extra)])
    except ValueError as error:
        raise DamagedItem(f"item {columns[0]}: changed on the disk ({error}); see `simclr gallery verify`") from error


def _row(item: Item) -> tuple[object, ...]:
    return sealed(*columns_of(item))


def _revise(db: sqlite3.Connection, items: Iterable[Item], columns: Iterable[str]) -> None:
    """Store these columns of items anew."""
    assignments = ", ".join(f"{column} = :{column}" for column in (*columns, "checksum"))
    rows = [dict(zip((*COLUMNS["items"], "checksum"), _row(item), strict=True)) for item in items]
    db.executemany(f"UPDATE items SET {assignments} WHERE id = :id", rows)


def _column(cursor: sqlite3.Cursor) -> list[Any]:
    return [row[0] for row in cursor]
