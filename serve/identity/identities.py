"""What is done to the identities of a gallery: enrol, rename, merge, split, forget. All but the first leave an audit line.

An item with an identity is an enrolled picture; there is nothing else to keep in step with the gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from serve.bulk import add_pictures
from serve.errors import GalleryError, SourceError
from serve.filters import Condition
from serve.gallery import AddReport, Gallery
from serve.identity import audit
from serve.samples import NOBODY, Sample


def named(
    samples: Sequence[Sample], identity: str | None = None, camera: str | None = None, time: float | None = None
) -> list[Sample]:
    """Samples ready to be enrolled: what is given holds for all, else what each says; a sub-folder's name is an identity.

    Raises: SourceError for a picture of whom nobody says who it is, GalleryError for a name that cannot be.
    """
    if identity is not None:
        _check_name(identity)
    enrolled = []
    for sample in samples:
        who = identity or sample.identity or sample.label
        if who is None:
            raise SourceError(f"{sample.source}: nobody says who it is; give --identity NAME, sub-folders or a column identity")
        label = None if who == sample.label else sample.label  # else a name would live on in the label when it is forgotten
        when = sample.time if time is None else time
        enrolled.append(replace(sample, identity=who, label=label, camera=camera or sample.camera, time=when))
    return enrolled


def enrol(gallery: Gallery, samples: Sequence[Sample], quarantine: Path | None = None) -> AddReport:
    """Add pictures of known identity. One that is there without identity gets it.

    Raises: GalleryError if one is there as somebody else's, and then nothing was changed; SourceError.
    """
    wanted = {sample.source: sample.identity for sample in samples}
    there = gallery.items(Condition("source", "in", tuple(wanted)))
    for item in there:
        if item.identity not in (None, wanted[item.source]):
            raise GalleryError(
                f"{item.source}: is enrolled as {item.identity}, not {wanted[item.source]}; nothing was changed; "
                "take it out of there first: simclr reid split"
            )
    unnamed = [item for item in there if item.identity is None]
    for identity in {wanted[item.source] for item in unnamed}:
        gallery.relabel([item.id for item in unnamed if wanted[item.source] == identity], identity=identity)
    return add_pictures(gallery, samples, quarantine)


def rename(gallery: Gallery, old: str, new: str) -> int:
    """Give an identity another name. Returns: how many items. Raises: GalleryError, and then nothing was changed."""
    _require_free(gallery, new, "to make one of two: simclr reid merge")
    return _relabel(gallery, "rename", [old], new)


def merge(gallery: Gallery, identities: Sequence[str], into: str) -> int:
    """Make one identity of several, under one of their names or another. Returns: items changed. Raises: as `rename`."""
    others = [identity for identity in dict.fromkeys(identities) if identity != into]
    if not others:
        raise GalleryError(f"nothing to merge into {into}; wanted another identity")
    return _relabel(gallery, "merge", others, into)


def split(gallery: Gallery, identity: str, ids: Sequence[int], into: str) -> int:
    """Make a new identity of some items of another. Returns: how many. Raises: as `rename`."""
    _require_free(gallery, into, "items of one go to another by simclr gallery relabel")
    _check_name(into)
    whole, some = set(_ids_of(gallery, identity)), set(ids)
    if some - whole:
        raise GalleryError(f"item {min(some - whole)} is not {identity}'s; nothing was changed")
    if not some or some == whole:
        raise GalleryError(f"got {len(some)} of {len(whole)} items of {identity}, wanted some and not all of them to split off")
    folder = gallery.folder  # first: a gallery that is in none has no place for the line
    gallery.relabel(sorted(some), identity=into)
    audit.note(folder, "split", [identity, into], len(some))
    return len(some)


def forget(gallery: Gallery, identity: str) -> int:
    """Remove an identity and all that belongs to it, so that no file of the gallery holds it any more when this returns.

    If it is cut short, the same call goes on: the log says that it was begun. Returns: how many items. Raises: GalleryError.
    """
    last = [line for line in audit.lines_about(gallery.folder, identity)[-1:] if line["action"] == "forget begun"]
    if last and not gallery.count(_called(identity)):  # removed, but the files may not have been cleaned
        ids, items = [], int(last[0]["items"])
    else:
        ids = _ids_of(gallery, identity)
        items = len(ids)
        audit.note(gallery.folder, "forget begun", [identity], items)
    gallery.erase(ids)
    audit.note(gallery.folder, "forgotten", [identity], items)
    return items


def _relabel(gallery: Gallery, action: audit.Action, old: Sequence[str], new: str) -> int:
    _check_name(new)
    ids = [item_id for identity in old for item_id in _ids_of(gallery, identity)]
    folder = gallery.folder  # first: a gallery that is in none has no place for the line
    gallery.relabel(ids, identity=new)
    audit.note(folder, action, [*old, new], len(ids))
    return len(ids)


def _ids_of(gallery: Gallery, identity: str) -> list[int]:
    ids: list[int] = gallery.ids(_called(identity)).tolist()
    if not ids:
        raise GalleryError(f"{gallery.address}: nobody is called {identity}; nothing was changed")
    return ids


def _called(identity: str) -> Condition:
    return Condition("identity", "=", (identity,))


def _check_name(identity: str) -> None:
    if identity in NOBODY or not identity.strip():
        raise GalleryError(f"identity {identity!r}: cannot be anybody's name ({', '.join(NOBODY)} mark nobody); wanted another")


def _require_free(gallery: Gallery, identity: str, instead: str) -> None:
    if gallery.count(_called(identity)):
        raise GalleryError(f"{gallery.address}: {identity} is taken; nothing was changed; {instead}")
