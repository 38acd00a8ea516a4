"""Who is enrolled in a gallery, some at a time: a gallery may hold many more identities than a page can show."""

from __future__ import annotations

from dataclasses import dataclass

from serve.errors import GalleryError
from serve.filters import Condition
from serve.gallery import Gallery
from serve.identity.identify import enrolled_identities
from serve.item import Item, natural_key

LOOKED_AT = 500
"""Pictures of one identity whose cameras are told."""


@dataclass(frozen=True)
class Person:
    """One identity."""

    identity: str
    pictures: int
    cameras: tuple[str, ...]
    """Those of its first LOOKED_AT pictures, sorted."""
    example: Item


def person(gallery: Gallery, identity: str) -> Person:
    """Raises: GalleryError if nobody is called so."""
    called = Condition("identity", "=", (identity,))
    items = gallery.items(called, limit=LOOKED_AT)
    if not items:
        raise GalleryError(f"{gallery.address}: nobody is called {identity}")
    cameras = sorted({item.camera for item in items if item.camera is not None}, key=natural_key)
    pictures = len(items) if len(items) < LOOKED_AT else gallery.count(called)
    return Person(identity, pictures, tuple(cameras), items[0])


def names(gallery: Gallery, part: str = "") -> list[str]:
    """Identities whose names contain `part`, in any case, sorted naturally."""
    wanted = part.casefold()
    return sorted((name for name in enrolled_identities(gallery) if wanted in name.casefold()), key=natural_key)
