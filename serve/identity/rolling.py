"""Rolling re-ID: crops of a tracker come in one by one, and every track gets an identity while it grows.

A track is its pictures so far, pooled into one direction. With every new picture it is decided anew: the best identity at or
above the threshold; else the one it has; else, after some pictures, a new one. An identity scores as the best of its tracks and
of its enrolled pictures does. Two rules need no picture: tracks that overlap in one camera are two identities, and tracks that
were not seen for a while are forgotten.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve.gallery import Gallery
from serve.identity.identify import enrolled_identities, rank_identities
from serve.index import unit_vectors

_FIRST_ROWS = 64


@dataclass(eq=False)
class _Track:
    camera: str
    first_s: float
    last_s: float
    row: int
    total: NDArray[np.float64]
    """(D,): sum of the unit vectors of its pictures."""
    pictures: int = 0
    identity: str | None = None

    def overlaps(self, other: _Track) -> bool:
        return self.camera == other.camera and self.first_s <= other.last_s and other.first_s <= self.last_s


@dataclass(eq=False, kw_only=True)
class RollingReid:
    """Feed it in the order of time. Not safe from several threads."""

    threshold: float
    """Cosine from which on a track is somebody; as `simclr reid calibrate --tracks` chooses it."""
    dim: int
    gallery: Gallery | None = None
    """Whose identities are candidates from the beginning, for any time and camera; it is only read."""
    evidence: int = 3
    """Pictures that a track has before it becomes a new identity."""
    memory_s: float = math.inf
    """Tracks not seen for longer are forgotten."""
    _tracks: dict[tuple[str, str], _Track] = field(init=False, default_factory=dict)
    _means: NDArray[np.float32] = field(init=False, repr=False)
    """(rows, D): the direction of each track, in its row."""

    def __post_init__(self) -> None:
        if not self.threshold >= -1 or self.evidence < 1 or not self.memory_s > 0:
            got = f"threshold {self.threshold}, evidence {self.evidence}, memory_s {self.memory_s}"
            raise ValueError(f"{got}: wanted -1 or more, 1 or more, more than 0")
        taken = enrolled_identities(self.gallery) if self.gallery else set()
        self._names = (name for number in itertools.count(1) if (name := f"new-{number}") not in taken)
        self._means = np.zeros((_FIRST_ROWS, self.dim), np.float32)

    def feed(self, track: str, camera: str, time_s: float, vector_D: NDArray[np.floating]) -> str | None:
        """The identity of a track after one more picture; None as long as too little is known of it.

        Args: track, the tracker's id within its camera. Raises: GalleryError for a vector that is none.
        """
        grown = self._grown((camera, track), time_s, vector_D)
        self._forget_before(time_s - self.memory_s)
        grown.identity = self._decided(grown)
        return grown.identity

    def _grown(self, key: tuple[str, str], time_s: float, vector_D: NDArray[np.floating]) -> _Track:
        unit = unit_vectors(np.asarray(vector_D)[None], self.dim, "the track's picture")[0]
        track = self._tracks.get(key)
        if track is None:
            track = _Track(key[0], time_s, time_s, self._free_row(), np.zeros(self.dim))
            self._tracks[key] = track
        track.first_s, track.last_s = min(track.first_s, time_s), max(track.last_s, time_s)
        track.total += unit
        track.pictures += 1
        self._means[track.row] = unit_vectors(track.total[None], self.dim, "the track's pictures")[0]
        return track

    def _free_row(self) -> int:
        used = {track.row for track in self._tracks.values()}
        row = next(row for row in itertools.count() if row not in used)
        if row == len(self._means):
            self._means = np.concatenate([self._means, np.zeros_like(self._means)])
        return row

    def _forget_before(self, time_s: float) -> None:
        for key in [key for key, track in self._tracks.items() if track.last_s < time_s]:
            del self._tracks[key]

    def _decided(self, track: _Track) -> str | None:
        others = [other for other in self._tracks.values() if other is not track and other.identity is not None]
        barred = {other.identity for other in others if other.overlaps(track)}
        candidates = self._scores(track, [other for other in others if other.identity not in barred], barred)
        best = max(candidates, key=lambda identity: (candidates[identity], identity), default=None)
        if best is not None and candidates[best] >= self.threshold:
            return best
        if track.identity is not None and track.identity not in barred:
            return track.identity
        return next(self._names) if track.pictures >= self.evidence else None

    def _scores(self, track: _Track, others: list[_Track], barred: set[str | None]) -> dict[str, float]:
        """Of each identity that the track may have, the best score."""
        mean_D = self._means[track.row]
        scores = self._means[[other.row for other in others]] @ mean_D
        found = [(str(other.identity), score) for other, score in zip(others, scores.tolist(), strict=True)]
        if self.gallery is not None:
            hits = rank_identities(self.gallery, mean_D, 1 + len(barred))
            found += [(str(hit.identity), hit.score) for hit in hits if hit.identity not in barred]
        best: dict[str, float] = {}
        for identity, score in found:
            best[identity] = max(score, best.get(identity, -math.inf))
        return best
