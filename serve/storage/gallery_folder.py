"""The folder of a gallery: what may become one, and the copy of the encoder's manifest in it.

catalog.sqlite is the truth; index/ is derived from it; gallery.json is a copy, for people and other programs, of the
manifest of the encoder that made the vectors.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from serve.errors import GalleryError
from serve.files import atomic_path
from serve.storage.catalog_schema import Facts
from serve.store import needed

CATALOG_NAME, INDEX_NAME, MANIFEST_COPY_NAME = "catalog.sqlite", "index", "gallery.json"
_FORMER_INDEX_NAME = "index.faiss"
log = logging.getLogger(__name__)


def prepare_folder(folder: Path, facts: Facts | None) -> Facts | None:
    """Make an empty folder for a gallery, unless it is one. Raises: GalleryError if something else is there.

    Returns: what a catalog there is to be made of, if it is missing.
    """
    catalog = folder / CATALOG_NAME
    exists = catalog.is_file() and catalog.stat().st_size > 0
    if exists and facts is None:
        return None
    made_of = needed(str(folder), facts)
    if folder.exists() and not folder.is_dir():
        raise GalleryError(f"{folder}: is a file; a gallery is a folder, give another name")
    folder.mkdir(parents=True, exist_ok=True)
    ours = (".", CATALOG_NAME, "lost+found")
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
    if others and not exists:
        raise GalleryError(f"{folder}: holds {others[0]} and no catalog, so it is no gallery; give a new or empty folder")
    return made_of


def tidy(folder: Path, manifest: str) -> None:
    """Make gallery.json right, and remove the index of former versions, which nobody reads any more."""
    path = folder / MANIFEST_COPY_NAME
    try:
        (folder / _FORMER_INDEX_NAME).unlink(missing_ok=True)
        if not path.is_file() or path.read_bytes() != manifest.encode():
            with atomic_path(path) as temporary:
                temporary.write_bytes(manifest.encode())
    except OSError as error:  # only a copy: a full disk must not keep anyone from searching
        log.warning("%s: not written (%s)", path, error.strerror)


def bytes_on_disk(folder: Path) -> int:
    """Of all its files."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # an old index, removed meanwhile
                total += (Path(root) / name).stat().st_size
    return total
