"""MARS: tracklets of the people of Market-1501, frames as `0001C1T0001F001.jpg`.

A row of `tracks_*_info.mat` is a tracklet: first and last line of the list of names, person, camera. `query_IDX.mat` names the
rows of the test set that are queries; all others are gallery. -1 is junk, 0 a distractor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

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
    train = _tracklets(tree, root, lists, "train") if tree.has(f"{lists}tracks_train_info.mat") else []
    test = _tracklets(tree, root, lists, "test")
    (asked,) = variables(tree, f"{lists}query_IDX.mat", "query_IDX")
    queries = set((whole_numbers(asked, f"{tree.source(lists)}query_IDX.mat") - 1).tolist())
    if not queries <= set(range(len(test))):
        raise SourceError(f"{tree.source(lists)}query_IDX.mat: points beyond the {len(test):,} tracklets; download it again")
    return ImageSet(
        train=_frames(train),
        query=_frames(test[row] for row in sorted(queries)),
        gallery=_frames(frames for row, frames in enumerate(test) if row not in queries),
        layout="mars",
    )


def _frames(tracklets: Iterable[list[Sample]]) -> tuple[Sample, ...]:
    return tuple(chain.from_iterable(tracklets))


def _tracklets(tree: Tree, root: str, lists: str, part: str) -> list[list[Sample]]:
    """The frames of every tracklet of one part, train or test."""
    names = [name for (name,) in tree.rows(f"{lists}{part}_name.txt", 1)]
    rows = _table(tree, f"{lists}tracks_{part}_info.mat", f"track_{part}_info")
    tracklets = []
    for number, (first, last, person, camera) in enumerate(rows.tolist(), start=1):
        frames = []
        for name in names[first - 1 : last]:
            match = _NAME.match(name)
            if match is None or (int(match[1].removeprefix("00")), int(match[2])) != (person, camera):
                raise SourceError(
                    f"{tree.source(lists)}{part}_name.txt: tracklet {number} is of person {person}, camera {camera}, "
                    f"but holds {name}; download the lists again"
                )
            identity = JUNK_IDENTITY if person == -1 else match[1]
            source = tree.source(f"{root}bbox_{part}/{match[1]}/{name}")
            frames.append(Sample(source, identity=identity, camera=match[2], time=float(match[3]), track=f"{part} {number}"))
        tracklets.append(frames)
    return tracklets


def _table(tree: Tree, member: str, name: str) -> NDArray[np.int64]:
    """(tracklets, 4): first line, last line, person, camera."""
    (rows,) = variables(tree, member, name)
    rows = np.atleast_2d(rows)
    if rows.shape[1] != 4:
        raise SourceError(f"{tree.source(member)}: {name} is {rows.shape}, wanted four columns; download it again")
    return whole_numbers(rows, tree.source(member))
