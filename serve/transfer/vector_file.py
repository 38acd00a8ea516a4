"""Files of vectors: .npy, Parquet, or an index of FAISS; told apart by their first bytes, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from serve.contract import METADATA_KEY, Manifest
from serve.errors import SourceError, first_line
from serve.transfer.faiss_file import KINDS, FaissRows, is_faiss

BLOCK_ROWS = 2048
_VECTOR_NAMES = ("vector", "embedding")


@dataclass(frozen=True)
class Block:
    """Some rows: vectors (n, D), their numbers (n,) in the file or the ids that it has for them, and what it says of them."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.floating]
    facts: pa.Table


@dataclass(frozen=True)
class VectorFile:
    """Rows of vectors; `blocks` reads them from the first on."""

    path: Path
    count: int
    dim: int
    blocks: Callable[[], Iterator[Block]]
    has_ids: bool = False
    """Whether the ids are the file's own."""
    manifest: Manifest | None = None
    """Of the encoder that made the vectors, if the file says."""


def open_vectors(path: Path) -> VectorFile:
    """Look at a file, or at a folder of Parquet files. Raises: SourceError."""
    if path.is_dir():
        return _open_parquet(path, sorted(path.glob("*.parquet")))
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read ({error.strerror}); --vectors wants .npy, .parquet or a FAISS index"
        ) from error
    if start.startswith(b"\x93NUMPY"):
        return _open_npy(path)
    if start.startswith(b"PAR1"):
        return _open_parquet(path, [path])
    if is_faiss(start):
        return _open_faiss(path)
    raise SourceError(f"{path}: no .npy, no Parquet, and none of FAISS's {', '.join(KINDS)}; save the vectors as one of these")


def _open_npy(path: Path) -> VectorFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not a readable .npy file ({error})") from error
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        raise SourceError(f"{path}: holds {array.dtype}{array.shape}, wanted float16, float32 or float64 of shape (N, D)")

    def blocks() -> Iterator[Block]:
        for start in range(0, len(array), BLOCK_ROWS):
            rows = np.asarray(array[start : start + BLOCK_ROWS])
            yield Block(np.arange(start, start + len(rows)), rows, pa.table({}))

    count, dim = array.shape
    return VectorFile(path, count, dim, blocks)


def _open_faiss(path: Path) -> VectorFile:
    rows = FaissRows(path)

    def blocks() -> Iterator[Block]:
        for ids, vectors_ND in rows:
            yield Block(ids, vectors_ND, pa.table({"id": ids}))

    return VectorFile(path, rows.count, rows.dim, blocks, has_ids=True)


def _open_parquet(path: Path, parts: Sequence[Path]) -> VectorFile:
    if not parts:
        raise SourceError(f"{path}: holds no .parquet files; --vectors wants .npy, .parquet, a FAISS index, or such a folder")
    try:
        footers = [pq.read_metadata(part) for part in parts]
        schema = footers[0].schema.to_arrow_schema()
        count = sum(footer.num_rows for footer in footers)
        column = _vector_column(path, schema)
        dim = _dim(parts[0], schema.field(column))
        manifests = {(footer.metadata or {}).get(METADATA_KEY.encode()) for footer in footers}
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    if len(manifests) > 1:
        raise SourceError(f"{path}: its files are of {len(manifests)} encoders; import them into galleries of their own")
    text = manifests.pop()
    manifest = None if text is None else Manifest.parse(text, str(path))
    return VectorFile(path, count, dim, lambda: _parquet_blocks(path, parts, column, dim), manifest=manifest)


def _vector_column(path: Path, schema: pa.Schema) -> str:
    """The one called vector or embedding, or else the only column of lists of floats."""
    lists = [field.name for field in schema if _is_vector(field.type)]
    named = [name for name in _VECTOR_NAMES if name in schema.names]
    found = [name for name in named or lists if name in lists]
    if not found:
        raise SourceError(f"{path}: no column of vectors among {schema.names}; wanted one of lists of floats")
    if len(found) > 1 and not named:
        raise SourceError(f"{path}: {' and '.join(found)} are columns of vectors; call the right one {_VECTOR_NAMES[0]}")
    return found[0]


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(test(kind) for test in lists) and pa.types.is_floating(kind.value_type)


def _dim(part: Path, field: pa.Field) -> int:
    if pa.types.is_fixed_size_list(field.type):
        return int(field.type.list_size)
    with pq.ParquetFile(part) as file:
        for batch in file.iter_batches(batch_size=1, columns=[field.name]):
            if (first := batch.column(0)[0].as_py()) is not None:
                return len(first)
    raise SourceError(f"{part}: {field.name} holds no vector, wanted lists of floats")


def _parquet_blocks(path: Path, parts: Sequence[Path], column: str, dim: int) -> Iterator[Block]:
    first = 0
    try:
        for part in parts:
            with pq.ParquetFile(part, page_checksum_verification=True) as file:
                for batch in file.iter_batches(BLOCK_ROWS):
                    table = pa.Table.from_batches([batch])
                    vectors_ND = _matrix(path, table[column], dim, first)
                    yield Block(np.arange(first, first + len(table)), vectors_ND, table.drop_columns([column]))
                    first += len(table)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _matrix(path: Path, column: pa.ChunkedArray, dim: int, first: int) -> NDArray[np.floating]:
    """A column of lists as an array (n, D)."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy()
    wrong = np.flatnonzero(lengths != dim)
    if len(wrong):
        length = lengths[wrong[0]]
        found = "no vector" if length < 0 else f"a vector of {length}"
        raise SourceError(f"{path}: row {first + wrong[0]} has {found}, wanted one of {dim} numbers; leave it out")
    values: NDArray[np.floating] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return values


def _unreadable(path: Path, error: Exception) -> SourceError:
    return SourceError(f"{path}: not a readable Parquet file ({first_line(error)})")
