"""MARS: tracklets of the people of Market-1501, frames as `0001C1T0001F001.jpg`.

A row of `tracks_*_info.mat` is a tracklet: first and last line of the list of names, person, camera. `query_IDX.mat` names the
rows of the test set that are queries; all others are gallery. -1 is junk, 0 a distractor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from serve.datasets.mat import variables, whole_numbers
from serve.datasets.tree import Tree
from serve.errors import SourceError
from serve.samples import JUNK_IDENTITY, ImageSet, Sample

_NAME = re.compile(r"(\d{4}|00-1)C(\d)T\d+F(\d+)")
_TEST = "tracks_test_info.mat"


def read(tree: Tree) -> ImageSet | None:
    """bbox_train, bbox_test, and the lists, which are in `info` or in the root. Raises: SourceError."""
    root = tree.find(f"info/{_TEST}", _TEST)
    if root is None:
        return None
    lists = f"{root}info/" if tree.has(f"{root}info/{_TEST}") else root
    train: tuple[Sample, ...] = ()
    if tree.has(f"{lists}tracks_train_info.mat"):
        rows = _table(tree, f"{lists}tracks_train_info.mat", "track_train_info")
        train = tuple(_frames(tree, lists, f"{root}bbox_train", rows, range(len(rows))))
    rows = _table(tree, f"{lists}{_TEST}", "track_test_info")
    (asked,) = variables(tree, f"{lists}query_IDX.mat", "query_IDX")
    queries = set((whole_numbers(asked, f"{tree.source(lists)}query_IDX.mat") - 1).tolist())
    if not queries <= set(range(len(rows))):
        raise SourceError(f"{tree.source(lists)}query_IDX.mat: points beyond the {len(rows):,} tracklets; download it again")
    others = [row for row in range(len(rows)) if row not in queries]
    return ImageSet(
        train=train,
        query=tuple(_frames(tree, lists, f"{root}bbox_test", rows, sorted(queries))),
        gallery=tuple(_frames(tree, lists, f"{root}bbox_test", rows, others)),
        layout="mars",
    )


def _table(tree: Tree, member: str, name: str) -> NDArray[np.int64]:
    """(tracklets, 4): first line, last line, person, camera."""
    (rows,) = variables(tree, member, name)
    rows = np.atleast_2d(rows)
    if rows.shape[1] != 4:
        raise SourceError(f"{tree.source(member)}: {name} is {rows.shape}, wanted four columns; download it again")
    return whole_numbers(rows, tree.source(member))


def _frames(tree: Tree, lists: str, folder: str, rows: NDArray[np.int64], chosen: Iterable[int]) -> Iterator[Sample]:
    part = folder.rpartition("_")[2]
    names = [name for (name,) in tree.rows(f"{lists}{part}_name.txt", 1)]
    for row in chosen:
        first, last, person, camera = rows[row].tolist()
        for name in names[first - 1 : last]:
            match = _NAME.match(name)
            if match is None or (int(match[1].removeprefix("00")), int(match[2])) != (person, camera):
                raise SourceError(
                    f"{tree.source(lists)}{part}_name.txt: tracklet {row + 1} is of person {person}, camera {camera}, "
                    f"but holds {name}; download the lists again"
                )
            identity = JUNK_IDENTITY if person == -1 else match[1]
            source = tree.source(f"{folder}/{match[1]}/{name}")
            yield Sample(source, identity=identity, camera=match[2], time=float(match[3]), track=f"{part} {row + 1}")
