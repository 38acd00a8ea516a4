"""One picture and what is known about it, and a set of pictures by their roles."""

from __future__ import annotations

from dataclasses import dataclass

JUNK_IDENTITY = "-1"
"""Market-1501's mark for boxes that count neither as right nor as wrong."""


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
