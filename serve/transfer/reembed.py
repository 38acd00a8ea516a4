"""A gallery gets another encoder: every picture is embedded anew while the old vectors are searched, then all change at once.

Ids, labels and whatever else is known stay. Killed at any moment, the next run goes on. Processes that have the gallery open
search the old vectors until they open it again, and can no longer write.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from serve.catalog import Catalog
from serve.encoder import Encoder
from serve.engines.quarantine import write_quarantine
from serve.errors import GalleryError, Reembedded
from serve.gallery import Gallery
from serve.index import unit_vectors
from serve.samples import Sample, Unreadable
from serve.sources import read_batches
from serve.storage.gallery_folder import CATALOG_NAME, INDEX_NAME
from serve.transfer.next_vectors import NextVectors, Version

QUARANTINE_NAME = "unreadable.jsonl"
_BLOCK_ITEMS = 4096


@dataclass(frozen=True)
class ReembedReport:
    """What `reembed` did: how many vectors are the new encoder's now, and the pictures that were removed."""

    count: int
    dropped: tuple[Unreadable, ...]
    quarantine: Path


def reembed(uri: str, encoder: Encoder, spec: str | None = None, *, drop_unreadable: bool = False) -> ReembedReport:
    """Make `encoder` the gallery's; `spec` says where it was opened. What others add, change or remove meanwhile counts.

    A picture that cannot be read any more is listed in GALLERY/unreadable.jsonl, and the gallery stays the old one's but for
    `drop_unreadable`. Raises: GalleryError, and what the encoder raises.
    """
    if "://" in uri:
        raise GalleryError(f"{uri}: only a gallery in a folder can be re-embedded; copy it into one first")
    folder, quarantine = Path(uri), Path(uri) / QUARANTINE_NAME
    with Gallery.open(folder) as gallery:
        limits, former = gallery.limits, gallery.encoder_id
    dropped: tuple[Unreadable, ...] = ()
    if changes := former != encoder.encoder_id:
        try:
            with closing(Catalog(folder / CATALOG_NAME)) as catalog:
                dropped = _change_over(catalog, encoder, spec, quarantine, drop_unreadable)
        except Reembedded:  # another process was quicker
            return reembed(uri, encoder, spec, drop_unreadable=drop_unreadable)
        shutil.rmtree(folder / INDEX_NAME, ignore_errors=True)  # of the former vectors; who searches in it keeps it
    with Gallery.open(folder, encoder) as gallery:
        if changes:
            gallery.tune(limits)
        return ReembedReport(len(gallery), dropped, quarantine)


def _change_over(
    catalog: Catalog, encoder: Encoder, spec: str | None, quarantine: Path, drop_unreadable: bool
) -> tuple[Unreadable, ...]:
    """Returns: the pictures that were dropped."""
    new, unreadable = NextVectors(catalog, encoder), dict[Version, Unreadable]()
    with tqdm(total=len(catalog), initial=len(new), desc="re-embedding", unit="img", dynamic_ncols=True) as bar:
        while True:
            unreadable, tried = _embed_pending(new, encoder, unreadable, bar.update)
            if tried:
                continue  # with what came meanwhile
            write_quarantine(quarantine, [*unreadable.values()])
            if unreadable and (not drop_unreadable or len(unreadable) == len(catalog)):
                raise _refusal(unreadable, quarantine, len(catalog))
            if new.take_over(spec, unreadable.keys()):
                return tuple(unreadable.values())


def _embed_pending(
    new: NextVectors, encoder: Encoder, known: Mapping[Version, Unreadable], tell: Callable[[int], object]
) -> tuple[dict[Version, Unreadable], int]:
    """Embed what is pending, once. `known`: what could not be read before, which is not tried again.

    Returns: what is pending still, and why; and how many pictures were tried.
    """
    unreadable: dict[Version, Unreadable] = {}
    after = tried = 0
    while block := new.pending(after, _BLOCK_ITEMS):
        after = block[-1].version[0]
        unreadable |= {item.version: known[item.version] for item in block if item.version in known}
        todo = {item.source: item for item in block if item.version not in known}
        for good, pixels, bad in read_batches([Sample(source) for source in todo], encoder.manifest.preprocess):
            vectors_ND = unit_vectors(encoder.embed(list(pixels)), encoder.manifest.embedding_dim, "the encoder's vectors")
            new.put([todo[sample.source] for sample in good], vectors_ND)
            unreadable |= {todo[picture.source].version: picture for picture in bad}
            tried += len(good) + len(bad)
            tell(len(good) + len(bad))
    return unreadable, tried


def _refusal(unreadable: Mapping[Version, Unreadable], quarantine: Path, count: int) -> GalleryError:
    first = next(iter(unreadable.values()))
    way_out = "" if len(unreadable) == count else ", or remove them from the gallery: --drop-unreadable"
    return GalleryError(
        f"{len(unreadable)} of {count} pictures cannot be read any more, listed in {quarantine}; the first: {first.reason}; "
        f"the gallery stays as it was, and what is embedded is kept: bring them back and repeat the command{way_out}"
    )
