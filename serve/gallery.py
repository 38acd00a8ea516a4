"""A gallery: pictures, what is known about them, and the search over their vectors. Catalog + index + encoder.

GALLERY/catalog.sqlite is the truth; index.faiss is derived from it; gallery.json is a copy, for people and other programs,
of the manifest of the encoder that made the vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.catalog import Catalog, Facts, Item
from serve.encoder import Encoder, Picture
from serve.errors import EncoderMismatch, GalleryError
from serve.files import atomic_path
from serve.filters import Where, parse_where
from serve.index import Index, unit_vectors
from serve.sources import Sample, Unreadable, name_fault, printable, read_batches

CATALOG_NAME, INDEX_NAME, MANIFEST_COPY_NAME = "catalog.sqlite", "index.faiss", "gallery.json"
log = logging.getLogger(__name__)

_Batch: TypeAlias = tuple[list[Sample], NDArray[np.float32], list[Unreadable]]


@dataclass(frozen=True)
class Hit(Item):
    """An item found; `score` is its cosine with the query, in [-1, 1]."""

    score: float


@dataclass(frozen=True)
class AddReport:
    """What `Gallery.add` did: new ids in order, pictures left out, and how many sources were there already."""

    ids: tuple[int, ...]
    unreadable: tuple[Unreadable, ...]
    already_present: int


@dataclass(frozen=True)
class GalleryInfo:
    """What a gallery is."""

    count: int
    embedding_dim: int
    encoder_id: str
    encoder_name: str
    index: str
    """The state of the index, in words."""
    bytes_on_disk: int


class Gallery:
    """Open with `Gallery.open`; a context manager. Safe from several threads."""

    def __init__(self, folder: Path, catalog: Catalog, encoder: Encoder | None) -> None:
        self.folder, self.encoder = folder, encoder
        self._catalog = catalog
        self._index = Index(catalog, folder / INDEX_NAME)

    @classmethod
    def open(cls, uri: str | Path, encoder: Encoder | None = None, *, create: bool = False) -> Self:
        """Open the gallery in folder `uri`; with `create`, make it first if there is none.

        Without an encoder: for search by vector, listing and maintenance.
        Raises: GalleryError if there is no gallery, EncoderMismatch if another encoder made its vectors.
        """
        if "://" in str(uri):
            raise GalleryError(f"{uri}: galleries are folders here; give the path of a folder")
        folder = Path(uri)
        facts = _prepare_folder(folder, encoder) if create else None
        if not folder.is_dir():
            raise GalleryError(f"{folder}: no such gallery; make one: simclr gallery add {folder} --images SRC --encoder ENC")
        catalog = Catalog(folder / CATALOG_NAME, facts)
        try:
            _check_encoder(folder, catalog.facts, encoder)
            _copy_manifest(folder / MANIFEST_COPY_NAME, catalog.facts.manifest)
            return cls(folder, catalog, encoder)
        except BaseException:
            catalog.close()
            raise

    @property
    def encoder_spec(self) -> str | None:
        """Where its encoder was last opened, so that searching need not name it again; None if nobody said."""
        return self._catalog.encoder_spec

    @encoder_spec.setter
    def encoder_spec(self, spec: str) -> None:
        self._catalog.encoder_spec = spec

    def add(
        self,
        samples: Sequence[Sample],
        vectors: NDArray[np.float32] | None = None,
        *,
        extra: Mapping[str, Mapping[str, JsonValue]] | None = None,
        batch_size: int = 256,
        on_batch: Callable[[int], object] | None = None,
    ) -> AddReport:
        """Add pictures, embedding them unless their `vectors` (N, D) are given; committed batch by batch.

        A source that is in the gallery is skipped, so a broken run is resumed by repeating it. `extra`: source -> more facts.
        `on_batch` is called with the number of samples each batch dealt with; they sum up to N (for a progress bar).
        Raises: GalleryError; earlier batches stay.
        """
        unit = None if vectors is None else self._given(vectors, len(samples))
        unreadable = [Unreadable(printable(s.source), fault) for s in samples if (fault := name_fault(s.source)) is not None]
        fresh = self._fresh(samples)
        todo = [samples[place] for place in fresh]
        batches = self._embedded(todo, batch_size) if unit is None else _cut(todo, unit[fresh], batch_size)
        ids: list[int] = []
        tell = on_batch or (lambda _: None)
        tell(len(samples) - len(fresh))
        for good, vectors_ND, bad in batches:
            ids += self._catalog.add(good, vectors_ND, extra or {})
            self._index.catch_up()
            unreadable += bad
            tell(len(good) + len(bad))
        return AddReport(tuple(ids), tuple(unreadable), len(samples) - len(ids) - len(unreadable))

    def _given(self, vectors: NDArray[np.float32], wanted: int) -> NDArray[np.float32]:
        if len(vectors) != wanted:
            raise GalleryError(f"got {len(vectors)} vectors for {wanted} samples; give one vector per sample")
        return unit_vectors(vectors, self._dim, "vectors to add")

    def _fresh(self, samples: Sequence[Sample]) -> list[int]:
        """Where the sources that are not in the gallery stand first."""
        places: dict[str, int] = {}
        for place, sample in enumerate(samples):
            if name_fault(sample.source) is None:
                places.setdefault(sample.source, place)
        for source in self._catalog.known_sources(places):
            del places[source]
        return list(places.values())

    def _embedded(self, samples: Sequence[Sample], batch_size: int) -> Iterator[_Batch]:
        encoder = self._need_encoder("to add pictures without their vectors")
        for good, pixels, bad in read_batches(samples, encoder.manifest.preprocess, batch_size):
            yield good, unit_vectors(encoder.embed(list(pixels)), self._dim, "the encoder's vectors"), bad

    def remove(self, ids: Iterable[int]) -> None:
        """Remove items; their ids are never used again. Raises: GalleryError naming unknown ids; nothing is removed then."""
        self._catalog.remove([int(item_id) for item_id in ids])
        self._index.catch_up()

    def search(
        self,
        query: Picture | NDArray[np.floating],
        k: int = 10,
        where: str | Where | None = None,
        exclude_ids: Iterable[int] = (),
    ) -> list[Hit]:
        """The `k` items most similar to a picture or a vector (D,), best first; fewer only if fewer pass `where`.

        Filtered search is exact: the nearest of those allowed, not what is left of the nearest.
        Raises: GalleryError, ImageError.
        """
        if k < 1:
            raise GalleryError(f"search: k is {k}, wanted 1 or more")
        query_D = self._query_vector(query)
        excluded = np.array([int(item_id) for item_id in exclude_ids], np.int64)
        wanted = _where(where)
        while True:
            allowed = self.ids(wanted) if wanted.conditions else None  # before catching up: the index then holds all of them
            self._index.catch_up()
            scores, ids = self._index.search(query_D, k, allowed=allowed, excluded=excluded)
            items = self._catalog.lookup(ids.tolist())
            if len(items) == len(ids):  # else one was removed meanwhile, and another deserves its place
                return [Hit(**vars(items[i]), score=s) for i, s in zip(ids.tolist(), scores.clip(-1, 1).tolist(), strict=True)]

    def _query_vector(self, query: Picture | NDArray[np.floating]) -> NDArray[np.float32]:
        if isinstance(query, np.ndarray) and query.ndim != 3:  # three axes are a prepared picture
            rows = unit_vectors(query[None], self._dim, "query")
        else:
            picture = cast("Picture", query)
            rows = unit_vectors(self._need_encoder("to search by picture").embed([picture]), self._dim, "the encoder's vector")
        query_D: NDArray[np.float32] = rows[0]
        return query_D

    def __len__(self) -> int:
        return len(self._catalog)

    def item(self, item_id: int) -> Item:
        """One item. Raises: GalleryError if it does not exist."""
        found = self._catalog.lookup([int(item_id)])
        if not found:
            raise GalleryError(f"{self.folder}: no item with id {item_id}")
        return found[int(item_id)]

    def items(self, where: str | Where | None = None, limit: int | None = None, offset: int = 0) -> list[Item]:
        """Items that pass `where`, in the order they were added."""
        return self._catalog.items(_where(where), limit, offset)

    def ids(self, where: str | Where | None = None) -> NDArray[np.int64]:
        """Ids (n,) of the items that pass `where`, growing."""
        return self._catalog.ids(_where(where))

    def vector(self, item_id: int) -> NDArray[np.float32]:
        """The unit vector (D,) of an item. Raises: GalleryError if it does not exist."""
        vector = self._catalog.vector(int(item_id))
        if vector is None:
            raise GalleryError(f"{self.folder}: no item with id {item_id}")
        return vector

    def distinct(self, field: str) -> list[str]:
        """The values of label, identity, camera or source, sorted naturally."""
        return self._catalog.distinct(field)

    def info(self) -> GalleryInfo:
        """Count, encoder, index and size."""
        facts = self._catalog.facts
        return GalleryInfo(
            count=len(self),
            embedding_dim=facts.embedding_dim,
            encoder_id=facts.encoder_id,
            encoder_name=facts.encoder_name,
            index=f"exact, {len(self._index):,} vectors, {self._index.unsaved:,} changes not yet in {INDEX_NAME}",
            bytes_on_disk=sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file()),
        )

    def rebuild(self) -> None:
        """Derive the index anew from the catalog, and save it. Raises: GalleryError."""
        self._index.rebuild()
        self._index.save()

    def verify(self) -> list[str]:
        """What is wrong, one line each: the catalog's file, sizes and lengths of vectors, index against catalog."""
        return self._catalog.problems() + self._index.problems()

    def save(self) -> None:
        """Write the index, so that the next opening has nothing to replay. Raises: GalleryError; nothing is lost then."""
        self._index.save()

    def close(self) -> None:
        """Close; the index is saved if that spares the next opening much. Never loses anything: the catalog has it all."""
        if self._index.unsaved * 10 > len(self._index):  # replaying the last tenth costs less than writing all anew
            try:
                self._index.save()
            except GalleryError as error:
                log.warning("%s", error)
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _dim(self) -> int:
        return self._catalog.facts.embedding_dim

    def _need_encoder(self, purpose: str) -> Encoder:
        if self.encoder is None:
            raise GalleryError(f"{self.folder}: opened without an encoder, which is needed {purpose}; give --encoder ENC")
        return self.encoder


def _where(where: str | Where | None) -> Where:
    return where if isinstance(where, Where) else parse_where(where or "")


def _cut(samples: list[Sample], vectors_ND: NDArray[np.float32], batch_size: int) -> Iterator[_Batch]:
    for start in range(0, len(samples), batch_size):
        yield samples[start : start + batch_size], vectors_ND[start : start + batch_size], []


def _prepare_folder(folder: Path, encoder: Encoder | None) -> Facts | None:
    """Make an empty folder for a gallery, unless it is one. Raises: GalleryError if something else is there."""
    catalog = folder / CATALOG_NAME
    exists = catalog.is_file() and catalog.stat().st_size > 0
    if encoder is None:
        if exists:
            return None
        raise GalleryError(f"{folder}: a new gallery needs the encoder that will make its vectors; give --encoder ENC")
    if folder.exists() and not folder.is_dir():
        raise GalleryError(f"{folder}: is a file; a gallery is a folder, give another name")
    ours = (".", CATALOG_NAME, "lost+found")
    others = (
        []
        if exists or not folder.exists()
        else sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
    )
    if others:
        raise GalleryError(f"{folder}: holds {others[0]} and no catalog, so it is no gallery; give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = encoder.manifest
    return Facts(encoder.encoder_id, manifest.name, manifest.embedding_dim, manifest.model_dump_json(indent=2))


def _check_encoder(folder: Path, facts: Facts, encoder: Encoder | None) -> None:
    if encoder is not None and encoder.encoder_id != facts.encoder_id:
        raise EncoderMismatch(
            f"{folder}: its vectors are of encoder {facts.encoder_id} ({facts.encoder_name}), this is {encoder.encoder_id} "
            f"({encoder.manifest.name}); use the former, or embed anew: simclr gallery add NEW --images SRC --encoder ENC"
        )


def _copy_manifest(path: Path, manifest: str) -> None:
    try:
        if not path.is_file() or path.read_text() != manifest:
            with atomic_path(path) as temporary:
                temporary.write_text(manifest)
    except OSError as error:  # only a copy: a full disk must not keep anyone from searching
        log.warning("%s: not written (%s)", path, error.strerror)
