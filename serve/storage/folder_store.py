"""The store of a gallery in a folder: the catalog, which is the truth, and the index derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.catalog import Catalog
from serve.errors import GalleryError, Reembedded
from serve.filters import Where
from serve.index import Index
from serve.item import require_known
from serve.samples import Sample
from serve.storage.catalog_schema import Facts
from serve.storage.gallery_folder import CATALOG_NAME, INDEX_NAME, bytes_on_disk, prepare_folder, tidy
from serve.storage.kept_pictures import PICTURES_NAME, unlink_kept, unlink_strays
from serve.store import Description, Found


def open_folder(folder: Path, facts: Facts | None, *, create: bool) -> FolderStore:
    """The gallery in a folder; with `create`, it is made if there is none. Raises: GalleryError."""
    made_of = prepare_folder(folder, facts) if create else None
    if not folder.is_dir():
        raise GalleryError(f"{folder}: no such gallery; make one: simclr gallery add {folder} --images SRC --encoder ENC")
    try:
        return FolderStore(folder, made_of)
    except Reembedded:  # in this very moment
        return FolderStore(folder, made_of)


class FolderStore(Catalog):
    """A catalog whose index follows it. Transactions, one writer at a time and any number of readers, over all processes."""

    def __init__(self, folder: Path, create: Facts | None) -> None:
        super().__init__(folder / CATALOG_NAME, create)
        self.folder, self.address = folder, str(folder)
        try:
            tidy(folder, self.facts.manifest)
            self.index = Index(self, folder / INDEX_NAME)
        except BaseException:
            super().close()
            raise

    def add(
        self,
        samples: Sequence[Sample],
        vectors_ND: NDArray[np.float32],
        extra: Mapping[str, Mapping[str, JsonValue]],
        given_ids: Mapping[str, int] | None = None,
    ) -> list[int]:
        """As of a Catalog."""
        ids = super().add(samples, vectors_ND, extra, given_ids)
        self.index.catch_up()
        return ids

    def update(self, item_id: int, vector_D: NDArray[np.float32], source: str | None = None) -> None:
        """As of a Catalog."""
        super().update(item_id, vector_D, source)
        self.index.catch_up()

    def remove(self, ids: Sequence[int]) -> None:
        """As of a Catalog; the pictures that the gallery itself keeps of them go first, while it is known which they are."""
        if (self.folder / PICTURES_NAME).is_dir():
            items = self.lookup(ids)
            require_known(ids, items, self.address, "nothing was removed")
            unlink_kept(self.folder, (item.source for item in items.values()))
        super().remove(ids)
        self.index.catch_up()

    def nearest(self, queries_QD: NDArray[np.float32], k: int, where: Where, excluded: NDArray[np.int64]) -> Found:
        """As of a Store."""
        allowed = self.ids(where) if where else None  # before catching up: the index then holds all of them
        self.index.catch_up()
        return self.index.search(queries_QD, k, allowed=allowed, excluded=excluded)

    def scrub(self) -> None:
        """Clean the files, the index's too, of all that any removed or changed item left in them. Raises: GalleryError."""
        if (self.folder / PICTURES_NAME).is_dir():
            unlink_strays(self.folder, self.distinct("source"))
        self.index.rebuild()
        super().scrub()
        for left in (self.folder / INDEX_NAME).glob(".base-*"):
            raise GalleryError(f"{left}: cannot be removed, and holds the vectors of what was; remove it by hand")

    def problems(self) -> list[str]:
        """As of a Catalog, and where the index differs from it."""
        return super().problems() + self.index.problems()

    def repair(self) -> None:
        """Derive anew all that is derived. Raises: GalleryError."""
        super().repair()
        self.index.rebuild()

    def describe(self) -> Description:
        """As of a Store."""
        return Description(self.index.describe(), self.index.report(), bytes_on_disk(self.folder))

    def save(self) -> None:
        """Write the index. Raises: GalleryError; nothing is lost then."""
        self.index.save()

    def close(self) -> None:
        """Close; the index is saved if that spares the next opening much."""
        self.index.close()
        super().close()
