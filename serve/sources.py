"""Where pictures come from: a folder, a CSV, a .zip or .tar read in place, a Market-1501 root.

One rule set reads all of them: the layout is recognised from the members' relative paths. A picture is named by its
`source`, a path or `archive.zip!/member`, which `read_bytes` opens again later (thumbnails, re-embedding).
"""

from __future__ import annotations

import csv
import math
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from serve.contract import Preprocess
from serve.errors import SourceError
from serve.preprocess import ImageError, load_image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)(?:s(\d+)_(\d+))?")
_MARKET_STRICT = re.compile(r"-?\d+_c\d+s\d+_\d+_\d+\.\w+$")
JUNK_IDENTITY = "-1"
"""Market-1501's mark for boxes that count neither as right nor as wrong."""
_MEMBER = re.compile(r"(?<=\.zip|\.tar)!/", re.IGNORECASE)  # a folder may be called `wow!`
_TRAIN_FOLDERS, _TEST_FOLDERS = ("train",), ("test", "val")


@dataclass(frozen=True)
class Sample:
    """One picture and what is known about it. `time` is in seconds; in the Market-1501 family it is the frame number."""

    source: str
    label: str | None = None
    identity: str | None = None
    camera: str | None = None
    time: float | None = None

    @property
    def group(self) -> str | None:
        """What evaluation counts as right: the class, or else the identity."""
        return self.label if self.label is not None else self.identity


@dataclass(frozen=True)
class ImageSet:
    """A source by the roles of its pictures, each sorted. `test` and `query`/`gallery` are empty where it has none."""

    train: tuple[Sample, ...] = ()
    test: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()

    @property
    def everything(self) -> tuple[Sample, ...]:
        """All pictures, in the order train, test, query, gallery."""
        return self.train + self.test + self.query + self.gallery


@dataclass(frozen=True)
class Unreadable:
    """A picture that was left out, and why: one line that names it."""

    source: str
    reason: str


def open_source(source: str | Path) -> ImageSet:
    """List the pictures of a folder, CSV, .zip, .tar (or `archive!/folder`). Raises: SourceError if there are none."""
    text = str(source)
    location, inner = _split(text)
    path = Path(location).absolute()  # sources are kept in galleries, which outlive the working folder
    if not text or not path.exists():  # no text at all would be the working folder
        raise SourceError(f"{location or 'no name given'}: no such file or folder; --images wants a folder, .csv, .zip or .tar")
    if path.is_dir():
        images = _by_layout(_folder_members(path), lambda member: str(path / member))
    elif path.suffix.lower() == ".csv":
        images = ImageSet(train=tuple(_csv_samples(path)))
    elif path.suffix.lower() in (".zip", ".tar"):
        prefix = f"{inner.strip('/')}/" if inner else ""
        members = [name.removeprefix(prefix) for name in _archive_members(path) if name.startswith(prefix)]
        images = _by_layout(members, lambda member: f"{path}!/{prefix}{member}")
    else:
        raise SourceError(f"{text}: wanted a folder, .csv, .zip or .tar; pack or unpack it as one of these")
    if not images.everything:
        raise SourceError(
            f"{text}: holds no pictures (looked for {', '.join(sorted(IMAGE_SUFFIXES))}); is it the right folder?"
        )
    return images


def read_bytes(source: str) -> bytes:
    """The encoded bytes of one picture. Raises: SourceError."""
    location, member = _split(source)
    try:
        if not member:
            return Path(source).read_bytes()
        modified_ns = Path(location).stat().st_mtime_ns
        if location.lower().endswith(".zip"):
            return _open_zip(location, modified_ns).read(member)
        offset, size = _tar_index(location, modified_ns)[member]
        with Path(location).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except KeyError as error:
        raise SourceError(f"{source}: cannot be read (the archive has no such member)") from error
    except Exception as error:  # zipfile and its codecs raise a dozen unrelated types: encrypted, damaged, unknown method
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceError(f"{source}: cannot be read ({reason})") from error


def read_batches(
    samples: Sequence[Sample], preprocess: Preprocess, batch_size: int = 256
) -> Iterator[tuple[list[Sample], NDArray[np.uint8], list[Unreadable]]]:
    """Decode pictures on all cores, in order.

    Yields: the samples that could be read, their pixels uint8 (n, height_px, width_px, 3), and those left out.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock while it decodes
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            results = list(pool.map(partial(_read_one, preprocess=preprocess), chunk))
            good = [
                (sample, pixels) for sample, pixels in zip(chunk, results, strict=True) if not isinstance(pixels, Unreadable)
            ]
            shape = (0, preprocess.height_px, preprocess.width_px, 3)
            stacked = np.stack([pixels for _, pixels in good]) if good else np.empty(shape, np.uint8)
            yield [sample for sample, _ in good], stacked, [result for result in results if isinstance(result, Unreadable)]


def printable(source: str) -> str:
    """A name as text; other than the name itself where that holds bytes that are no UTF-8.

    Python reads such bytes as lone surrogates, which neither SQLite nor Parquet can keep.
    """
    return source.encode("utf-8", "backslashreplace").decode()


def name_fault(source: str) -> str | None:
    """Why a picture of this name is left out, in one line; None if nothing is wrong with it."""
    shown = printable(source)
    return None if shown == source else f"{shown}: its name is not UTF-8; rename it"


def _read_one(sample: Sample, preprocess: Preprocess) -> NDArray[np.uint8] | Unreadable:
    try:
        return load_image(read_bytes(sample.source), preprocess)
    except SourceError as error:
        return Unreadable(sample.source, str(error))
    except ImageError as error:  # it was given bytes, and so calls them "image"
        return Unreadable(sample.source, f"{sample.source}{str(error).removeprefix('image')}")


def _split(source: str) -> tuple[str, str]:
    """`archive.zip!/member` -> archive.zip, member; any other path -> itself, nothing."""
    location, *members = _MEMBER.split(source, maxsplit=1)
    return location, "".join(members)


def _folder_members(root: Path) -> list[str]:
    return [Path(folder, name).relative_to(root).as_posix() for folder, _, names in os.walk(root) for name in names]


def _archive_members(path: Path) -> list[str]:
    try:
        modified_ns = path.stat().st_mtime_ns
        if path.suffix.lower() == ".zip":
            return [name for name in _open_zip(str(path), modified_ns).namelist() if not name.endswith("/")]  # no folders
        return list(_tar_index(str(path), modified_ns))
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise SourceError(f"{path}: not a readable archive ({error}); compressed .tar files must be unpacked") from error


@lru_cache(maxsize=8)
def _open_zip(location: str, _modified_ns: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(location)


@lru_cache(maxsize=8)
def _tar_index(location: str, _modified_ns: int) -> dict[str, tuple[int, int]]:
    with tarfile.open(location, "r:") as archive:
        members = [member for member in archive if member.isfile()]
    return {member.name.removeprefix("./"): (member.offset_data, member.size) for member in members}  # ./: tar -C folder .


def _by_layout(members: list[str], name: Callable[[str], str]) -> ImageSet:
    pictures = sorted(member for member in members if _is_picture(member))
    shift = _shared_folder(pictures)
    roles: dict[str, list[Sample]] = {"train": [], "test": [], "query": [], "gallery": []}
    tops = {member[shift:].split("/")[0] for member in pictures}
    market = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
    if tops & {"bounding_box_train", "bounding_box_test"}:
        for member in pictures:
            if role := market.get(member[shift:].split("/")[0]):
                roles[role] += _market_sample(name(member), member)
        return _image_set(roles)
    split = bool(tops & set(_TRAIN_FOLDERS)) and bool(tops & set(_TEST_FOLDERS))
    looks_like_market = all(_MARKET_STRICT.match(PurePosixPath(member).name) for member in pictures)
    for member in pictures:
        *folders, _file = member[shift:].split("/")
        role = "train"
        if split:
            top = folders.pop(0) if folders else ""
            role = "test" if top in _TEST_FOLDERS else "train"
        if looks_like_market:
            roles[role] += _market_sample(name(member), member)
        else:
            roles[role].append(Sample(name(member), label=folders[0] if folders else None))
    return _image_set(roles)


def _image_set(roles: dict[str, list[Sample]]) -> ImageSet:
    return ImageSet(**{role: tuple(samples) for role, samples in roles.items()})


def _is_picture(member: str) -> bool:
    parts = PurePosixPath(member).parts
    return PurePosixPath(member).suffix.lower() in IMAGE_SUFFIXES and not any(
        part.startswith((".", "__MACOSX")) for part in parts
    )


def _shared_folder(members: list[str]) -> int:
    """Length of the path that all members share: archives often wrap everything in one folder."""
    if not members:
        return 0
    first, last = (member.split("/")[:-1] for member in (members[0], members[-1]))  # sorted: what these share, all share
    shared = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return sum(len(part) + 1 for part in shared)


def _market_sample(source: str, member: str) -> list[Sample]:
    """Zero or one sample: a name outside the grammar is left out. Matched on the file name, never on the folders."""
    match = MARKET_NAME.match(PurePosixPath(member).name)
    if match is None:
        return []
    identity, camera, _sequence, frame = match.groups()
    return [Sample(source, identity=identity, camera=str(int(camera)), time=float(frame) if frame else None)]


def _csv_samples(path: Path) -> Iterator[Sample]:
    try:
        yield from _csv_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: not a CSV file in UTF-8 ({error}); save it as one") from error


def _csv_rows(path: Path) -> Iterator[Sample]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        known = {"path", "label", "identity", "camera", "time"}
        if "path" not in columns or columns - known:
            raise SourceError(f"{path}: columns are {sorted(columns)}, wanted path and any of {sorted(known - {'path'})}")
        for line, row in enumerate(reader, start=2):
            try:
                filled = {key: value for key, value in row.items() if value}
                time = _seconds(filled.pop("time")) if "time" in filled else None
                yield Sample(source=str(path.parent / filled.pop("path")), time=time, **filled)
            except (KeyError, ValueError, TypeError) as error:
                raise SourceError(f"{path}, line {line}: {row} is not path[,label,identity,camera,time] ({error})") from error


def _seconds(text: str) -> float:
    """A number, or an ISO 8601 time (UTC where it names no zone) in Unix seconds. Raises: ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):  # could be neither stored nor compared
        raise ValueError(f"time is {text}, wanted seconds or an ISO 8601 time")
    return seconds
