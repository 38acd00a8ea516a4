"""One gallery into another, in a folder or in Milvus: vectors and all that is known, without embedding anything again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.contract import Manifest
from serve.filters import Condition
from serve.gallery import Gallery
from serve.item import Item, sample_of
from serve.transfer.declared import Declared


@dataclass(frozen=True)
class CopyReport:
    """How many items came in, how many of those with their ids, and how many sources were there already."""

    copied: int
    kept_ids: int
    already_present: int
    count: int
    """Of items in the copy now."""


def copy_gallery(original: str, copy: str) -> CopyReport:
    """Add all items of a gallery to another of the same encoder, which is made if need be; repeated, it goes on.

    Items keep their ids where these are higher than any that the copy ever used: all of them, in an empty one. Else they get
    new ones. Raises: EncoderMismatch, GalleryError; blocks before that are in.
    """
    with Gallery.open(original) as source, _opened(copy, source) as target:
        copied = kept = present = 0
        with tqdm(total=len(source), desc="copying", unit="vec", dynamic_ncols=True) as bar:
            for items, vectors_ND in source.rows():
                ids = _add(target, items, vectors_ND)
                copied += len(ids)
                kept += sum(ids.get(item.source) == item.id for item in items)
                present += len(items) - len(ids)
                bar.update(len(items))
        return CopyReport(copied, kept, present, len(target))


def _opened(copy: str, source: Gallery) -> Gallery:
    target = Gallery.open(copy, Declared(Manifest.parse(source.manifest, source.address)), create=True)
    if target.encoder_spec is None and source.encoder_spec is not None:
        target.encoder_spec = source.encoder_spec
    return target


def _add(target: Gallery, items: list[Item], vectors_ND: NDArray[np.float32]) -> dict[str, int]:
    """Returns: source -> id of those that were not there."""
    there = {item.source for item in target.items(Condition("source", "in", tuple(item.source for item in items)))}
    fresh = [row for row, item in enumerate(items) if item.source not in there]
    if not fresh:
        return {}
    chosen = [items[row] for row in fresh]
    keeps = chosen[0].id >= target.next_id
    report = target.add(
        [sample_of(item) for item in chosen],
        vectors_ND[fresh],
        extra={item.source: item.extra for item in chosen},
        ids={item.source: item.id for item in chosen} if keeps else None,
        batch_size=len(fresh),
    )
    return dict(zip((item.source for item in chosen), report.ids, strict=True))
