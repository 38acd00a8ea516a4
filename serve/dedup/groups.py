"""Groups of duplicates: the one to keep and the others, each with its kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.dedup.files import Files, Kind
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.item import Item

COMPARED = ("label", "identity", "camera")


@dataclass(frozen=True)
class Copy:
    """One item of a group. `similarity` is that to the one that is kept; `pixels` and `bytes` are 0 where it cannot be read."""

    item: Item
    similarity: float
    kind: Kind
    pixels: int
    bytes: int


@dataclass(frozen=True)
class Group:
    """Items of which one is enough: `keep`, and the others by falling similarity, equal ones by id."""

    keep: Copy
    others: tuple[Copy, ...]

    @property
    def differing(self) -> dict[str, list[str]]:
        """Label, identity and camera, where more than one is known: their values."""
        items = [copy.item for copy in (self.keep, *self.others)]
        known = {field: {getattr(item, field) for item in items} - {None} for field in COMPARED}
        return {field: sorted(values) for field, values in known.items() if len(values) > 1}


def groups_of(
    gallery: Gallery,
    ids: NDArray[np.int64],
    files: Files,
    similarity: NDArray[np.float32],
    members: Mapping[int, Iterable[int]],
) -> tuple[Group, ...]:
    """Kept row -> rows of the others, as groups, the largest first. What was removed meanwhile is left out."""

    def copy(row: int, score: float, kind: Kind) -> Copy:
        pixels, size = (int(files.facts[what][row]) for what in ("pixels", "bytes"))
        return Copy(gallery.item(int(ids[row])), score, kind, pixels, size)

    groups = []
    for kept, rows in members.items():
        others = []
        with suppress(GalleryError):
            keep = copy(kept, 1.0, "file")
            for row in rows:
                with suppress(GalleryError):
                    others.append(copy(row, float(similarity[row]), files.kind(row, kept)))
        if others:
            groups.append(Group(keep, tuple(sorted(others, key=lambda one: (-one.similarity, one.item.id)))))
    return tuple(sorted(groups, key=lambda group: (-len(group.others), group.keep.item.id)))
