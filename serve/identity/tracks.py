"""A list of a tracker's crops put through rolling re-ID, and what became of it: a line for each crop, and IDF1."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.errors import SourceError
from serve.files import atomic_path
from serve.identity.idf1 import idf1
from serve.identity.rolling import RollingReid
from serve.samples import Sample


@dataclass(frozen=True)
class Assignment:
    """Who a crop was taken for at its time; None: too little was known of its track."""

    source: str
    track: str
    camera: str
    time: float
    identity: str | None


def in_time(samples: Sequence[Sample]) -> list[Sample]:
    """Crops in the order of time. Raises: SourceError for one whose track, camera or time nobody says."""
    for sample in samples:
        if sample.track is None or sample.camera is None or sample.time is None:
            raise SourceError(f"{sample.source}: lacks track, camera or time; wanted a CSV with path,track,camera,time")
    return sorted(samples, key=lambda sample: sample.time or 0)


def follow(reid: RollingReid, crops: Sequence[Sample], vectors_ND: NDArray[np.float32]) -> list[Assignment]:
    """Feed crops, as `in_time` gives them, with their vectors (N, D)."""
    assignments = []
    for crop, vector_D in zip(crops, vectors_ND, strict=True):
        track, camera, time_s = str(crop.track), str(crop.camera), float(crop.time or 0)
        assignments.append(Assignment(crop.source, track, camera, time_s, reid.feed(track, camera, time_s, vector_D)))
    return assignments


def scored(crops: Sequence[Sample], assignments: Sequence[Assignment]) -> tuple[float, float] | None:
    """IDF1 of what was said online, and of what was last said of each track; None unless all crops name their identity."""
    truth = [crop.identity for crop in crops if crop.identity is not None]
    if len(truth) < len(crops):
        return None
    last = {(one.camera, one.track): one.identity for one in assignments}
    return idf1(truth, [one.identity for one in assignments]), idf1(truth, [last[one.camera, one.track] for one in assignments])


def write_assignments(assignments: Sequence[Assignment], path: Path | None) -> None:
    """One JSON object a line, into a file or to standard output."""
    lines = "".join(json.dumps(asdict(one)) + "\n" for one in assignments)
    if path is None:
        sys.stdout.write(lines)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(lines, encoding="utf-8")
