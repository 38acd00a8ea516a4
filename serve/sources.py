"""Where pictures come from: a folder, a CSV or Parquet list, a .zip or .tar read in place, shards, a CIFAR or re-ID set's root.

One rule set reads all of them: the layout is recognised from the members' relative paths. A picture is named by its
`source`, a path, `archive.zip!/member` or `batch.bin!/row`, which `read_bytes` opens again later (thumbnails, re-embedding).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from serve.contract import Preprocess
from serve.datasets.known import recognise, split_choice
from serve.datasets.market import MARKET_NAME, WHOLE_NAME
from serve.datasets.tree import IMAGE_SUFFIXES, Tree, sample_named
from serve.errors import SourceError
from serve.formats import archives, cifar, shards
from serve.formats.listing import list_files
from serve.formats.picture_list import listed_samples
from serve.preprocess import TRAITS, ImageError, decode, load_image
from serve.samples import ImageSet, Sample, Unreadable, stated_sample

_MEMBER = re.compile(r"(?<=\.zip|\.tar|\.bin)!/", re.IGNORECASE)  # a folder may be called `wow!`
_ROLES = ("train", "test", "query", "gallery")
_TRAIN_FOLDERS, _TEST_FOLDERS = ("train",), ("test", "val")
_log = logging.getLogger(__name__)
_Read = TypeVar("_Read")
_UnderWay: TypeAlias = list[tuple[Sample, list[str], Future[NDArray[np.uint8] | Unreadable]]]
"""A batch that is being decoded: of each picture the traits that are noted, and its pixels to come."""
_WANTED = "a folder, .csv, .parquet, .zip or .tar"
_SHARD_WORD = re.compile(r"[-_.]")


def open_source(source: str | Path) -> ImageSet:
    """List the pictures of a folder, .csv, .parquet, .zip, .tar (or `archive!/folder`), or shards like `train-{000..127}.tar`.

    A list of a known data set in place of its root says which part of it is meant. Raises: SourceError if there are none.
    """
    images = _open(str(source))
    if not images.everything:
        raise SourceError(
            f"{source}: holds no pictures (looked for {', '.join(sorted(IMAGE_SUFFIXES))}); is it the right folder?"
        )
    return images


def read_bytes(source: str) -> bytes:
    """The encoded bytes of one picture. Raises: SourceError."""
    location, member = _split(source)
    try:
        if not member:
            return Path(source).read_bytes()
        if location.lower().endswith(".bin"):
            return cifar.read_row(location, 0, Path(location).stat().st_size, location, member)
        batch, row = _split(member)
        if row:
            return cifar.read_row(location, *archives.tar_place(location, batch), batch, row)
        return archives.read_member(location, member)
    except KeyError as error:
        raise SourceError(f"{source}: cannot be read (the archive has no such member)") from error
    except Exception as error:  # zipfile and its codecs raise a dozen unrelated types: encrypted, damaged, unknown method
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SourceError(f"{source}: cannot be read ({reason})") from error


def read_batches(
    samples: Sequence[Sample], preprocess: Preprocess, batch_size: int = 256, traits: Counter[str] | None = None
) -> Iterator[tuple[list[Sample], NDArray[np.uint8], list[Unreadable]]]:
    """Decode pictures on all cores, in order; while one batch is used, the next is decoded.

    `traits` counts the pictures that are grey, 16-bit and so on (TRAITS).
    Yields: the samples that could be read, their pixels uint8 (n, height_px, width_px, 3), and those left out.
    """
    read = partial(_read_one, preprocess=preprocess)
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow releases the interpreter lock while it decodes
    under_way: deque[_UnderWay] = deque()
    try:
        for start in range(0, len(samples), batch_size):
            chunk = [(sample, list[str]()) for sample in samples[start : start + batch_size]]
            under_way.append([(sample, noted, pool.submit(read, sample, noted)) for sample, noted in chunk])
            if len(under_way) > 1:
                yield _decoded(under_way.popleft(), preprocess, traits)
        if under_way:
            yield _decoded(under_way.popleft(), preprocess, traits)
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(
    batch: _UnderWay, preprocess: Preprocess, traits: Counter[str] | None
) -> tuple[list[Sample], NDArray[np.uint8], list[Unreadable]]:
    results = [(sample, noted, future.result()) for sample, noted, future in batch]
    if traits is not None:
        traits.update(trait for _, noted, _ in results for trait in noted)
    good = [(sample, pixels) for sample, _, pixels in results if not isinstance(pixels, Unreadable)]
    shape = (0, preprocess.height_px, preprocess.width_px, 3)
    stacked = np.stack([pixels for _, pixels in good]) if good else np.empty(shape, np.uint8)
    return [sample for sample, _ in good], stacked, [pixels for *_, pixels in results if isinstance(pixels, Unreadable)]


def read_picture(source: str, traits: list[str] | None = None) -> Image.Image | Unreadable:
    """One picture as `serve.preprocess.decode` gives it, or why it is left out. `traits` gains those that it has."""
    return read_as(source, partial(decode, traits=traits))


def read_as(source: str, read: Callable[[bytes], _Read]) -> _Read | Unreadable:
    """What `read` makes of the bytes of one picture, or why it is left out: what `read` raises as ImageError counts as that."""
    try:
        return read(read_bytes(source))
    except SourceError as error:
        return Unreadable(source, str(error))
    except ImageError as error:  # it was given bytes, and so calls them "image"
        return Unreadable(source, f"{source}{str(error).removeprefix('image')}")


def describe_traits(traits: Mapping[str, int]) -> str:
    """What `read_batches` counted, as part of a sentence; empty if nothing stood out."""
    notes = {
        "16-bit": "16-bit (scaled to 8)",
        "animated": "animated (first frame used)",
        "EXIF-rotated": "EXIF-rotated (turned upright)",
    }
    return ", ".join(f"{traits[trait]:,} {notes.get(trait, trait)}" for trait in TRAITS if traits.get(trait))


def printable(source: str) -> str:
    """A name as text; other than the name itself where that holds bytes that are no UTF-8.

    Python reads such bytes as lone surrogates, which neither SQLite nor Parquet can keep.
    """
    return source.encode("utf-8", "backslashreplace").decode()


def name_fault(source: str) -> str | None:
    """Why a picture of this name is left out, in one line; None if nothing is wrong with it."""
    shown = printable(source)
    return None if shown == source else f"{shown}: its name is not UTF-8; rename it"


def misnamed(samples: Iterable[Sample]) -> list[Unreadable]:
    """Those of these pictures that are left out for their names."""
    return [Unreadable(printable(s.source), fault) for s in samples if (fault := name_fault(s.source)) is not None]


def _read_one(sample: Sample, traits: list[str], preprocess: Preprocess) -> NDArray[np.uint8] | Unreadable:
    return read_as(sample.source, partial(load_image, preprocess=preprocess, traits=traits))


def _split(source: str) -> tuple[str, str]:
    """`archive.zip!/member` -> archive.zip, member; any other path -> itself, nothing."""
    location, *members = _MEMBER.split(source, maxsplit=1)
    return location, "".join(members)


def _open(text: str) -> ImageSet:
    if paths := shards.expand_braces(text):
        return _from_shards(paths)
    root, choice = split_choice(text)
    location, inner = _split(root)
    path = Path(location).absolute()  # sources are kept in galleries, which outlive the working folder
    if not text or not path.exists():  # no text at all would be the working folder
        raise SourceError(f"{location or 'no name given'}: no such file or folder; --images wants {_WANTED}")
    if path.is_dir():
        return _from_folder(path, choice)
    if path.suffix.lower() in (".csv", ".parquet"):
        return ImageSet(train=tuple(listed_samples(path)))
    if path.suffix.lower() in (".zip", ".tar"):
        return _from_archive(path, f"{inner.strip('/')}/" if inner else "", choice)
    raise SourceError(f"{text}: wanted {_WANTED}; pack or unpack it as one of these")


def _from_folder(path: Path, choice: str) -> ImageSet:
    try:
        members = list_files(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed ({error.strerror})") from error
    tree = Tree(members, lambda member: str(path / member), lambda member: read_bytes(str(path / member)), choice)
    if images := _by_layout(tree):
        return images
    if batches := cifar.batch_files(members):
        return _from_cifar([str(path / batch) for batch in batches])
    return _from_shards([path / member for member in members if member.lower().endswith(".tar")])


def _from_archive(path: Path, prefix: str = "", choice: str = "") -> ImageSet:
    members = sorted(name.removeprefix(prefix) for name in archives.member_names(path) if name.startswith(prefix))
    base = f"{path}!/{prefix}"
    tree = Tree(members, lambda member: f"{base}{member}", lambda member: read_bytes(f"{base}{member}"), choice)
    if path.suffix.lower() == ".tar":
        if not tree.pictures and (batches := cifar.batch_files(members)):
            return _from_cifar([f"{base}{batch}" for batch in batches])
        if facts := shards.pictures_with_facts(path, [f"{prefix}{picture}" for picture in tree.pictures]):
            return _labelled({f"{path}!/{picture}": known for picture, known in facts.items()}, base)
    return _by_layout(tree) or ImageSet()


def _labelled(facts: Mapping[str, Mapping[str, str]], prefix: str) -> ImageSet:
    """Pictures with sidecars: the roles are the folders', the rest is what the sidecars say, by source."""
    members = [source.removeprefix(prefix) for source in facts]
    images = _by_layout(Tree(members, lambda member: f"{prefix}{member}", read_bytes)) or ImageSet()
    roles = {role: getattr(images, role) for role in _ROLES}
    return _image_set(
        {role: [_shard_sample(old.source, facts[old.source]) for old in samples] for role, samples in roles.items()}
    )


def _from_shards(paths: Sequence[Path]) -> ImageSet:
    """All pictures of several .tar files; a split where some, or their folders, are called train and others test or val."""
    words = [(_SHARD_WORD.split(path.name.lower())[0], path.parent.name.lower()) for path in paths]
    tops = [next((word for word in pair if word in _TRAIN_FOLDERS + _TEST_FOLDERS), "") for pair in words]
    split = bool(set(tops) & set(_TRAIN_FOLDERS)) and bool(set(tops) & set(_TEST_FOLDERS))
    roles: dict[str, list[Sample]] = {role: [] for role in _ROLES}
    with tqdm(paths, desc="indexing", unit=" shards", delay=1, leave=False, dynamic_ncols=True) as bar:
        for path, top in zip(bar, tops, strict=True):
            images = _from_archive(path)
            if not images.everything:
                _log.warning("%s: holds no pictures", path)
            roles["test" if split and top in _TEST_FOLDERS else "train"] += images.train
            for role in ("test", "query", "gallery"):
                roles[role] += getattr(images, role)
    return _image_set(roles)


def _from_cifar(batches: Sequence[str]) -> ImageSet:
    """Every row of these .bin files, named in full."""
    roles: dict[str, list[Sample]] = {"train": [], "test": []}
    for batch in batches:
        role = "test" if cifar.is_test(batch) else "train"
        roles[role] += [Sample(f"{batch}!/{row}", label=label) for row, label in cifar.batch_rows(batch, read_bytes)]
    return _image_set(roles)


def _by_layout(tree: Tree) -> ImageSet | None:
    """A known data set, or else what the folders say; None without pictures. Raises: SourceError."""
    return recognise(tree) or (_by_folders(tree) if tree.pictures else None)


def _by_folders(tree: Tree) -> ImageSet:
    """Folders are classes; a split where there are `train` and `test` or `val`. Names of Market-1501 tell more than folders."""
    shift = len(tree.wrapping)
    tops = {member[shift:].split("/")[0] for member in tree.pictures}
    split = bool(tops & set(_TRAIN_FOLDERS)) and bool(tops & set(_TEST_FOLDERS))
    looks_like_market = all(WHOLE_NAME.match(member.rpartition("/")[2]) for member in tree.pictures)
    roles: dict[str, list[Sample]] = {"train": [], "test": []}
    for member in tree.pictures:
        *folders, file = member[shift:].split("/")
        role = "train"
        if split:
            top = folders.pop(0) if folders else ""
            role = "test" if top in _TEST_FOLDERS else "train"
        if looks_like_market and (match := MARKET_NAME.match(file)):
            roles[role].append(sample_named(tree.source(member), match))
        else:
            roles[role].append(Sample(tree.source(member), label=folders[0] if folders else None))
    return _image_set(roles)


def _image_set(roles: Mapping[str, Sequence[Sample]]) -> ImageSet:
    train, test, query, gallery = (tuple(roles.get(role, ())) for role in _ROLES)
    return ImageSet(train, test, query, gallery)


def _shard_sample(source: str, facts: Mapping[str, str]) -> Sample:
    try:
        return stated_sample(source, facts)
    except ValueError as error:
        raise SourceError(f"{source}: its .json says {error}") from error
