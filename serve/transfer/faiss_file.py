"""The vectors of a FAISS index that a user hands over, read in a process that has little to lose.

FAISS checks much of what it reads, and makes no promise about files made to harm. So its kind is looked at first, and a process
of its own reads it, with limits on memory, time and writing; what that sends is numbers, and is checked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.errors import SourceError

KINDS = {"IndexFlat": (b"IxFI", b"IxF2", b"IxFl"), "IndexHNSWFlat": (b"IHNf",), "IndexIVFFlat": (b"IwFl",)}
"""Those that hold the vectors as they were given, by a file's first bytes. Others hold codes, which give approximations."""
_ID_MAPS, _HEADER_BYTES = (b"IxMp", b"IxM2"), 37
_READER = Path(__file__).with_name("faiss_reader.py")
_MOST_ROWS = 1 << 16


def is_faiss(start: bytes) -> bool:
    """Whether a file that begins so is an index of a kind that can be read, or a map of ids over one."""
    if start.startswith(_ID_MAPS):
        start = start[_HEADER_BYTES:]
    return any(start.startswith(magic) for kinds in KINDS.values() for magic in kinds)


class FaissRows:
    """Iterates over ids (n,) and vectors (n, D), once and from the first on each time."""

    def __init__(self, path: Path) -> None:
        """Raises: SourceError."""
        self._path = path
        with _reading(path) as process:
            self.count, self.dim = self._header(process)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        with _reading(self._path) as process:
            self._header(process)
            left = self.count
            while left:
                rows = int.from_bytes(self._read(process, 8), "little")
                if not 0 < rows <= min(left, _MOST_ROWS):
                    raise self._failure(process)
                ids = np.frombuffer(self._read(process, 8 * rows), "<i8")
                yield ids, np.frombuffer(self._read(process, 4 * rows * self.dim), "<f4").reshape(rows, self.dim)
                left -= rows

    def _header(self, process: subprocess.Popen[bytes]) -> tuple[int, int]:
        """Number of vectors and their dimension; the file cannot be smaller than these."""
        assert process.stdout is not None
        try:
            header = json.loads(process.stdout.readline(2000))
            if "error" in header:
                raise self._failure(process, header["error"])
            count, dim = int(header["count"]), int(header["dim"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._failure(process) from error
        if count <= 0 or dim <= 0 or 4 * count * dim > self._path.stat().st_size:
            raise SourceError(f"{self._path}: says that it holds {count} vectors of {dim} numbers, which its size denies")
        return count, dim

    def _read(self, process: subprocess.Popen[bytes], size: int) -> bytes:
        assert process.stdout is not None
        data = process.stdout.read(size)
        if len(data) < size:
            raise self._failure(process)
        return data

    def _failure(self, process: subprocess.Popen[bytes], reason: str = "") -> SourceError:
        process.kill()
        ended = process.wait()
        reason = reason or f"its reader ended with {signal.Signals(-ended).name if ended < 0 else ended}"
        return SourceError(f"{self._path}: cannot be read as a FAISS index ({reason}); is it whole?")


@contextmanager
def _reading(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that reads; killed at the end, whatever it does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(_READER), str(path.absolute())]  # -P: nothing beside the script is imported
    silent, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=silent, stdout=pipe, stderr=silent) as process:
        try:
            yield process
        finally:
            process.kill()
