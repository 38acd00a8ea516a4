"""Which identities look most alike: two names of one person, or two people whom the encoder mixes up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.errors import GalleryError, NoSuchItem
from serve.identity.enrolled import Enrolled, evenly
from serve.item import Item
from serve.neighbours import pair_distances, rounding
from serve.search import Hit

_TILE_SCORES = 1 << 23
_MOST_TIES = 1000

_Pair: TypeAlias = tuple[float, int, int]
"""Squared distance of two pictures, and their rows among the enrolled, the smaller first."""


@dataclass(frozen=True)
class ConfusablePair:
    """The most similar pictures of two identities: `first` has the smaller id, the score of `second` is the pair's."""

    first: Item
    second: Hit


def confusable_pairs(enrolled: Enrolled, limit: int = 20, sample: int = 2000) -> list[ConfusablePair]:
    """The `limit` pairs of identities whose most similar pictures are most alike, by falling score, equals by growing ids.

    Every enrolled picture is compared with those of all other identities; of more than `sample`, as many at equal steps are,
    identity by identity. Exact, whatever the index; only where over 1,000 are equal, others may come before the first by id.
    In memory are the vectors of those that ask. Raises: GalleryError.
    """
    if limit < 1:
        raise GalleryError(f"review: the limit is {limit}, wanted 1 or more")
    best: list[_Pair] = []
    for tile in _tiles(enrolled, sample):
        floor = _score(best[-1]) if len(best) == limit else -np.inf
        best = _best([*best, *tile.above(floor, 2 * limit + _MOST_TIES)], enrolled.identity, limit)
    pairs = []
    for pair in best:
        with suppress(NoSuchItem):  # it was removed meanwhile
            first, second = (enrolled.gallery.item(int(enrolled.ids[row])) for row in pair[1:])
            pairs.append(ConfusablePair(first, Hit(**vars(second), score=_score(pair))))
    return pairs


@dataclass(frozen=True, eq=False)
class _Tile:
    """Scores (A, B) of rows that ask and rows that are shown, each with the rows of an identity side by side."""

    enrolled: Enrolled
    asking: NDArray[np.intp]
    shown: NDArray[np.intp]
    scores: NDArray[np.float32]

    def above(self, floor: float, most: int) -> list[_Pair]:
        """The closest pictures of each two identities that score more than `floor`; of too many, those of the `most` alike."""
        asking, top = np.unique(self.enrolled.identity[self.asking], return_index=True)
        shown, left = np.unique(self.enrolled.identity[self.shown], return_index=True)
        best = np.maximum.reduceat(np.maximum.reduceat(self.scores, top, axis=0), left, axis=1)
        best[asking[:, None] == shown] = -np.inf
        cells = np.flatnonzero(best > floor - self._error)
        if len(cells) > most:  # one pair of identities has two cells at most
            cells = cells[np.argpartition(-best.ravel()[cells], most)[:most]]
        top, left = np.append(top, len(self.asking)), np.append(left, len(self.shown))
        rows, columns = np.unravel_index(cells, best.shape)
        return [
            self._closest(slice(top[row], top[row + 1]), slice(left[column], left[column + 1]))
            for row, column in zip(rows, columns, strict=True)
        ]

    def _closest(self, rows: slice, columns: slice) -> _Pair:
        """Of the pictures of two identities; what float32 leaves open is worked out again."""
        scores = self.scores[rows, columns]
        row, column = (places[:_MOST_TIES] for places in np.nonzero(scores >= scores.max() - 2 * self._error))
        one, other = self.asking[rows][row], self.shown[columns][column]
        distance = pair_distances(self.enrolled.vectors, self.enrolled.vectors, one, other)
        return min(zip(distance.tolist(), np.minimum(one, other).tolist(), np.maximum(one, other).tolist(), strict=True))

    @property
    def _error(self) -> float:
        return rounding(self.enrolled.vectors.shape[1])


def _tiles(enrolled: Enrolled, sample: int) -> Iterator[_Tile]:
    """Those that are asked beside all, identity by identity."""
    rows = np.flatnonzero(enrolled.somebody)
    everybody = rows[np.argsort(enrolled.identity[rows], kind="stable")]
    asking = evenly(everybody, sample)
    queries = enrolled.vectors[asking]
    step = _TILE_SCORES // max(len(asking), 1) + 1
    with tqdm(total=len(everybody), desc="comparing", unit="img", delay=1, leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(everybody), step):
            shown = everybody[start : start + step]
            yield _Tile(enrolled, asking, shown, queries @ enrolled.vectors[shown].T)
            bar.update(len(shown))


def _best(found: Sequence[_Pair], identity: NDArray[np.int64], limit: int) -> list[_Pair]:
    """The `limit` closest, two identities once."""
    once: dict[frozenset[int], _Pair] = {}
    for pair in sorted(found):
        once.setdefault(frozenset(identity[[*pair[1:]]].tolist()), pair)
    return list(once.values())[:limit]


def _score(pair: _Pair) -> float:
    """The cosine: vectors are of length 1."""
    return 1 - pair[0] / 2
