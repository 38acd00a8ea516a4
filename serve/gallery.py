"""A gallery: pictures, what is known about them, and the search over their vectors. Catalog + index + encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, Unpack, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.ann.choice import IndexLimits
from serve.catalog import Catalog, Item, Known
from serve.encoder import Encoder
from serve.errors import GalleryError
from serve.filters import Where, as_where
from serve.gallery_folder import CATALOG_NAME, INDEX_NAME, bytes_on_disk, check_encoder, prepare_folder, tidy
from serve.index import Index, unit_vectors
from serve.pictures import Picture
from serve.search import Hit, Searcher
from serve.sources import Sample, Unreadable, name_fault, printable, read_batches

_Batch: TypeAlias = tuple[list[Sample], NDArray[np.float32], list[Unreadable]]


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
    index_report: str
    """What was measured when it was chosen, as a table; empty as long as search is exact."""
    bytes_on_disk: int


class Gallery:
    """Open with `Gallery.open`; a context manager. Safe from several threads."""

    def __init__(self, folder: Path, catalog: Catalog, encoder: Encoder | None) -> None:
        self.folder, self.encoder = folder, encoder
        self._catalog = catalog
        self._index = Index(catalog, folder / INDEX_NAME)
        self._searcher = Searcher(catalog, self._index)

    @classmethod
    def open(cls, uri: str | Path, encoder: Encoder | None = None, *, create: bool = False) -> Self:
        """Open the gallery in folder `uri`; with `create`, make it first if there is none.

        Without an encoder: for search by vector, listing and maintenance.
        Raises: GalleryError if there is no gallery, EncoderMismatch if another encoder made its vectors.
        """
        if "://" in str(uri):
            raise GalleryError(f"{uri}: galleries are folders here; give the path of a folder")
        folder = Path(uri)
        facts = prepare_folder(folder, encoder) if create else None
        if not folder.is_dir():
            raise GalleryError(f"{folder}: no such gallery; make one: simclr gallery add {folder} --images SRC --encoder ENC")
        catalog = Catalog(folder / CATALOG_NAME, facts)
        try:
            check_encoder(folder, catalog.facts, encoder)
            tidy(folder, catalog.facts.manifest)
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

    def update(self, item_id: int, picture: Picture | NDArray[np.floating], *, source: str | None = None) -> None:
        """Give an item the vector of another picture, or a vector (D,), and another source if one is named.

        Raises: GalleryError, ImageError; nothing is changed then.
        """
        vector_D = self._vector_of(picture, "the new vector", "to update an item by a picture")
        self._catalog.update(int(item_id), vector_D, source)
        self._index.catch_up()

    def relabel(self, ids: Iterable[int], **known: Unpack[Known]) -> None:
        """Say anew what is known about items: label, identity, camera, time, extra; all of them or, on a GalleryError, none.

        None makes a fact unknown. `extra` is laid over what is there; what it has None for goes.
        """
        self._catalog.relabel([int(item_id) for item_id in ids], **known)

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
        *,
        offset: int = 0,
    ) -> list[Hit]:
        """The `k` items most similar to a picture or a vector (D,), best first; fewer only if fewer pass `where`.

        Filtered search finds the nearest of those allowed, not what is left of the nearest. `offset` skips the best so many,
        for the next page; equal scores stand in the order of their ids. Raises: GalleryError, ImageError.
        """
        _check_page(k, offset)
        return self._searcher.best(self._query(query), k + offset, as_where(where), _ids(exclude_ids))[offset:]

    def within(
        self,
        query: Picture | NDArray[np.floating],
        threshold: float,
        where: str | Where | None = None,
        limit: int | None = None,
        exclude_ids: Iterable[int] = (),
        *,
        offset: int = 0,
    ) -> list[Hit]:
        """The items whose score is `threshold` or more, `limit` at most; as `search`. Raises: GalleryError, ImageError."""
        if not -1 <= threshold <= 1:
            raise GalleryError(f"search: threshold is {threshold}, wanted -1 to 1")
        _check_page(limit, offset)
        most = None if limit is None else limit + offset
        return self._searcher.within(self._query(query), threshold, as_where(where), most, _ids(exclude_ids))[offset:]

    def search_many(
        self, queries_QD: NDArray[np.floating], k: int = 10, where: str | Where | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores (Q, k), falling, and ids (Q, k) for many vectors; -inf and -1 where fewer pass. Raises: GalleryError."""
        _check_page(k)
        return self._searcher.many(unit_vectors(queries_QD, self._dim, "queries"), k, as_where(where))

    def _query(self, query: Picture | NDArray[np.floating]) -> NDArray[np.float32]:
        return self._vector_of(query, "query", "to search by picture")

    def _vector_of(self, picture: Picture | NDArray[np.floating], name: str, purpose: str) -> NDArray[np.float32]:
        """The unit vector (D,) of a picture, or of a vector."""
        if isinstance(picture, np.ndarray) and picture.ndim != 3:  # three axes are a prepared picture
            rows = unit_vectors(picture[None], self._dim, name)
        else:
            rows = self._need_encoder(purpose).embed([cast("Picture", picture)])
            rows = unit_vectors(rows, self._dim, "the encoder's vector")
        vector_D: NDArray[np.float32] = rows[0]
        return vector_D

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
        return self._catalog.items(as_where(where), limit, offset)

    def ids(self, where: str | Where | None = None) -> NDArray[np.int64]:
        """Ids (n,) of the items that pass `where`, growing."""
        return self._catalog.ids(as_where(where))

    def count(self, where: str | Where | None = None) -> int:
        """How many items pass `where`."""
        return self._catalog.count(as_where(where))

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
            index=self._index.describe(),
            index_report=self._index.report(),
            bytes_on_disk=bytes_on_disk(self.folder),
        )

    def rebuild(self) -> None:
        """Derive the index anew from the catalog, and save it. Raises: GalleryError."""
        self._index.rebuild()

    @property
    def limits(self) -> IndexLimits:
        """What the index is chosen by."""
        return self._index.limits

    def tune(self, limits: IndexLimits) -> None:
        """Choose the index anew, by measuring, under other limits, which stay. Raises: GalleryError."""
        self._index.rebuild(limits)

    def verify(self) -> list[str]:
        """What is wrong, one line each: the catalog's file, every row and vector of it, index against catalog."""
        return self._catalog.problems() + self._index.problems()

    def repair(self) -> None:
        """Derive anew all that is derived: SQLite's own indexes and the index of vectors. Raises: GalleryError."""
        self._catalog.repair()
        self.rebuild()

    def save(self) -> None:
        """Write the index, so that the next opening has nothing to replay. Raises: GalleryError; nothing is lost then."""
        self._index.save()

    def close(self) -> None:
        """Close; the index is saved if that spares the next opening much. Never loses anything: the catalog has it all."""
        self._index.close()
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


def _check_page(k: int | None, offset: int = 0) -> None:
    if k is not None and k < 1:
        raise GalleryError(f"search: k is {k}, wanted 1 or more")
    if offset < 0:
        raise GalleryError(f"search: offset is {offset}, wanted 0 or more")


def _ids(ids: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(ids, np.int64)


def _cut(samples: list[Sample], vectors_ND: NDArray[np.float32], batch_size: int) -> Iterator[_Batch]:
    for start in range(0, len(samples), batch_size):
        yield samples[start : start + batch_size], vectors_ND[start : start + batch_size], []
