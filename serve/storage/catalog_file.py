"""The SQLite file under a catalog: one writer and many readers, over all threads and processes.

Reading is one snapshot, writing is one transaction, and both are SQLite's own (WAL, synchronous=FULL): readers wait for nobody.
A note beside the file names the last transaction that was acknowledged. SQLite takes a damaged or lost WAL for a short one,
and would say nothing of what is missing.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from serve.errors import GalleryError

_NOTE_BYTES = 64
_IDLE_CONNECTIONS = 8
_SURE_S = 0.05
_WAIT_S = 30
_WAL_BYTES, _WAL_WAIT_S = 64 << 20, 0.5


class CatalogFile:
    """A pool of connections. Safe from several threads, and beside other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._watching: sqlite3.Connection | None = None
        self._version, self._sure_until, self._note_held = 0, 0.0, -1
        self._seen: bytes | None = None
        self._closed, self._lock, self._write_lock, self._watch_lock = False, *(threading.Lock() for _ in range(3))
        self._note = path.with_name(f"{path.name}-acknowledged")
        self._wal, self._wal_limit = path.with_name(f"{path.name}-wal"), _WAL_BYTES

    def connect(self) -> sqlite3.Connection:
        """A connection of one's own. Raises: sqlite3.Error; see `translated`."""
        db = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
        for pragma in (
            "synchronous = FULL",
            "cache_size = -16384",  # KiB
            "temp_store = MEMORY",  # a question must not fail because /tmp is full
        ):
            db.execute(f"PRAGMA {pragma}")
        return db

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot, whatever is written meanwhile. Raises: GalleryError."""
        with self._session("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on disk when the block has ended; undone if it raises. Raises: GalleryError."""
        with self._write_lock, self._session("BEGIN IMMEDIATE") as db:
            yield db
            db.execute("COMMIT")
            with suppress(OSError, sqlite3.Error):  # what is committed is done, whatever comes of this
                self._shorten_wal(db)

    def rewrite(self) -> None:
        """Leave no byte of what was removed or replaced: SQLite only marks it as free, in the file and in its WAL.

        Raises: GalleryError, also if another process has been reading all the while.
        """
        with self._write_lock, self.translated(), closing(self.connect()) as db:
            db.execute("PRAGMA temp_store = FILE")  # a copy of the whole file
            db.execute("VACUUM")
            (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise GalleryError(f"{self._wal}: another process reads it, so what was removed still stands there; try again")

    def _shorten_wal(self, db: sqlite3.Connection) -> None:
        """Empty the WAL if it is large: SQLite does not while readers overlap without a gap, and it would grow for ever."""
        size = self._wal.stat().st_size
        if size < self._wal_limit:
            return
        # Those who read since before are waited for, those who come now are not: they no longer need the WAL.
        db.execute(f"PRAGMA busy_timeout = {int(1000 * _WAL_WAIT_S)}")
        try:
            (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * _WAIT_S)}")
        self._wal_limit = size + _WAL_BYTES if busy else _WAL_BYTES  # one reader is slow: try again later

    def version(self) -> int:
        """A number that is another one as soon as anyone has committed anything. Quick: it is asked before each search.

        Whoever commits changes the note before anybody hears of it. So SQLite itself is asked only if that has changed, and now
        and then in case it could not be written.
        """
        told = self._told()
        if told is None or told != self._seen or time.monotonic() > self._sure_until:
            with self._watch_lock, self.translated():
                self._check_open()
                if self._watching is None:
                    self._watching = self.connect()
                self._hold_note()
                told = self._told()
                (self._version,) = self._watching.execute("PRAGMA data_version").fetchone()
                self._sure_until = time.monotonic() + _SURE_S
                self._seen = told  # last: others go by it without the lock
        return self._version

    def _told(self) -> bytes | None:
        """What the note says; None if there is none."""
        try:
            return os.pread(self._note_held, _NOTE_BYTES, 0)
        except OSError:
            return None

    def _hold_note(self) -> None:
        """Keep the note open, the one that is there now."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._note_held), self._note.stat()):
                return
        with suppress(OSError):
            os.close(self._note_held)
        self._note_held = -1
        with suppress(OSError):
            self._note_held = os.open(self._note, os.O_RDONLY)

    @contextmanager
    def _session(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self.translated():
            db = self._take()
            try:
                db.execute(begin)
                yield db
            finally:
                if db.in_transaction:
                    db.rollback()
                self._give_back(db)

    def _take(self) -> sqlite3.Connection:
        with self._lock:
            self._check_open()
            if self._idle:
                return self._idle.pop()
        return self.connect()

    def _check_open(self) -> None:
        if self._closed:
            raise GalleryError(f"{self.path.parent}: this gallery has been closed; open it again")

    def _give_back(self, db: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(db)
                return
        db.close()

    def close(self) -> None:
        """Close; a reader that is still at work ends in peace. Safe to call twice."""
        with self._write_lock, self._watch_lock, self._lock, self.translated():
            self._closed = True
            self._seen = None  # so that the next version() says that this is closed
            if self._watching is not None:
                self._idle.append(self._watching)
                self._watching = None
            with suppress(OSError):
                os.close(self._note_held)
            self._note_held = -1
            while self._idle:
                self._idle.pop().close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """SQLite's errors, once, as ours."""
        try:
            yield
        except sqlite3.Error as error:
            if "locked" in str(error):
                hint = f"another process has been writing for {_WAIT_S} s; nothing was done, try again"
            else:
                hint = "is the disk full or read-only, or the file no gallery's? what was added before is kept"
            raise GalleryError(f"{self.path}: SQLite says: {error}; {hint}") from error

    def acknowledge(self, seq: int, stamp: str) -> None:
        """Note that this transaction is on disk. The note may lag (loss of power, two writers at once); it never leads."""
        with suppress(OSError):  # not worth failing what is done
            note = os.open(self._note, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(note, f"{seq} {stamp}".ljust(_NOTE_BYTES).encode())  # in place: needs no room on a full disk
            finally:
                os.close(note)

    def acknowledged(self) -> tuple[int, str] | None:
        """The last transaction that was acknowledged, as far as is noted."""
        try:
            seq, stamp = self._note.read_text().split()
            return int(seq), stamp
        except (OSError, ValueError):
            return None
