"""What is done to a gallery."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from tyro.conf import Positional, arg

from commands.opening import GalleryName, open_gallery
from commands.options import check_choice, chosen_ids, json_object
from commands.telling import quarantine_of, tell_added, write_json
from serve.errors import GalleryError, SimclrError

if TYPE_CHECKING:
    from serve.item import Known


@dataclass(frozen=True, kw_only=True)
class GalleryAdd:
    """Add pictures to a gallery, which is made if need be. Repeating it adds only what is new."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    images: str
    """Folder, .csv, .parquet, .zip, .tar or a known dataset's root."""
    encoder: str | None = None
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME. Default: the one used before."""
    quarantine: Annotated[Path | None, arg(metavar="FILE")] = None
    """List of all pictures that were ever left out, and why. Default: GALLERY/quarantine.jsonl."""

    def __call__(self) -> None:
        from serve.bulk import add_pictures
        from serve.sources import open_source

        images = open_source(self.images)
        quarantine = self.quarantine or quarantine_of(self.gallery)
        with open_gallery(self.gallery, self.encoder, create=True) as gallery:
            report = add_pictures(gallery, images.gallery or images.everything, quarantine)
            tell_added(report, quarantine, self.images)
            print(f"{self.gallery}: {len(report.ids)} added, {report.already_present} were there, {len(gallery)} in all")


@dataclass(frozen=True, kw_only=True)
class GalleryRemove:
    """Remove items from a gallery, by id or all that pass a filter."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    ids: Positional[tuple[int, ...]] = ()
    """Ids, as `simclr search` prints them."""
    ids_from: Annotated[Path | None, arg(metavar="FILE")] = None
    """Instead: the ids that the lines of this file begin with (simclr gallery duplicates --to-remove)."""
    where: str | None = None
    """Instead: all of these, such as: camera = 2 and time < 100"""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.ids_from is None:
            check_choice(self.ids, self.where)
        elif self.ids or self.where is not None:
            raise SimclrError("wanted one of ids, --ids-from FILE and --where EXPR to say which items")

    def __call__(self) -> None:
        from serve.dedup.report import read_removals
        from serve.gallery import Gallery

        with Gallery.open(self.gallery) as gallery:
            chosen = read_removals(self.ids_from) if self.ids_from else chosen_ids(gallery, self.ids, self.where)
            gallery.remove(chosen)
            left = len(gallery)
        done = {"removed": len(chosen), "left": left}
        print(json.dumps(done) if self.json else f"{self.gallery}: {len(chosen)} removed, {left} left")


@dataclass(frozen=True, kw_only=True)
class GalleryRelabel:
    """Say anew what is known about items of a gallery; searches see all of it or nothing."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    ids: tuple[int, ...] = ()
    """Ids, as `simclr search` prints them."""
    where: str | None = None
    """Instead of ids: all of these, such as: label = cta"""
    label: str | None = None
    """Their class."""
    identity: str | None = None
    """Who or what is on them."""
    camera: str | None = None
    """The camera that took them."""
    time: float | None = None
    """When, in seconds."""
    extra: Annotated[str | None, arg(metavar="JSON")] = None
    """More facts, laid over those that are there; null takes one out: {"box": [1, 2, 3, 4], "seen": null}"""
    forget: tuple[Literal["label", "identity", "camera", "time"], ...] = ()
    """What is no longer known of them."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_choice(self.ids, self.where)
        if not self._known():
            raise SimclrError("nothing to say; wanted one of --label, --identity, --camera, --time, --extra, --forget")

    def __call__(self) -> None:
        from serve.gallery import Gallery

        with Gallery.open(self.gallery) as gallery:
            chosen = chosen_ids(gallery, self.ids, self.where)
            gallery.relabel(chosen, **self._known())
        print(json.dumps({"relabelled": len(chosen)}) if self.json else f"{self.gallery}: {len(chosen)} relabelled")

    def _known(self) -> Known:
        known = {name: getattr(self, name) for name in ("label", "identity", "camera", "time")}
        known = {name: value for name, value in known.items() if value is not None} | dict.fromkeys(self.forget)
        if self.extra is not None:
            known["extra"] = json_object("--extra", self.extra)
        return cast("Known", known)


@dataclass(frozen=True, kw_only=True)
class GalleryInfo:
    """Say what a gallery holds and which encoder made it."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from serve.gallery import Gallery

        with Gallery.open(self.gallery) as gallery:
            facts = asdict(gallery.info())
        if self.json:
            print(json.dumps(facts))
        else:
            report = facts.pop("index_report")
            print("\n".join([*(f"{name:14} {value}" for name, value in facts.items()), report]).rstrip())


@dataclass(frozen=True, kw_only=True)
class GalleryRebuild:
    """Derive a gallery's index anew from its catalog."""

    gallery: Positional[GalleryName]
    """Its folder."""

    def __call__(self) -> None:
        from serve.gallery import Gallery

        with Gallery.open(self.gallery) as gallery:
            gallery.rebuild()
            print(f"{self.gallery}: index of {len(gallery)} items rebuilt")


@dataclass(frozen=True, kw_only=True)
class GalleryTune:
    """Choose a gallery's index anew, by measuring, under these limits; those left out stay as they are."""

    gallery: Positional[GalleryName]
    """Its folder."""
    recall: float | None = None
    """Least share of the ten nearest that is found. At first: 0.95."""
    latency_ms: float | None = None
    """Longest median search of one query on one core; search stays exact as long as it takes no longer. At first: 5."""
    memory_mb: float | None = None
    """Largest index beside the vectors, which stay on disk. At first: any."""

    def __call__(self) -> None:
        from serve.gallery import Gallery

        asked = {"recall": self.recall, "latency_ms": self.latency_ms, "memory_mb": self.memory_mb}
        with Gallery.open(self.gallery) as gallery:
            gallery.tune(replace(gallery.limits, **{name: limit for name, limit in asked.items() if limit is not None}))
            info = gallery.info()
        print("\n".join([f"{self.gallery}: {info.index}", info.index_report]).rstrip())


@dataclass(frozen=True, kw_only=True)
class GalleryVerify:
    """Check every row, vector and file of a gallery; exit code 1 if something is wrong."""

    gallery: Positional[GalleryName]
    """Its folder."""
    repair: bool = False
    """If something is wrong, derive anew all that is derived, and check again."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from serve.gallery import Gallery

        with Gallery.open(self.gallery) as gallery:
            found = left = gallery.verify()
            if found and self.repair:
                gallery.repair()
                left = gallery.verify()
            count = len(gallery)
        if self.json:
            print(json.dumps({"items": count, "found": found, "left": left}))
        else:
            print("\n".join(found or [f"{self.gallery}: {count} items, all well"]))
        if left and self.repair:
            raise GalleryError(f"{self.gallery}: not repaired: {left[0]} ({len(left)} in all); update or remove these items")
        if left:
            raise GalleryError(f"{self.gallery}: {len(left)} problems; --repair derives anew what is derived")
        if found and not self.json:
            print(f"{self.gallery}: {count} items, repaired")


@dataclass(frozen=True, kw_only=True)
class GalleryDuplicates:
    """Find exact and near duplicates in a gallery, and say which of them to keep. Removes nothing."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    threshold: float | None = None
    """Similarity from which on two are near; 1: equal ones alone. Default: ten times nearer than the median item's nearest."""
    where: str | None = None
    """Only among these, such as: camera != 2 and label in (cat, dog)"""
    exact: bool = False
    """Compare all with all: misses none where the index is approximate, holds all vectors in memory, takes far longer."""
    json: Annotated[str | None, arg(metavar="FILE")] = None
    """Write every group there; - prints them."""
    sheet: Annotated[Path | None, arg(metavar="FILE.jpg")] = None
    """Draw the largest groups: .jpg or .png."""
    to_remove: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the ids of all but the kept ones, a line each, for: simclr gallery remove GALLERY --ids-from FILE"""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise SimclrError(f"--threshold is {self.threshold}, wanted above 0 and at most 1")
        if self.sheet is not None and self.sheet.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            raise SimclrError(f"--sheet is {self.sheet}, wanted a name that ends in .jpg or .png")

    def __call__(self) -> None:
        from serve.dedup.report import as_json, report_lines, write_removals
        from serve.duplicates import find_duplicates
        from serve.gallery import Gallery

        with Gallery.open(self.gallery) as gallery:
            found = find_duplicates(gallery, self.threshold, self.where, exact=self.exact)
        if self.sheet is not None:
            from serve.contact_sheet import save_sheet
            from serve.dedup.sheet import duplicate_sheet

            save_sheet(self.sheet, duplicate_sheet(found))
        if self.to_remove is not None:
            write_removals(self.to_remove, found)
        if self.json == "-":
            print(json.dumps(as_json(found)))
            return
        write_json(Path(self.json) if self.json else None, as_json(found))
        print("\n".join(report_lines(found, self.gallery, self.to_remove)))
