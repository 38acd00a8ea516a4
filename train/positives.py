"""Two pictures of one track as the two views of an anchor, in place of two crops of one picture.

A track is what a tracker gives: pictures of somebody in one camera, one after the other. It is known without labels, and an
identity is never looked at here. A batch holds one anchor of each track at most: two would be positives of each other that
the loss pushes apart as negatives. So NT-Xent stays as it is, without a mask.

Shapes: N pictures, T tracks. A picture without a track is one by itself, and then both views are of this picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from serve.errors import TrainingError
from serve.samples import Sample


class Tracks:
    """Which pictures of one process are of one track."""

    def __init__(self, samples: Sequence[Sample], *, seed: int) -> None:
        self._seed = seed
        self._track_N = track_numbers(samples)
        self._sizes_T = torch.bincount(self._track_N)
        self._rows_N = self._track_N.argsort(stable=True)
        self._ends_T = self._sizes_T.cumsum(0)

    def __len__(self) -> int:
        return len(self._sizes_T)

    def __str__(self) -> str:
        several = self._sizes_T[self._sizes_T > 1]
        alone = f"; {len(self) - len(several):,} pictures alone in theirs, or without one" if len(several) < len(self) else ""
        return f"another picture of the same track: {int(several.sum()):,} pictures in {len(several):,} tracks{alone}"

    def others(self, row: int) -> list[int]:
        """The other rows of a picture's track."""
        track = int(self._track_N[row])
        end = int(self._ends_T[track])
        return [other for other in self._rows_N[end - int(self._sizes_T[track]) : end].tolist() if other != row]

    def partner(self, row: int, name: str, epoch: int) -> int:
        """The row of an anchor's second view: any other picture of its track, evenly; itself if there is none.

        A function of (seed, epoch, name of the picture), so neither workers nor an interruption change it.
        """
        others = self.others(row)
        digest = hashlib.sha256(f"{self._seed}/partner/{epoch}/{name}".encode("utf-8", "surrogateescape")).digest()
        return others[int.from_bytes(digest[:8], "big") % len(others)] if others else row

    def spread(self, order_N: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """Rows of an epoch's whole batches, none with two pictures of one track.

        In a first round every track gives its first picture in `order_N`, in a second round its second, and so on; batches are
        cut within rounds, then shuffled. What fills no batch waits for another epoch: of a track much longer than others, most.
        """
        rounds = order_N[self._turns(order_N).argsort(stable=True)].split(self._rounds().tolist())
        batches = [rows[: len(rows) // batch_size * batch_size].view(-1, batch_size) for rows in rounds]
        whole = torch.cat(batches)
        return whole[torch.randperm(len(whole), generator=generator)].flatten()

    def batches(self, batch_size: int) -> int:
        """How many batches `spread` makes."""
        return int((self._rounds() // batch_size).sum())

    def _turns(self, order_N: Tensor) -> Tensor:
        """How many pictures of the same track come before each in this order."""
        by_track = self._track_N[order_N].argsort(stable=True)
        turns = torch.empty_like(order_N)
        turns[by_track] = torch.arange(len(order_N)) - (self._ends_T - self._sizes_T).repeat_interleave(self._sizes_T)
        return turns

    def _rounds(self) -> Tensor:
        """How many tracks have at least 1, 2, 3, ... pictures."""
        return torch.bincount(self._sizes_T).flip(0).cumsum(0).flip(0)[1:]


def track_numbers(samples: Sequence[Sample]) -> Tensor:
    """(N,): the number of each picture's track, from 0. A tracker's own ids count within their camera."""
    numbers: dict[Hashable, int] = {}
    keys = (place if s.track is None else (s.camera, s.track) for place, s in enumerate(samples))
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def tracks_sha256(samples: Sequence[Sample]) -> str:
    """Digest of which pictures are of one track, so that a run is not resumed with other tracks."""
    return hashlib.sha256(track_numbers(samples).numpy().tobytes()).hexdigest()


def share_of_tracks(samples: Sequence[Sample], rank: int, world_size: int) -> list[Sample]:
    """The pictures of one process: whole tracks, each given to the process that has fewest pictures by then.

    Raises: TrainingError if no track has two pictures.
    """
    numbers = track_numbers(samples)
    sizes_T = torch.bincount(numbers)
    if sizes_T.max() < 2:
        raise TrainingError(
            f"--positives track: no two of the {len(samples):,} pictures are named as of one track; wanted a CSV with "
            f"path,track,camera as a tracker gives them, or leave --positives out"
        )
    loads, owner_T = [0] * world_size, []
    for size in sizes_T.tolist():
        owner_T.append(loads.index(min(loads)))
        loads[owner_T[-1]] += size
    return [sample for sample, number in zip(samples, numbers.tolist(), strict=True) if owner_T[number] == rank]
