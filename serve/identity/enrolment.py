"""Enrol single pictures whose place does not last, such as uploads, or that are in the gallery already."""

from __future__ import annotations

from pathlib import Path

from serve.errors import GalleryError
from serve.filters import Condition
from serve.gallery import Gallery
from serve.identity.identities import enrol, named
from serve.item import Known
from serve.samples import Sample
from serve.storage.kept_pictures import keep, unlink_kept


def enrol_item(gallery: Gallery, item_id: int, identity: str, camera: str | None = None, time: float | None = None) -> None:
    """Say who is on an item of whom that is not known yet; and camera and time, if given. Raises: GalleryError."""
    item = gallery.item(item_id)
    sample = Sample(item.source, label=item.label, camera=item.camera, time=item.time)
    enrol(gallery, named([sample], identity, camera, time))
    known: Known = {}
    if camera is not None:
        known["camera"] = camera
    if time is not None:
        known["time"] = time
    if known:
        gallery.relabel([item_id], **known)


def enrol_upload(gallery: Gallery, encoded: bytes, identity: str, camera: str | None = None, time: float | None = None) -> bool:
    """Add a picture as somebody's; the gallery keeps a copy of it, which goes with the item. Returns: False if it was there.

    Raises: GalleryError if the gallery is not in a folder, or has the picture as somebody else's; ImageError.
    """
    named([Sample("upload")], identity)  # a name that cannot be is refused before anything is written
    path = keep(gallery.folder, encoded)
    for item in gallery.items(_at(path)):
        if item.identity not in (None, identity):
            raise GalleryError(
                f"this picture is enrolled as {item.identity}, not {identity}; nothing was changed; split it off there"
            )
    try:
        report = enrol(gallery, named([Sample(str(path))], identity, camera, time))
        if report.unreadable:
            raise GalleryError(report.unreadable[0].reason)
    except BaseException:
        if not gallery.count(_at(path)):
            unlink_kept(gallery.folder, [str(path)])
        raise
    return bool(report.ids)


def _at(path: Path) -> Condition:
    return Condition("source", "=", (str(path),))
