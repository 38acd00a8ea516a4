"""CIFAR-10 and CIFAR-100 in their binary version: each row of a .bin file is one picture.

A row is one label byte (CIFAR-100: two, coarse and fine) and 3072 bytes, the 32 x 32 planes of red, green and blue
(www.cs.toronto.edu/~kriz/cifar.html). The Python version is refused: it would have to be unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from serve.errors import SourceError
from serve.formats.archives import read_range

_SIDE_PX = 32
_PIXELS = 3 * _SIDE_PX**2
_CIFAR10 = re.compile(r"(data_batch_\d+|test_batch)\.bin")
_CIFAR100 = re.compile(r"(train|test)\.bin")
_NAMES_10, _NAMES_100 = "batches.meta.txt", "fine_label_names.txt"
_PICKLED = ({"data_batch_1", "batches.meta"}, {"train", "test", "meta"})


def batch_files(members: Sequence[str]) -> list[str]:
    """The .bin files among `members` that hold CIFAR rows. Raises: SourceError if it is the pickled version."""
    folders: dict[PurePosixPath, set[str]] = {}
    for path in map(PurePosixPath, members):
        folders.setdefault(path.parent, set()).add(path.name)
    found = []
    for folder, names in folders.items():
        if _NAMES_10 in names or _NAMES_100 in names:
            grammar = _CIFAR10 if _NAMES_10 in names else _CIFAR100
            found += [str(folder / name) for name in names if grammar.fullmatch(name)]
        elif any(pickled <= names for pickled in _PICKLED):
            raise SourceError(
                f"{folder}: CIFAR's Python version is pickled, and nothing is unpickled here; "
                "download its binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz) and unpack it"
            )
    return sorted(found)


def batch_rows(batch: str, read: Callable[[str], bytes]) -> Iterator[tuple[str, str]]:
    """The rows of one .bin file: (row number, class name). `read` gives a file's bytes. Raises: SourceError, OSError."""
    path = PurePosixPath(batch)
    row_bytes = _row_bytes(batch)
    names_file = _NAMES_10 if _CIFAR10.fullmatch(path.name) else _NAMES_100
    names = read(str(path.with_name(names_file))).decode(errors="replace").split()
    data = read(batch)
    if not data or len(data) % row_bytes:
        raise SourceError(f"{batch}: {len(data):,} bytes are no whole rows of {row_bytes:,}; truncated? download it again")
    for row, label in enumerate(data[row_bytes - _PIXELS - 1 :: row_bytes]):  # the byte before the pixels
        if label >= len(names):
            raise SourceError(f"{batch}: row {row} has class {label}, {names_file} names {len(names)}; download it again")
        yield str(row), names[label]


def is_test(batch: str) -> bool:
    """Whether a .bin file belongs to the test set."""
    return PurePosixPath(batch).name.startswith("test")


def read_row(location: str, offset: int, size: int, batch: str, row: str) -> bytes:
    """One picture as a PPM file. The .bin file `batch` lies at `offset` of the file `location`, and has `size` bytes.

    Raises: KeyError if there is no such row, OSError.
    """
    row_bytes = _row_bytes(batch)
    if not row.isdecimal() or (int(row) + 1) * row_bytes > size:
        raise KeyError(row)
    pixels = read_range(location, offset + (int(row) + 1) * row_bytes - _PIXELS, _PIXELS)
    plane = _SIDE_PX**2
    interleaved = bytearray(len(pixels))
    for channel in range(3):
        interleaved[channel::3] = pixels[channel * plane : (channel + 1) * plane]
    return b"P6 %d %d 255\n" % (_SIDE_PX, _SIDE_PX) + interleaved


def _row_bytes(batch: str) -> int:
    return _PIXELS + (1 if _CIFAR10.fullmatch(PurePosixPath(batch).name) else 2)
