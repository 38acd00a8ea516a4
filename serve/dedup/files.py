"""What the files of pictures tell: their size, and digests that say which are the same. Read only where something is near."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.errors import GalleryError
from serve.preprocess import decode, header_size
from serve.samples import Unreadable
from serve.sources import read_as

if TYPE_CHECKING:  # training takes its digests from here, and needs no gallery
    from serve.gallery import Gallery

Kind: TypeAlias = Literal["file", "pixels", "near"]
"""Byte for byte the same file, the same pixels in another file, or only near."""
_BLOCK_ROWS = 1024
_FACTS = np.dtype([("pixels", np.int64), ("bytes", np.int64), ("file", np.uint64), ("content", np.uint64)])
"""Width x height, size of the file, digests of it and of its pixels. 0 where it was not read, or cannot be."""


def digest(data: bytes | memoryview) -> int:
    """64 bits: among a million different pictures two agree by chance once in 37 million times."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True, eq=False)
class Files:
    """Of items (N,), by row: 32 bytes each."""

    facts: NDArray[np.void]
    unreadable: dict[int, Unreadable]
    """Row -> why."""

    @classmethod
    def none_of(cls, count: int) -> Self:
        """Nothing is read yet."""
        return cls(np.zeros(count, _FACTS), {})

    def read(self, gallery: Gallery, ids: NDArray[np.int64], rows: NDArray[np.int64], *, decoded: NDArray[np.bool_]) -> None:
        """Read the files of some rows (n,) of `ids` (N,); decode those that are `decoded` (N,)."""
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(rows), desc="reading", unit="img", delay=1, leave=False, dynamic_ncols=True) as bar,
        ):
            for start in range(0, len(rows), _BLOCK_ROWS):
                block = rows[start : start + _BLOCK_ROWS].tolist()
                looked = pool.map(lambda row: _look(gallery, int(ids[row]), decoded=bool(decoded[row])), block)
                for row, found in zip(block, looked, strict=True):
                    if isinstance(found, Unreadable):
                        self.unreadable[row] = found
                    else:
                        self.facts[row] = found
                    bar.update()

    def best_first(self, rows: NDArray[np.int64], labelled: NDArray[np.bool_]) -> NDArray[np.int64]:
        """These rows (n,), best first: most pixels, then largest file, `labelled` (N,), oldest; unreadable ones come last."""
        facts = self.facts[rows]
        return rows[np.lexsort((rows, ~labelled[rows], -facts["bytes"], -facts["pixels"]))]

    def equal(self, row: int, others: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the others (n,) are the same file, or show the same pixels."""
        return self._same("file", row, others) | self._same("content", row, others)

    def kind(self, row: int, other: int) -> Kind:
        """What two near rows have in common."""
        if self._same("file", row, other):
            return "file"
        return "pixels" if self._same("content", row, other) else "near"

    def _same(self, what: str, row: int, others: NDArray[np.int64] | int) -> NDArray[np.bool_]:
        known = self.facts[what]
        return np.asarray((known[others] == known[row]) & (known[row] != 0))


def _look(gallery: Gallery, item_id: int, *, decoded: bool) -> tuple[int, int, int, int] | Unreadable:
    try:
        item = gallery.item(item_id)
    except GalleryError as error:  # removed meanwhile
        return Unreadable(f"item {item_id}", str(error))
    return read_as(item.source, partial(_facts, decoded=decoded))


def _facts(data: bytes, *, decoded: bool) -> tuple[int, int, int, int]:
    """Raises: ImageError."""
    width, height = header_size(data)
    if not decoded:
        return width * height, len(data), digest(data), 0
    image = decode(data)
    return width * height, len(data), digest(data), digest(b"%d x %d:" % image.size + image.tobytes())
