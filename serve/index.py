"""The fast copy of a gallery's vectors: FAISS, exact inner product of unit vectors (cosine), derived from the catalog.

The file ends in a trailer that names the last transaction it holds. Index and number are one file, so one rename moves
both, and a crash cannot part them. A file that is damaged, or of another history, is built anew from the catalog.
"""

from __future__ import annotations

import json
import logging
import threading
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.catalog import Catalog, Change
from serve.errors import GalleryError
from serve.files import atomic_path

# FAISS's type stubs miss what its Python layer adds: hence the "type: ignore" below.
log = logging.getLogger(__name__)

_TRAILER_BYTES = 256
_FORMAT = "simclr-index-1"


def unit_vectors(vectors: ArrayLike, dim: int, what: str = "vectors") -> NDArray[np.float32]:
    """L2-normalised copy, float32 (N, dim). Raises: GalleryError for another shape, NaN, infinity or a zero vector."""
    array = np.asarray(vectors)
    if array.ndim != 2 or array.shape[1] != dim or array.dtype.kind not in "fiu":
        raise GalleryError(
            f"{what}: got {array.dtype}{array.shape}, wanted numbers of shape (N, {dim}); was another encoder used?"
        )
    norms = np.sqrt(np.einsum("nd,nd->n", array, array, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise GalleryError(f"{what}: row {bad[0]} is zero, infinite or not a number, so it has no direction; leave it out")
    unit: NDArray[np.float32] = (array / norms[:, None]).astype(np.float32)
    return unit


class Index:
    """Exact search over the catalog's vectors. Safe from several threads: one at a time."""

    def __init__(self, catalog: Catalog, path: Path) -> None:
        """Load `path` if it can be trusted, else start empty; then replay what the catalog has beyond it."""
        self._catalog, self._path, self._lock = catalog, path, threading.RLock()
        self._clear()
        self._load()
        self.catch_up()

    def _clear(self) -> None:
        self._faiss: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(self._catalog.facts.embedding_dim))
        self._at, self._unsaved = Change(0, ""), 0

    def _load(self) -> None:
        if not self._path.exists():
            if len(self._catalog):
                log.info("%s: missing; built anew from the catalog", self._path)
            return
        try:
            change = _checked_change(self._path)
            if not self._catalog.has_change(change):
                raise ValueError("belongs to another gallery, or to another past of this one")
            self._faiss = faiss.read_index(str(self._path))
            self._at = change
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("%s: not usable (%s); built anew from the catalog", self._path, error)
            self._clear()

    def catch_up(self) -> None:
        """Replay the transactions that this index lacks, of this process or any other."""
        with self._lock:
            last = self._catalog.last_change()
            if last == self._at:
                return
            try:
                for ids, vectors in self._catalog.vectors(self._at.seq, last.seq):
                    self._faiss.add_with_ids(vectors, ids)
                    self._unsaved += len(ids)
                removed = self._catalog.removed(self._at.seq, last.seq)
                if len(removed):  # ids that came and went in between are not in the index: FAISS skips them
                    self._faiss.remove_ids(removed)
                    self._unsaved += len(removed)
            except BaseException:
                self._clear()  # half replayed; the next call starts from the beginning
                raise
            self._at = last

    def rebuild(self) -> None:
        """Forget everything and read the catalog from the beginning."""
        with self._lock:
            self._clear()
            self.catch_up()

    def search(
        self,
        query_D: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.int64] | None = None,
        excluded: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` nearest by inner product, exact also over the `allowed` ids; equal scores in the order of ids.

        Returns: scores (n,) falling and ids (n,), where n = min(k, items that may be found).
        """
        with self._lock:
            faiss.omp_set_num_threads(1)  # this thread's: one query is no work to share, and waiting for the others costs 100 x
            parameters = faiss.SearchParameters(sel=_selector(allowed, excluded))  # type: ignore[call-arg]
            scores, ids = self._faiss.search(query_D[None], max(1, min(k, self._faiss.ntotal)), params=parameters)
        found = ids[0] >= 0  # FAISS fills up with -1
        scores, ids = scores[0][found], ids[0][found]
        order = np.lexsort((ids, -scores))
        return scores[order], ids[order]

    def __len__(self) -> int:
        with self._lock:
            return int(self._faiss.ntotal)

    @property
    def unsaved(self) -> int:
        """How many additions and removals the file lacks."""
        return self._unsaved

    def problems(self) -> list[str]:
        """Where this copy differs from the catalog, and vectors that are not of unit length; the first few of each block."""
        found: list[str] = []
        with self._lock:
            self.catch_up()
            held = set(faiss.vector_to_array(self._faiss.id_map).tolist())
            for ids, vectors in self._catalog.vectors(0, self._at.seq):
                missing = ~np.isin(ids, list(held & set(ids.tolist())))
                copies = (
                    np.stack([self._faiss.reconstruct(int(i)) for i in ids[~missing]]) if not missing.all() else vectors[:0]
                )
                off = np.abs(np.linalg.norm(vectors, axis=1) - 1) > 1e-3
                differs = (copies != vectors[~missing]).any(axis=1)
                found += [f"item {i}: missing from the index" for i in ids[missing]]
                found += [f"item {i}: the index holds another vector" for i in ids[~missing][differs]]
                found += [f"item {i}: vector is not of unit length" for i in ids[off]]
                held -= set(ids.tolist())
        return found + [f"item {i}: in the index, not in the catalog" for i in sorted(held)]

    def save(self) -> None:
        """Write the file whole, with its trailer. Raises: GalleryError, and then the old file stays."""
        with self._lock:
            try:
                with atomic_path(self._path) as temporary, temporary.open("wb") as file:
                    _write(self._faiss, self._at, file)
            except OSError as error:
                raise GalleryError(
                    f"{self._path}: not saved ({error.strerror}); nothing is lost: the catalog has it all; free some space"
                ) from error
            self._unsaved = 0


def _selector(allowed: NDArray[np.int64] | None, excluded: NDArray[np.int64] | None) -> faiss.IDSelector | None:
    """FAISS's filter; None lets all through."""
    if allowed is not None:
        allowed = allowed if excluded is None else np.setdiff1d(allowed, excluded)
        bits = np.zeros(int(allowed.max(initial=0)) + 1, bool)
        bits[allowed] = True
        return faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))  # type: ignore[call-arg, arg-type]
    return None if excluded is None or not len(excluded) else faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded))


def _write(index: faiss.Index, change: Change, file: BinaryIO) -> None:
    checksum = 0

    def write(block: bytes) -> None:  # through Python: FAISS's own writer does not notice when the last block fails
        nonlocal checksum
        checksum = zlib.crc32(block, checksum)
        file.write(block)

    faiss.write_index(index, faiss.PyCallbackIOWriter(write))  # type: ignore[attr-defined]
    trailer = {"format": _FORMAT, "seq": change.seq, "stamp": change.stamp, "crc32": checksum}
    file.write(json.dumps(trailer).encode().ljust(_TRAILER_BYTES))
    file.flush()


def _checked_change(path: Path) -> Change:
    """The transaction a file holds, if its bytes are those once written. Raises: OSError, ValueError, KeyError, TypeError."""
    with path.open("rb") as file:
        left = file.seek(0, 2) - _TRAILER_BYTES
        if left <= 0:
            raise ValueError("truncated")
        file.seek(left)
        trailer = json.loads(file.read())
        file.seek(0)
        checksum = 0
        while block := file.read(min(left, 1 << 22)):
            checksum, left = zlib.crc32(block, checksum), left - len(block)
    if trailer["format"] != _FORMAT or trailer["crc32"] != checksum:
        raise ValueError("damaged")
    return Change(int(trailer["seq"]), str(trailer["stamp"]))
