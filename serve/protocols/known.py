"""The protocols by name, and which pictures they compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.errors import SourceError
from serve.protocols.names import Flip, ProtocolName
from serve.samples import JUNK_IDENTITY, NOBODY, ImageSet, Sample

_CLASSIC_IDENTITIES = 100
Places: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to compare. Pictures of a query's identity do not count that are of its camera or, not `by_camera`, of its track.

    `draws`: how often queries and gallery are drawn from one set of pictures; 0, the data say which is which.
    """

    title: str
    by_camera: bool = True
    draws: int = 0
    single_shot: bool = False
    """Whether people are drawn, and CMC is the mean over all galleries of one picture of each; else such a gallery is drawn."""
    tracks: bool = False
    """Whether the pictures of a track are one query, or one gallery item: the mean of their vectors."""
    flip: Flip = "none"


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "market": Protocol(title="Market-1501"),
    "duke": Protocol(title="DukeMTMC-reID"),
    "msmt17": Protocol(title="MSMT17"),
    "cuhk03": Protocol(title="CUHK03, new protocol (767/700 people)"),
    "cuhk03-classic": Protocol(title="CUHK03, classic: 100 people, one gallery picture of each", draws=20, single_shot=True),
    "veri": Protocol(title="VeRi-776, image to image"),
    "vehicleid": Protocol(title="VehicleID: one gallery picture of each vehicle", by_camera=False, draws=10),
    "mars": Protocol(title="MARS, tracklet to tracklet", tracks=True),
    "sysu30k": Protocol(title="SYSU-30k", flip="sysu-official"),
    "cross-camera": Protocol(title="other cameras only"),
    "single-camera": Protocol(title="all pictures of the identity but the query and its track", by_camera=False),
}


@dataclass(frozen=True)
class Roles:
    """Queries and gallery; `gallery` None: the same pictures, each in turn asked with, or as draws have it."""

    queries: tuple[Sample, ...]
    gallery: tuple[Sample, ...] | None


def default_name(images: ImageSet) -> ProtocolName:
    """The protocol of the data set whose layout this is; of other data, the one that their cameras allow."""
    known = {str(name): name for name in PROTOCOLS}
    if images.layout is not None:
        return known[images.layout]
    return "cross-camera" if len({sample.camera for sample in images.everything}) > 1 else "single-camera"


def roles(protocol: Protocol, images: ImageSet) -> Roles:
    """Who asks and who is found. Junk is left out: it would be taken out of every ranking."""
    if images.query and images.gallery and not protocol.draws:
        return Roles(images.query, _counted(images.gallery))
    everyone = _counted((images.test or images.everything) if protocol.draws else images.everything)
    queries = tuple(sample for sample in everyone if sample.identity not in NOBODY)
    return Roles(queries, None if protocol.draws or len(queries) == len(everyone) else everyone)


def _counted(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if counts(sample))


def counts(sample: Sample) -> bool:
    """Whether a picture in the gallery is right or wrong for somebody: not where it is junk, or nobody says who it is of."""
    return identity_of(sample) not in (None, JUNK_IDENTITY)


def identity_of(sample: Sample) -> str | None:
    """The identity, or else the class: a sub-folder's name is an identity where nothing else is."""
    return sample.identity if sample.identity is not None else sample.label


def draws(protocol: Protocol, identities: Sequence[str], seed: int) -> Iterator[tuple[Places, Places]]:
    """Places of queries and of gallery, `protocol.draws` times; the same for the same seed. Raises: SourceError."""
    rng = np.random.default_rng(seed)
    people = np.array(identities)
    for _ in range(protocol.draws):
        yield _some_identities(people, rng) if protocol.single_shot else _one_of_each(people, rng)


def _some_identities(people: NDArray[np.str_], rng: np.random.Generator) -> tuple[Places, Places]:
    names = np.unique(people)
    chosen = np.flatnonzero(np.isin(people, rng.permutation(names)[:_CLASSIC_IDENTITIES]))
    return chosen, chosen


def _one_of_each(people: NDArray[np.str_], rng: np.random.Generator) -> tuple[Places, Places]:
    order = rng.permutation(len(people))
    _, first = np.unique(people[order], return_index=True)
    gallery = np.sort(order[first])
    queries = np.setdiff1d(np.arange(len(people)), gallery)
    if not len(queries):
        raise SourceError(f"{len(people)} pictures are of as many identities: none is left to ask with; wanted two of each")
    return queries, gallery
