"""The identities of a gallery: enrolled, reviewed, renamed, merged, split, forgotten."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from commands.opening import GalleryName, IdentityName, open_gallery
from commands.options import check_choice
from commands.telling import quarantine_of, tell_added
from serve.errors import SimclrError
from serve.samples import NOBODY


@dataclass(frozen=True, kw_only=True)
class ReidEnrol:
    """Add pictures of known identity to a gallery, which is made if need be; a sub-folder's name is an identity."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    images: str | None = None
    """Folder, .csv, .parquet, .zip, .tar or a known dataset's root."""
    image: tuple[Path, ...] = ()
    """Instead of --images: these pictures."""
    identity: str | None = None
    """Who or what is on all of them."""
    camera: str | None = None
    """The camera that took them."""
    time: float | None = None
    """When, in seconds."""
    encoder: str | None = None
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME. Default: the one used before."""

    def __post_init__(self) -> None:
        if bool(self.image) == (self.images is not None):
            raise SimclrError("wanted either --images SRC or --image FILE")

    def __call__(self) -> None:
        from serve.identity.identities import enrol, named
        from serve.samples import Sample
        from serve.sources import open_source

        found = open_source(self.images) if self.images is not None else None
        samples = (found.gallery or found.everything) if found else [Sample(str(path.absolute())) for path in self.image]
        wanted = named(samples, self.identity, self.camera, self.time)
        quarantine = quarantine_of(self.gallery)
        with open_gallery(self.gallery, self.encoder, create=True) as gallery:
            report = enrol(gallery, wanted, quarantine)
        tell_added(report, quarantine, self.images or "--image")
        if nobody := sum(sample.identity in NOBODY for sample in wanted):
            print(f"{nobody} pictures are named {' or '.join(NOBODY)}: marks for nobody, who is never named", file=sys.stderr)
        print(f"{self.gallery}: {len(report.ids)} enrolled, {report.already_present} were there")


@dataclass(frozen=True, kw_only=True)
class ReidReview:
    """List what to look at: identities that look most alike, and pictures that find their own identity worst."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    limit: int = 20
    """How many of each to list."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise SimclrError(f"--limit is {self.limit}, wanted 1 or more")

    def __call__(self) -> None:
        from serve.gallery import Gallery
        from serve.identity.confusable import confusable_pairs
        from serve.identity.enrolled import Enrolled
        from serve.identity.hardest import hardest_queries
        from serve.identity.review import review_lines

        with Gallery.open(self.gallery) as gallery:
            enrolled = Enrolled.of(gallery)
            pairs, hardest = confusable_pairs(enrolled, self.limit), hardest_queries(enrolled, self.limit)
        if self.json:
            print(json.dumps({"confusable": [asdict(pair) for pair in pairs], "hardest": asdict(hardest)}))
        else:
            print("\n".join(review_lines(self.gallery, pairs, hardest)))


@dataclass(frozen=True, kw_only=True)
class ReidRename:
    """Give an identity another name."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    identity: Positional[IdentityName]
    """Its name."""
    to: Positional[IdentityName]
    """Its new name, which nobody has."""

    def __call__(self) -> None:
        from serve.gallery import Gallery
        from serve.identity.identities import rename

        with Gallery.open(self.gallery) as gallery:
            print(f"{self.gallery}: {rename(gallery, self.identity, self.to)} items are {self.to} now")


@dataclass(frozen=True, kw_only=True)
class ReidMerge:
    """Make one identity of several."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    identities: Positional[Annotated[tuple[str, ...], arg(metavar="NAME")]]
    """Their names."""
    into: str
    """One of them, or a new name."""

    def __call__(self) -> None:
        from serve.gallery import Gallery
        from serve.identity.identities import merge

        with Gallery.open(self.gallery) as gallery:
            print(f"{self.gallery}: {merge(gallery, self.identities, self.into)} items more are {self.into} now")


@dataclass(frozen=True, kw_only=True)
class ReidSplit:
    """Make a new identity of some items of another."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    identity: Positional[IdentityName]
    """Whose items they are."""
    ids: tuple[int, ...] = ()
    """Ids, as `simclr search` prints them."""
    where: str | None = None
    """Instead of ids: all of its items that pass, such as: camera = 2 and time < 100"""
    into: str
    """The new name."""

    def __post_init__(self) -> None:
        check_choice(self.ids, self.where)

    def __call__(self) -> None:
        from serve.filters import And, Condition, parse_where
        from serve.gallery import Gallery
        from serve.identity.identities import split

        with Gallery.open(self.gallery) as gallery:
            ids = list(self.ids)
            if self.where is not None:
                passing = And((Condition("identity", "=", (self.identity,)), parse_where(self.where)))
                ids = gallery.ids(passing).tolist()
            print(f"{self.gallery}: {split(gallery, self.identity, ids, self.into)} items are {self.into} now")


@dataclass(frozen=True, kw_only=True)
class ReidForget:
    """Remove an identity and all that belongs to it from a gallery's files; a line without its name stays in audit.jsonl."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    identity: Positional[IdentityName]
    """Its name."""

    def __call__(self) -> None:
        from serve.gallery import Gallery
        from serve.identity.identities import forget

        with Gallery.open(self.gallery) as gallery:
            count = forget(gallery, self.identity)
        print(f"{self.gallery}: {count} items forgotten; pictures outside its folder are where they were")
