"""One picture and what is known about it, and a set of pictures by their roles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

JUNK_IDENTITY = "-1"
"""Market-1501's mark for boxes that count neither as right nor as wrong."""
NOBODY = ("0000", "0000others", JUNK_IDENTITY)
"""Identities of data sets that stand for nobody in particular: two pictures that carry one are not of the same."""
FACTS = ("label", "identity", "camera", "time", "track")
"""What may be known about a picture: the fields of a Sample beside its source."""


@dataclass(frozen=True)
class Sample:
    """One picture and what is known about it. `time` is in seconds; in the Market-1501 family it is the frame number."""

    source: str
    label: str | None = None
    identity: str | None = None
    camera: str | None = None
    time: float | None = None
    track: str | None = None
    """Pictures of one identity in one camera, one after the other, share it."""

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
    layout: str | None = None
    """The re-ID data set whose layout it has: the name of its protocol."""

    @property
    def everything(self) -> tuple[Sample, ...]:
        """All pictures, in the order train, test, query, gallery."""
        return self.train + self.test + self.query + self.gallery


@dataclass(frozen=True)
class Unreadable:
    """A picture that was left out, and why: one line that names it."""

    source: str
    reason: str


def stated_sample(source: str, facts: Mapping[str, str]) -> Sample:
    """A sample from facts given as text. Raises: ValueError for a time that is none, TypeError for a fact not in FACTS."""
    others = {name: text for name, text in facts.items() if name != "time"}
    return Sample(source, time=_seconds(facts["time"]) if "time" in facts else None, **others)


def _seconds(text: str) -> float:
    """A number, or an ISO 8601 time (UTC where it names no zone) in Unix seconds. Raises: ValueError."""
    with suppress(ValueError):
        if math.isfinite(seconds := float(text)):  # others could be neither stored nor compared
            return seconds
    with suppress(ValueError):
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    raise ValueError(f"time is {text!r}, wanted seconds or an ISO 8601 time")
