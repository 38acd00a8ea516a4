"""Asking a gallery."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from commands.opening import GalleryName, open_gallery
from serve.errors import SimclrError

if TYPE_CHECKING:
    from serve.gallery import Gallery


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the pictures of a gallery that are most similar to one picture."""

    gallery: GalleryName
    """A folder, or an address in Milvus (docs/scaling.md)."""
    image: Path | None = None
    """The picture to search with."""
    like: Annotated[int | None, arg(metavar="ID")] = None
    """Instead of a picture: the item of this id. Needs no encoder."""
    encoder: str | None = None
    """The encoder that made the gallery: RUN, a model repository, grpc://… or http://…  Default: the one used before."""
    k: Annotated[int | None, arg(aliases=["-k"])] = None
    """How many. Default: 10, or all that pass the threshold."""
    where: str | None = None
    """Only among these, such as: camera != 2 and label in (cat, dog)"""
    threshold: float | None = None
    """Only those whose score, the cosine, is this or more."""
    offset: int = 0
    """Leave out the best so many: the next page."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.like is None):
            raise SimclrError("wanted either --image FILE or --like ID to search with")

    def __call__(self) -> None:
        with self._open() as gallery:
            query = self.image if self.like is None else gallery.vector(self.like)
            assert query is not None
            if self.threshold is None:
                hits = gallery.search(query, 10 if self.k is None else self.k, self.where, offset=self.offset)
            else:
                hits = gallery.within(query, self.threshold, self.where, self.k, offset=self.offset)
        if self.json:
            print(json.dumps([asdict(hit) for hit in hits]))
            return
        for rank, hit in enumerate(hits, start=1 + self.offset):
            known = [f"{name}={value}" for name in ("label", "identity", "camera") if (value := getattr(hit, name)) is not None]
            print(f"{rank:3}  {hit.score:.4f}  #{hit.id}  {hit.source}  {' '.join(known)}".rstrip())

    def _open(self) -> Gallery:
        from serve.gallery import Gallery

        return open_gallery(self.gallery, self.encoder) if self.like is None else Gallery.open(self.gallery)
