"""GALLERY/pictures: what was uploaded and enrolled, for an upload does not last. A file goes with the item that it belongs to.

It is called by its content's SHA-256, so that the same upload is the same item.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path, PurePath

from serve.errors import GalleryError
from serve.files import atomic_path
from serve.preprocess import decode

PICTURES_NAME = "pictures"
_FRESH_S = 600
"""A younger file may be about to get its item."""


def keep(folder: Path, encoded: bytes) -> Path:
    """Write a picture into the folder of a gallery; returns its absolute path. Raises: ImageError, GalleryError."""
    decode(encoded)
    path = folder.absolute() / PICTURES_NAME / hashlib.sha256(encoded).hexdigest()
    try:
        with atomic_path(path) as temporary:  # anew even if it is there: it is fresh then
            temporary.write_bytes(encoded)
    except OSError as error:
        raise GalleryError(f"{path.parent}: cannot keep a picture ({error.strerror}); free some space or allow it") from error
    return path


def unlink_kept(folder: Path, sources: Iterable[str]) -> None:
    """Remove those of these pictures that the gallery keeps. Raises: GalleryError."""
    pictures = folder.absolute() / PICTURES_NAME
    for path in map(Path, sources):
        if path.parent == pictures:
            _unlink(path)


def unlink_strays(folder: Path, sources: Iterable[str]) -> None:
    """Remove those that none of a gallery's `sources` is, as a killed process may leave it. Raises: GalleryError."""
    used = {PurePath(source).name for source in sources}  # by name, for the folder may have been moved since
    for path in (folder / PICTURES_NAME).iterdir():
        if path.name not in used and time.time() - path.stat().st_mtime > _FRESH_S:
            _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise GalleryError(f"{path}: cannot be removed ({error.strerror}); allow it, or remove it by hand") from error
