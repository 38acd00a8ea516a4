"""A gallery: pictures, what is known about them, and the search over their vectors. A store + an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, Unpack, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.ann.choice import IndexLimits
from serve.encoder import Encoder
from serve.errors import GalleryError, NoSuchItem
from serve.filters import Where, as_where
from serve.index import unit_vectors
from serve.item import Item, Known
from serve.pictures import Picture
from serve.samples import Sample, Unreadable
from serve.search import Hit, Searcher
from serve.sources import misnamed, name_fault, read_batches
from serve.storage.folder_store import FolderStore, open_folder
from serve.store import Store, check_encoder, facts_of

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
    bytes_on_disk: int | None
    """None where a server keeps it."""


class Gallery:
    """Open with `Gallery.open`; a context manager. Safe from several threads."""

    def __init__(self, store: Store, encoder: Encoder | None) -> None:
        self.encoder = encoder
        self._store = store
        self._searcher = Searcher(store)

    @classmethod
    def open(cls, uri: str | Path, encoder: Encoder | None = None, *, create: bool = False) -> Self:
        """Open the gallery in a folder, at `milvus://HOST:PORT/COLLECTION` or `milvus-lite:///FILE.db`.

        With `create`, it is made first if there is none. Without an encoder: for search by vector, listing and maintenance.
        Raises: GalleryError if there is no gallery, EncoderMismatch if another encoder made its vectors.
        """
        facts = None if encoder is None else facts_of(encoder)
        if "://" in str(uri):
            from serve.milvus.store import open_milvus

            store: Store = open_milvus(str(uri), facts, create=create)
        else:
            store = open_folder(Path(uri), facts, create=create)
        try:
            check_encoder(store.address, store.facts, facts)
            return cls(store, encoder)
        except BaseException:
            store.close()
            raise

    @property
    def address(self) -> str:
        """Its folder, or its address in Milvus."""
        return self._store.address

    @property
    def folder(self) -> Path:
        """Its folder. Raises: GalleryError if it has none."""
        return self._in_folder("what is kept beside a gallery").folder

    @property
    def encoder_id(self) -> str:
        """Whose vectors it holds."""
        return self._store.facts.encoder_id

    @property
    def manifest(self) -> str:
        """The manifest, as JSON, of the encoder whose vectors it holds."""
        return self._store.facts.manifest

    @property
    def encoder_spec(self) -> str | None:
        """Where its encoder was last opened, so that searching need not name it again; None if nobody said."""
        return self._store.encoder_spec

    @encoder_spec.setter
    def encoder_spec(self, spec: str) -> None:
        self._store.encoder_spec = spec

    def add(
        self,
        samples: Sequence[Sample],
        vectors: NDArray[np.float32] | None = None,
        *,
        extra: Mapping[str, Mapping[str, JsonValue]] | None = None,
        ids: Mapping[str, int] | None = None,
        batch_size: int = 256,
        on_batch: Callable[[int], object] | None = None,
    ) -> AddReport:
        """Add pictures, embedding them unless their `vectors` (N, D) are given; committed batch by batch.

        A source that is in the gallery is skipped, so a broken run is resumed by repeating it. `extra`: source -> more facts.
        `ids`: source -> the id that it shall have, for a copy of another gallery; one that was ever used is refused.
        `on_batch` is called with the number of samples each batch dealt with; they sum up to N (for a progress bar).
        Raises: GalleryError; earlier batches stay.
        """
        unit = None if vectors is None else self._given(vectors, len(samples))
        unreadable = misnamed(samples)
        fresh = self._fresh(samples)
        todo = [samples[place] for place in fresh]
        batches = self._embedded(todo, batch_size) if unit is None else _cut(todo, unit[fresh], batch_size)
        added: list[int] = []
        tell = on_batch or (lambda _: None)
        tell(len(samples) - len(fresh))
        for good, vectors_ND, bad in batches:
            added += self._store.add(good, vectors_ND, extra or {}, ids)
            unreadable += bad
            tell(len(good) + len(bad))
        return AddReport(tuple(added), tuple(unreadable), len(samples) - len(added) - len(unreadable))

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
        for source in self._store.known_sources(places):
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
        self._store.update(int(item_id), vector_D, source)

    def relabel(self, ids: Iterable[int], **known: Unpack[Known]) -> None:
        """Say anew what is known about items: label, identity, camera, time, extra; all of them or, on a GalleryError, none.

        None makes a fact unknown. `extra` is laid over what is there; what it has None for goes.
        """
        self._store.relabel([int(item_id) for item_id in ids], **known)

    def remove(self, ids: Iterable[int]) -> None:
        """Remove items; their ids are never used again. Raises: NoSuchItem naming unknown ids; nothing is removed then."""
        self._store.remove([int(item_id) for item_id in ids])

    def erase(self, ids: Iterable[int]) -> None:
        """`remove`, and clean the files of all that any removed or changed item left in them; takes as long as `rebuild`.

        Raises: GalleryError. If it says that items are unknown, nothing was done; else call it again, with no ids.
        """
        store = self._in_folder("erase")
        self.remove(ids)
        store.scrub()

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

    @property
    def next_id(self) -> int:
        """The id that the next item gets: none that is as high was ever used."""
        return self._store.next_id

    def __len__(self) -> int:
        return len(self._store)

    def item(self, item_id: int) -> Item:
        """One item. Raises: NoSuchItem, GalleryError."""
        found = self._store.lookup([int(item_id)])
        if not found:
            raise NoSuchItem(f"{self.address}: no item with id {item_id}")
        return found[int(item_id)]

    def items(self, where: str | Where | None = None, limit: int | None = None, offset: int = 0) -> list[Item]:
        """Items that pass `where`, in the order they were added."""
        return self._store.items(as_where(where), limit, offset)

    def ids(self, where: str | Where | None = None) -> NDArray[np.int64]:
        """Ids (n,) of the items that pass `where`, growing."""
        return self._store.ids(as_where(where))

    def count(self, where: str | Where | None = None) -> int:
        """How many items pass `where`."""
        return self._store.count(as_where(where))

    def rows(self, where: str | Where | None = None) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Items that pass `where`, with vectors (n, D), in blocks, by growing id; all of one state. Raises: GalleryError."""
        return self._store.rows(as_where(where))

    def vector(self, item_id: int) -> NDArray[np.float32]:
        """The unit vector (D,) of an item. Raises: NoSuchItem, GalleryError."""
        vector = self._store.vector(int(item_id))
        if vector is None:
            raise NoSuchItem(f"{self.address}: no item with id {item_id}")
        return vector

    def distinct(self, field: str) -> list[str]:
        """The values of label, identity, camera or source, sorted naturally."""
        return self._store.distinct(field)

    def info(self) -> GalleryInfo:
        """Count, encoder, index and size."""
        facts, kept = self._store.facts, self._store.describe()
        return GalleryInfo(
            count=len(self),
            embedding_dim=facts.embedding_dim,
            encoder_id=facts.encoder_id,
            encoder_name=facts.encoder_name,
            index=kept.index,
            index_report=kept.report,
            bytes_on_disk=kept.bytes_on_disk,
        )

    def rebuild(self) -> None:
        """Derive the index anew from the catalog, and save it. Raises: GalleryError."""
        self._in_folder("rebuild").index.rebuild()

    @property
    def limits(self) -> IndexLimits:
        """What the index is chosen by."""
        return self._in_folder("tune").index.limits

    def tune(self, limits: IndexLimits) -> None:
        """Choose the index anew, by measuring, under other limits, which stay. Raises: GalleryError."""
        self._in_folder("tune").index.rebuild(limits)

    def verify(self) -> list[str]:
        """What is wrong, one line each: the catalog's file, every row and vector of it, index against catalog."""
        return self._in_folder("verify").problems()

    def repair(self) -> None:
        """Derive anew all that is derived: SQLite's own indexes and the index of vectors. Raises: GalleryError."""
        self._in_folder("repair").repair()

    def _in_folder(self, purpose: str) -> FolderStore:
        if not isinstance(self._store, FolderStore):
            raise GalleryError(f"{self.address}: {purpose} is for galleries in folders; Milvus keeps files and indexes itself")
        return self._store

    def save(self) -> None:
        """Write what spares the next opening work: a folder's index. Raises: GalleryError; nothing is lost then."""
        self._store.save()

    def close(self) -> None:
        """Close; an index is saved if that spares the next opening much. Never loses anything."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _dim(self) -> int:
        return self._store.facts.embedding_dim

    def _need_encoder(self, purpose: str) -> Encoder:
        if self.encoder is None:
            raise GalleryError(f"{self.address}: opened without an encoder, which is needed {purpose}; give --encoder ENC")
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
