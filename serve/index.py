"""The fast copy of a gallery's vectors: FAISS and exact scores, derived from the catalog; may be deleted at any time.

On disk, in the folder, is a base: a picture of the catalog that never changes, mapped into memory. In memory is what came after
it: a few rows, and which of the base's are dead. When that has become much, a new base is written in the background and takes
the old one's place. A search works on the state it finds, and waits neither for that nor for other searches.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.ann.base import Base, damage, folders, newest, open_base
from serve.ann.build import build, extend
from serve.ann.choice import IndexLimits, Work
from serve.ann.lock import exclusive
from serve.ann.report import table
from serve.ann.segment import Found
from serve.ann.state import MANY_ROWS, State
from serve.catalog import Catalog
from serve.errors import GalleryError, Reembedded

log = logging.getLogger(__name__)

_BLOCK_QUERIES = 1024
_RETRY_S = 60
_LOCK_NAME = "lock"


class _Stopped(Exception):
    """Closed while a base was being written."""


def unit_vectors(vectors: ArrayLike, dim: int, what: str = "vectors", first_row: int = 0) -> NDArray[np.float32]:
    """L2-normalised copy, float32 (N, dim); what is of unit length stays as it is, to the last bit.

    `first_row`: the number of the first, for messages. Raises: GalleryError for another shape, NaN, infinity, a zero vector.
    """
    array = np.asarray(vectors)
    if array.ndim != 2 or array.shape[1] != dim or array.dtype.kind not in "fiu":
        raise GalleryError(
            f"{what}: got {array.dtype}{array.shape}, wanted numbers of shape (N, {dim}); was another encoder used?"
        )
    wide = array.astype(np.float64)
    norms = np.sqrt((wide * wide).sum(axis=1))
    good = (norms > 0) & (norms < np.inf)
    if not good.all():
        raise GalleryError(
            f"{what}: row {first_row + np.argmin(good)} is zero, infinite or not a number, so it has no direction; leave it out"
        )
    norms[np.abs(norms - 1) <= np.finfo(np.float32).eps] = 1
    unit: NDArray[np.float32] = (wide / norms[:, None]).astype(np.float32)
    return unit


class Index:
    """Search over the catalog's vectors. Safe from several threads, and beside other processes."""

    def __init__(self, catalog: Catalog, folder: Path, limits: IndexLimits | None = None) -> None:
        """Map the newest base that can be trusted, and replay what the catalog has beyond it.

        `limits`: those of the base unless given. Raises: GalleryError.
        """
        self._catalog, self._folder = catalog, folder
        self._changing, self._writing, self._starting = threading.Lock(), threading.Lock(), threading.Lock()
        self._stopping, self._not_before, self._version = threading.Event(), 0.0, -1
        self._worker: threading.Thread | None = None
        self._left_behind = self._closed = False
        base = newest(folder, catalog)
        self.limits = limits or (base.header.limits if base else IndexLimits())
        self._state = State.of(base, catalog.facts.embedding_dim)
        if base is None and len(catalog) > MANY_ROWS:  # too many for memory; choosing an index for them can wait
            self._save_or_warn()
        self._replay()

    def __len__(self) -> int:
        return len(self._state)

    def catch_up(self) -> None:
        """Replay the transactions that this index lacks, of this process or any other.

        When the gallery has been re-embedded it stays as it was: what it finds is true of the former encoder.
        """
        if self._left_behind:
            return
        try:
            self._replay()
        except Reembedded as error:
            log.warning("%s; until then, what it held before is searched", error)
            self._left_behind = True

    def _replay(self) -> None:
        version = self._catalog.version()
        if version != self._version:
            with self._changing:
                self._state = self._state.caught_up(self._catalog)
                self._state = self._state.settled()
                self._version = version
        if self._state.due:
            self._start_worker()

    def search(
        self,
        queries_QD: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.int64] | None = None,
        excluded: NDArray[np.int64] | None = None,
    ) -> Found:
        """The `k` nearest by cosine, of the `allowed` ids if given (growing), without those `excluded`.

        An `allowed` array that cannot be written into is remembered. A single query runs on one core, many on all.
        Returns: scores (Q, n) falling and ids (Q, n), n <= k, equal scores by growing id; -inf and -1 where there are fewer.
        """
        faiss.omp_set_num_threads(1 if len(queries_QD) == 1 else _cores())  # this thread's; one query is no work to share
        state = self._state
        if self._closed:  # asked after the state was taken, which else might be the empty one
            raise GalleryError(f"{self._folder.parent}: this gallery has been closed; open it again")
        if len(queries_QD) <= _BLOCK_QUERIES:
            return state.search(queries_QD, k, allowed, excluded)
        blocks = range(0, len(queries_QD), _BLOCK_QUERIES)
        found = [state.search(queries_QD[start : start + _BLOCK_QUERIES], k, allowed, excluded) for start in blocks]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([ids for _, ids in found])

    @property
    def unsaved(self) -> int:
        """How many rows to add and to bury the base on disk lacks."""
        state = self._state
        return state.waiting + state.buried

    def describe(self) -> str:
        """What it is, in one line."""
        state = self._state
        method = "exact" if state.base is None else str(state.base.header.method)
        return f"{method}; {len(state):,} vectors, {self.unsaved:,} changes not yet in {self._folder.name}/"

    def report(self) -> str:
        """What was measured when the index was chosen, as a table; empty as long as search is exact."""
        base = self._state.base
        return "" if base is None else table(base.header.report, base.header.limits)

    def save(self) -> None:
        """Write what the base on disk lacks, and choose nothing. Raises: GalleryError; nothing is lost then."""
        self._write(self._saved, _cores())

    def compact(self) -> None:
        """Write a new base if one is due, with an index chosen anew if the old one is outgrown. Raises: GalleryError."""
        self._write(self._renewed, _cores())

    def rebuild(self, limits: IndexLimits | None = None) -> None:
        """Derive all anew from the catalog, and choose the index by measuring. Raises: GalleryError."""
        self.limits = limits or self.limits
        self._write(self._rebuilt, _cores())

    def close(self) -> None:
        """Stop what is going on in the background; save if that spares the next opening much. Lets go of the files."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.join()
        self._stopping.clear()
        if self.unsaved * 10 > len(self) and not self._left_behind:  # replaying the last tenth costs less than writing all anew
            self._save_or_warn()
        self._closed = True
        self._state = State.of(None, self._catalog.facts.embedding_dim)  # the mapping ends when nobody searches in it any more

    def problems(self) -> list[str]:
        """Where this copy differs from the catalog or from what was written, and vectors that are not of unit length."""
        self.catch_up()
        state = self._state
        with self._writing, exclusive(self._folder / _LOCK_NAME, self._proceed):  # else a base might be removed meanwhile
            found = [problem for folder in folders(self._folder) for problem in damage(folder)]
        seen = [np.empty(0, np.int64)]
        for ids, vectors_ND in self._catalog.vectors(0, state.at.seq):
            there, copies_ND = state.lookup(ids)
            off = np.abs(np.linalg.norm(vectors_ND, axis=1) - 1) > 1e-3
            differs = there & (copies_ND != vectors_ND).any(axis=1)
            found += [f"item {i}: missing from the index" for i in ids[~there]]
            found += [f"item {i}: the index holds another vector" for i in ids[differs]]
            found += [f"item {i}: vector is not of unit length" for i in ids[off]]
            seen.append(ids)
        extra = np.setdiff1d(state.ids(), np.concatenate(seen))
        return found + [f"item {i}: in the index, not in the catalog" for i in extra]

    def _saved(self, work: Work) -> Path:
        state = self._state
        if state.base is None:
            return build(self._catalog, self._folder, self.limits, work, choose=False)
        return extend(state, work) if self.unsaved else state.base.folder

    def _renewed(self, work: Work) -> Path:
        state = self._state
        if state.base is None or state.worn:
            return self._rebuilt(work)
        return extend(state, work) if state.due else state.base.folder

    def _rebuilt(self, work: Work) -> Path:
        return build(self._catalog, self._folder, self.limits, work, choose=True)

    def _write(self, make: Callable[[Work], Path], threads: int) -> None:
        """Let `make` write a base, and search in that from now on. One at a time, over all processes."""
        work = Work(threads, self._proceed)
        if self._catalog.last_change().seq == 0:
            return  # there never was anything to write
        try:
            with self._writing, exclusive(self._folder / _LOCK_NAME, self._proceed):
                if (found := newest(self._folder, self._catalog)) is not None:  # another process may have been quicker
                    self._adopt(found)
                made = make(work)
                self._adopt(open_base(made, self._catalog))
                self._remove_all_but(made)
        except OSError as error:
            reason = error.strerror or error
            raise GalleryError(
                f"{self._folder}: not saved ({reason}); nothing is lost: the catalog has it all; free some space"
            ) from error

    def _adopt(self, base: Base) -> None:
        if self._state.base is not None and self._state.base.folder == base.folder:
            return
        state = State.of(base, self._catalog.facts.embedding_dim).caught_up(self._catalog).settled()
        with self._changing:
            self._state = state.caught_up(self._catalog)

    def _remove_all_but(self, kept: Path) -> None:
        """Others that still search in an old base keep their mapping of it."""
        for path in folders(self._folder):
            if path != kept:
                path.rename(path.with_name(f".{path.name}"))  # else whoever is killed leaves half a base
        for path in self._folder.glob(".base-*"):  # also what was left by the killed
            shutil.rmtree(path, ignore_errors=True)

    def _start_worker(self) -> None:
        with self._starting:
            busy = self._worker is not None and self._worker.is_alive()
            if not busy and not self._stopping.is_set() and time.monotonic() >= self._not_before:
                self._worker = threading.Thread(target=self._work, daemon=True, name="index")
                self._worker.start()

    def _work(self) -> None:
        try:
            self._write(self._renewed, threads=1)
        except _Stopped:
            log.info("%s: closed before a new base was written", self._folder)
        except Exception as error:  # whatever it is, searches go on with what there is
            log.warning("%s: no new base was written: %s", self._folder, error)
            self._not_before = time.monotonic() + _RETRY_S

    def _proceed(self) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except GalleryError as error:
            log.warning("%s", error)


def _cores() -> int:
    return os.cpu_count() or 1
