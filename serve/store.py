"""What a gallery is kept in, behind one interface: a folder (serve/storage/folder_store.py), Milvus (serve/milvus/store.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, Unpack

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from serve.errors import EncoderMismatch, GalleryError
from serve.filters import Where
from serve.item import Item, Known
from serve.samples import Sample
from serve.storage.catalog_schema import Facts

if TYPE_CHECKING:  # who knows hits alone, as clients do, needs no encoder
    from serve.encoder import Encoder

Found: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores (Q, n), falling, and ids (Q, n); -inf and -1 where there are fewer."""


@dataclass(frozen=True)
class Description:
    """The index in words, what was measured when it was chosen as a table, and the size; None where a server keeps it."""

    index: str
    report: str
    bytes_on_disk: int | None


class Store(Protocol):
    """Items with their unit vectors. Safe from several threads. Every method raises GalleryError, in one line."""

    address: str
    facts: Facts

    @property
    def encoder_spec(self) -> str | None:
        """Where the encoder was last opened; None if nobody said."""

    @encoder_spec.setter
    def encoder_spec(self, spec: str) -> None: ...

    def add(
        self,
        samples: Sequence[Sample],
        vectors_ND: NDArray[np.float32],
        extra: Mapping[str, Mapping[str, JsonValue]],
        given_ids: Mapping[str, int] | None = None,
    ) -> list[int]:
        """Add items whose sources are not there yet; returns their ids, or those given, of which none was ever used."""

    def update(self, item_id: int, vector_D: NDArray[np.float32], source: str | None = None) -> None:
        """Give an item another vector and, if named, another source."""

    def relabel(self, ids: Sequence[int], **known: Unpack[Known]) -> None:
        """Say anew what is known about items."""

    def remove(self, ids: Sequence[int]) -> None:
        """Remove items; their ids are never used again. With unknown ids among them nothing is removed."""

    def __len__(self) -> int: ...

    def count(self, where: Where) -> int:
        """How many items pass."""

    def items(self, where: Where, limit: int | None = None, offset: int = 0) -> list[Item]:
        """Items in the order of their ids."""

    def ids(self, where: Where) -> NDArray[np.int64]:
        """Ids of the items that pass, growing."""

    def lookup(self, ids: Sequence[int], where: Where = ...) -> dict[int, Item]:
        """Those of these items that exist and pass."""

    def rows(self, where: Where) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Items that pass and their vectors (n, D), in blocks, by growing id; all of one state."""

    def vector(self, item_id: int) -> NDArray[np.float32] | None:
        """The vector (D,) of one item; None if there is no such item."""

    @property
    def next_id(self) -> int:
        """The id that the next item gets: none that is as high was ever used."""

    def known_sources(self, sources: Iterable[str]) -> list[str]:
        """Those of these sources that are there."""

    def distinct(self, field: str) -> list[str]:
        """The values of a text field, sorted naturally."""

    def nearest(self, queries_QD: NDArray[np.float32], k: int, where: Where, excluded: NDArray[np.int64]) -> Found:
        """The `k` items nearest by cosine that pass and are not `excluded`; equal scores in any order."""

    def describe(self) -> Description:
        """What it is."""

    def save(self) -> None:
        """Write what would take the next opening long to derive."""

    def close(self) -> None:
        """Close; safe to call twice."""


def facts_of(encoder: Encoder) -> Facts:
    """What a gallery says of the encoder that made its vectors."""
    manifest = encoder.manifest
    return Facts(encoder.encoder_id, manifest.name, manifest.embedding_dim, manifest.model_dump_json(indent=2))


def check_encoder(address: str, facts: Facts, wanted: Facts | None) -> None:
    """Raises: EncoderMismatch if the vectors at `address` are another encoder's than the one wanted."""
    if wanted is not None and wanted.encoder_id != facts.encoder_id:
        anew = "embed anew: simclr gallery add NEW --images SRC --encoder ENC"
        change_over = anew if "://" in address else f"change over: simclr gallery reembed {address} --encoder ENC"
        raise EncoderMismatch(
            f"{address}: its vectors are of encoder {facts.encoder_id} ({facts.encoder_name}), this is {wanted.encoder_id} "
            f"({wanted.encoder_name}); use the former, or {change_over}"
        )


def needed(address: str, facts: Facts | None) -> Facts:
    """What a new gallery is made of. Raises: GalleryError."""
    if facts is None:
        raise GalleryError(f"{address}: a new gallery needs the encoder that will make its vectors; give --encoder ENC")
    return facts
