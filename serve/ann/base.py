"""The index on disk: folders INDEX/base-<n>, each a picture of the catalog after one transaction that never changes.

A folder appears whole, is mapped into memory, and may be removed while others still search in it. index.json says what it holds
and guards it: by its own checksum, and by the sizes and checksums of the other files. Row i is item `ids[i]`; an id below 0
marks a row whose item is gone. Where search is exact there are neither cells nor index.faiss. Numbers are little-endian.
"""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from serve.ann.cells import Cells
from serve.ann.choice import IndexLimits, Report
from serve.ann.method import EXACT, Faiss, Method, set_effort
from serve.ann.segment import Segment
from serve.catalog import Catalog, Change

log = logging.getLogger(__name__)

FORMAT = "simclr-index-2"
HEADER_NAME, FAISS_NAME, PLOT_NAME = "index.json", "index.faiss", "report.png"
IDS_NAME, VECTORS_NAME, CELLS_NAME, CENTRES_NAME = "rows.ids", "rows.vectors", "rows.cells", "centres"
_PREFIX = "base-"
_QUICK_BYTES = 1 << 26
"""Opening checks the checksums of files up to this size, and the sizes of all; `damage` checks everything."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a base holds, and how to search it."""

    seq: int
    stamp: str
    count: int
    """Rows, with those whose items are gone."""
    dim: int
    chosen_at: int
    """Rows when the method was chosen."""
    outgrown: bool
    """Whether it is time to choose again."""
    limits: IndexLimits
    report: Report

    @property
    def change(self) -> Change:
        """The last transaction it holds."""
        return Change(self.seq, self.stamp)

    @property
    def method(self) -> Method:
        """How it is searched."""
        return self.report.chosen.method if self.report.chosen else Method()


_HEADER = TypeAdapter(Header)


@dataclass(frozen=True, eq=False)
class Base:
    """A base, mapped into memory."""

    folder: Path
    header: Header
    segment: Segment


def folders(index: Path) -> list[Path]:
    """The bases there are, the newest first."""
    found = [path for path in index.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix(_PREFIX)))


def next_folder(index: Path) -> Path:
    """The name of the next base."""
    newest = folders(index)
    return index / f"{_PREFIX}{1 + int(newest[0].name.removeprefix(_PREFIX)) if newest else 1:06}"


def newest(index: Path, catalog: Catalog) -> Base | None:
    """The newest base that can be trusted. Others are named in a warning."""
    for folder in (there := folders(index)):
        try:
            return open_base(folder, catalog)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
            if folders(index) != there:  # another process has just put a newer one in its place
                return newest(index, catalog)
            log.warning("%s: not usable (%s); built anew from the catalog", folder, error)
    return None


def open_base(folder: Path, catalog: Catalog) -> Base:
    """Map a base. Raises: OSError, ValueError, KeyError, TypeError, RuntimeError if it cannot be trusted."""
    header, files = _read_header(folder)
    facts = catalog.facts
    if header.dim != facts.embedding_dim or header.seq < facts.since or not catalog.has_change(header.change):
        raise ValueError("belongs to another gallery, or to another past of this one")
    for name, known in files.items():
        path = folder / name
        if path.stat().st_size != known["bytes"] or (known["bytes"] <= _QUICK_BYTES and _crc32(path) != known["crc32"]):
            raise ValueError(f"{name} is damaged")
    vectors_ND = mapped(folder, header.count, header.dim)
    index, cells = (None, None) if header.method.key == EXACT else _opened(folder, header)
    return Base(folder, header, Segment.of(np.fromfile(folder / IDS_NAME, "<i8"), vectors_ND, header.method, index, cells))


def mapped(folder: Path, count: int, dim: int) -> NDArray[np.float32]:
    """rows.vectors."""
    if not count:  # nothing cannot be mapped
        return np.empty((0, dim), np.float32)
    return np.asarray(np.memmap(folder / VECTORS_NAME, "<f4", "r", shape=(count, dim)))


def _opened(folder: Path, header: Header) -> tuple[Faiss, Cells]:
    index = faiss.read_index(str(folder / FAISS_NAME), faiss.IO_FLAG_MMAP_IFC)
    if index.ntotal != header.count:
        raise ValueError(f"{FAISS_NAME} has {index.ntotal} rows, wanted {header.count}")
    set_effort(index, header.method.effort)
    return index, read_cells(folder, header.dim)


def read_cells(folder: Path, dim: int) -> Cells:
    """centres and rows.cells."""
    return Cells(np.fromfile(folder / CENTRES_NAME, "<f4").reshape(-1, dim), np.fromfile(folder / CELLS_NAME, "<i4"))


def write_index(folder: Path, index: Faiss, cells: Cells) -> None:
    """index.faiss, centres and rows.cells. Raises: OSError."""
    with (folder / FAISS_NAME).open("wb") as file:  # through Python: FAISS's writer does not notice when the last block fails
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
    write_array(folder / CENTRES_NAME, cells.centres, "<f4")
    write_array(folder / CELLS_NAME, cells.of_rows, "<i4")


def write_array(path: Path, array: NDArray[np.generic], kind: str) -> None:
    """Numbers and nothing else. Raises: OSError."""
    path.write_bytes(array.astype(kind).tobytes())


def write_header(folder: Path, header: Header) -> None:
    """The last step of writing a base: its header, with the checksums of all that is there."""
    files = {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "header": _HEADER.dump_python(header, mode="json"), "files": files}
    text = json.dumps(content, indent=1)
    (folder / HEADER_NAME).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}, indent=1))


def _read_header(folder: Path) -> tuple[Header, dict[str, dict[str, int]]]:
    whole = json.loads((folder / HEADER_NAME).read_bytes())
    content = whole["content"]
    if zlib.crc32(json.dumps(content, indent=1).encode()) != whole["crc32"] or content["format"] != FORMAT:
        raise ValueError(f"{HEADER_NAME} is damaged")
    return _HEADER.validate_python(content["header"]), content["files"]


def damage(folder: Path) -> list[str]:
    """Which files of a base are not what was written."""
    try:
        _, files = _read_header(folder)
        return [
            f"{folder / name}: changed on the disk" for name, known in files.items() if _crc32(folder / name) != known["crc32"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder}: {error}"]


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
