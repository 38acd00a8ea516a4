"""Vectors that come, go and move."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from commands.opening import GalleryName, absolute, open_encoder
from commands.telling import tell_unreadable
from serve.errors import SimclrError

if TYPE_CHECKING:
    from serve.encoder import Encoder
    from serve.engines.shards import Engine


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the vectors of pictures to a Parquet file. Repeating it after an interruption goes on."""

    encoder: str
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME."""
    images: str
    """Folder, .csv, .parquet, .zip, .tar or a known dataset's root."""
    out: Annotated[str, arg(metavar="FILE.parquet|FOLDER/")]
    """File to write, or, with a slash at its end, folder for many: a file for every 1,024 pictures."""
    engine: Literal["local", "ray"] = "local"
    """Work on this machine, or on a Ray cluster (docs/scaling.md)."""
    ray_address: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Of the Ray cluster's head, or auto. Default: a cluster of this machine alone is started."""
    workers: int = 2
    """Shards of 1,024 pictures under way at a time, on every machine. More of them for several Triton servers."""

    def __post_init__(self) -> None:
        if self.ray_address is not None and self.engine != "ray":
            raise SimclrError("--ray-address belongs to --engine ray; wanted both or neither")
        if not 1 <= self.workers <= 1000:
            raise SimclrError(f"--workers is {self.workers}, wanted 1 to 1000")

    def __call__(self) -> None:
        from serve.bulk import embed_to_parquet

        encoder = open_encoder(self.encoder)
        report = embed_to_parquet(encoder.manifest, self.images, self.out, self._engine(encoder))
        tell_unreadable(report.unreadable, report.quarantine)
        print(f"{self.out}: {report.count} vectors")

    def _engine(self, encoder: Encoder) -> Engine:
        if self.engine == "local":
            from serve.engines.local import embed_here

            return partial(embed_here, encoder=encoder, workers=self.workers)
        from serve.engines.ray_cluster import embed_on_ray

        return partial(
            embed_on_ray,
            open_encoder=open_encoder,
            spec=absolute(self.encoder),
            address=self.ray_address,
            workers=self.workers,
        )


@dataclass(frozen=True, kw_only=True)
class GalleryImport:
    """Add vectors of your own to a gallery, which is made if need be. Repeating it goes on where it was broken off."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    vectors: Annotated[Path, arg(metavar="FILE")]
    """.npy of shape (N, D); .parquet of `simclr embed`, `gallery export` or your own; an index of FAISS. docs/search.md"""
    items: Annotated[Path | None, arg(metavar="FILE")] = None
    """What is known about them, a row for each: .csv or .parquet (source or path, label, camera, ...); or ids, .npy or .txt."""
    encoder: str | None = None
    """The encoder that made them: RUN, a model repository, grpc://… or http://…  Not needed where the file says."""
    name: str | None = None
    """Instead of an encoder: a name for what made them. The gallery is then searched by vector and by item alone."""
    new_ids: bool = False
    """Let the items of `gallery export` have new ids; the former ones become extra.id."""

    def __call__(self) -> None:
        from serve.transfer.importing import import_vectors

        encoder = open_encoder(self.encoder) if self.encoder else None
        spec = absolute(self.encoder) if self.encoder else None
        report = import_vectors(
            self.gallery, self.vectors, items=self.items, encoder=encoder, spec=spec, name=self.name, new_ids=self.new_ids
        )
        print(f"{self.gallery}: {report.added} added, {report.already_present} were there, {report.count} in all")


@dataclass(frozen=True, kw_only=True)
class GalleryExport:
    """Write a gallery's items, ids and vectors to a Parquet file that `gallery import` reads."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    out: Annotated[Path, arg(metavar="FILE.parquet")]
    """File to write."""
    where: str | None = None
    """Only these, such as: camera != 2 and label in (cat, dog)"""

    def __call__(self) -> None:
        from serve.gallery import Gallery
        from serve.transfer.exporting import export_gallery

        with Gallery.open(self.gallery) as gallery:
            count = export_gallery(gallery, self.out, self.where)
        print(f"{self.out}: {count} items")


@dataclass(frozen=True, kw_only=True)
class GalleryReembed:
    """Give a gallery another encoder: embed all its pictures anew, while the old vectors are searched, and then change over."""

    gallery: Positional[GalleryName]
    """The gallery's folder. Repeating the command goes on where it was broken off."""
    encoder: str
    """The new encoder: RUN, a model repository, grpc://… or http://…"""
    drop_unreadable: bool = False
    """Remove the items whose pictures cannot be read any more; without this they keep the gallery from changing over."""

    def __call__(self) -> None:
        from serve.transfer.reembed import reembed

        encoder = open_encoder(self.encoder)
        report = reembed(self.gallery, encoder, absolute(self.encoder), drop_unreadable=self.drop_unreadable)
        tell_unreadable(report.dropped, report.quarantine)
        print(f"{self.gallery}: {report.count} items of encoder {encoder.encoder_id}, {len(report.dropped)} removed")


@dataclass(frozen=True, kw_only=True)
class GalleryCopy:
    """Copy a gallery, of a folder or of Milvus, into another, with all that is known; nothing is embedded anew.

    What is there already is left alone, so a copy that was broken off is finished by repeating it. Ids are kept where they
    are higher than any in the copy, as in a new one.
    """

    original: Positional[GalleryName]
    """A folder, milvus://HOST:PORT/COLLECTION or milvus-lite:///FILE.db"""
    copy: Positional[GalleryName]
    """Likewise; made if need be."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from serve.transfer.copying import copy_gallery

        done = copy_gallery(self.original, self.copy)
        renamed = done.copied - done.kept_ids
        ids = f"{renamed} of them with new ids" if renamed else "all with their ids"
        told = f"{self.copy}: {done.copied} copied, {ids}, {done.already_present} were there, {done.count} in all"
        print(json.dumps(asdict(done)) if self.json else told)
