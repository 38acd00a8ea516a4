"""Run as a program by `serve.transfer.faiss_file`: reads an index of FAISS and writes its vectors to standard output.

First a line of JSON, {"count", "dim"} or {"error"}; then blocks: the number of rows, their ids, their vectors, little-endian.
It imports FAISS and numpy alone, and gives up what it does not need before it looks at the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist
from numpy.typing import NDArray

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_ROWS = 2048
_FLAT = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2)
Rows: TypeAlias = Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]


def give_up_rights(size: int) -> None:
    """Limits that a file of `size` bytes keeps if it is what it should be."""
    for name, most in (("vector_byte", size + 1), ("loop", size)):
        if set_limit := getattr(faiss, f"set_deserialization_{name}_limit", None):  # since 1.15
            set_limit(most)
    if resource is not None:
        for limit, most in (
            (resource.RLIMIT_FSIZE, 0),  # no file grows
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_AS, (4 << 30) + 3 * size),
            (resource.RLIMIT_CPU, 600 + size // 1_000_000),
        ):
            resource.setrlimit(limit, (most, most))


def rows_of(index: Any) -> Rows:  # noqa: ANN401
    """Ids and vectors. Raises: ValueError if the index holds anything but vectors as they were given."""
    index = faiss.downcast_index(index)
    if type(index) in (faiss.IndexIDMap, faiss.IndexIDMap2):
        id_map = faiss.vector_to_array(index.id_map)
        if len(id_map) != index.ntotal:
            raise ValueError(f"{len(id_map)} ids for {index.ntotal} vectors")
        return ((id_map[places], vectors) for places, vectors in rows_of(index.index))
    if type(index) is faiss.IndexIVFFlat:
        return _listed(index)
    storage = faiss.downcast_index(index.storage) if type(index) is faiss.IndexHNSWFlat else index
    if type(storage) not in _FLAT or storage.ntotal != index.ntotal:
        raise ValueError(f"{type(storage).__name__}: holds codes, of which vectors could only be approximations")
    return _in_order(storage)


def _in_order(index: Any) -> Rows:  # noqa: ANN401
    for start in range(0, index.ntotal, _ROWS):
        count = min(_ROWS, index.ntotal - start)
        yield np.arange(start, start + count), index.reconstruct_n(start, count)


def _listed(index: Any) -> Rows:  # noqa: ANN401
    for number in range(index.nlist):
        ids, codes = get_invlist(index.invlists, number)  # type: ignore[no-untyped-call]
        vectors = codes.view("<f4").reshape(len(ids), index.d)
        for start in range(0, len(ids), _ROWS):
            yield ids[start : start + _ROWS], vectors[start : start + _ROWS]


def main(path: str) -> None:
    """Write header and blocks to standard output."""
    out = sys.stdout.buffer
    try:
        give_up_rights(Path(path).stat().st_size)
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
        rows = rows_of(index)
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        reason = " ".join(str(error).split())[-300:]
        out.write(json.dumps({"error": reason}).encode() + b"\n")
        return
    out.write(json.dumps({"count": index.ntotal, "dim": index.d}).encode() + b"\n")
    for ids, vectors in rows:
        out.write(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + vectors.astype("<f4").tobytes())
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
