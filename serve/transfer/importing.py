"""Vectors from elsewhere into a gallery: who vouches for them, what is known about each, block by block, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from serve.encoder import Encoder
from serve.errors import EncoderMismatch, GalleryError, SourceError
from serve.gallery import Gallery
from serve.index import unit_vectors
from serve.transfer.declared import Declared, foreign_manifest
from serve.transfer.item_list import ItemList, Items, items_of
from serve.transfer.vector_file import Block, VectorFile, open_vectors


@dataclass(frozen=True)
class ImportReport:
    """How many vectors came in, and how many rows were of sources that were there already."""

    added: int
    already_present: int
    count: int
    """Of items in the gallery now."""


def import_vectors(
    uri: str,
    vectors: Path,
    *,
    items: Path | None = None,
    encoder: Encoder | None = None,
    spec: str | None = None,
    name: str | None = None,
    new_ids: bool = False,
) -> ImportReport:
    """Add the vectors of a file (docs/search.md) to a gallery, made if need be. Repeating it goes on where it broke off.

    Args: items, a file that says what is known about them; encoder, the one that made them, and spec, where it was opened, or
    name, which stands for it; new_ids, to leave the ids that an exported file has.
    Raises: SourceError, EncoderMismatch, GalleryError; blocks before that are in.
    """
    file, listed = open_vectors(vectors), None if items is None else ItemList.read(items)
    if listed is not None and not file.has_ids and len(listed.table) != file.count:
        raise SourceError(f"{items}: has {len(listed.table)} rows for {file.count} vectors in {vectors}; wanted one for each")
    added = present = 0
    with Gallery.open(uri, _maker(file, encoder, name), create=True) as gallery:
        if spec is not None:
            gallery.encoder_spec = spec
        with tqdm(total=file.count, desc="importing", unit="vec", dynamic_ncols=True) as bar:
            for block, first in _numbered(file):
                unit = unit_vectors(block.vectors, file.dim, str(vectors), first)
                rows = _described(block, file, listed, new_ids)
                report = gallery.add(
                    rows.samples, unit, extra=rows.extra, ids=rows.ids or None, batch_size=len(unit), on_batch=bar.update
                )
                added += len(report.ids)
                present += report.already_present
        return ImportReport(added, present, len(gallery))


def _maker(file: VectorFile, encoder: Encoder | None, name: str | None) -> Encoder:
    """Whose vectors they are: the file's own word comes first. Raises: EncoderMismatch, GalleryError."""
    if encoder is not None and name is not None:
        raise GalleryError(f"{file.path}: wanted --encoder or --name, not both: vectors are of one maker")
    if file.manifest is not None:
        if name is not None or (encoder is not None and encoder.encoder_id != file.manifest.encoder_id):
            raise EncoderMismatch(
                f"{file.path}: its vectors are of encoder {file.manifest.encoder_id} ({file.manifest.name}), not of "
                f"{encoder.encoder_id if encoder else name}; leave out --encoder and --name"
            )
        maker = encoder or Declared(file.manifest)
    elif encoder is not None or name is not None:
        maker = encoder or Declared(foreign_manifest(str(name), file.dim))
    else:
        raise GalleryError(f"{file.path}: does not say who made its vectors; give --encoder ENC, or --name NAME without one")
    if maker.manifest.embedding_dim != file.dim:
        raise EncoderMismatch(
            f"{file.path}: vectors of {file.dim} numbers, {maker.manifest.name} makes {maker.manifest.embedding_dim}; "
            "name the encoder that made them"
        )
    return maker


def _numbered(file: VectorFile) -> Iterator[tuple[Block, int]]:
    """Blocks, and how many rows came before each."""
    first = 0
    for block in file.blocks():
        yield block, first
        first += len(block.ids)


def _described(block: Block, file: VectorFile, listed: ItemList | None, new_ids: bool) -> Items:
    name = file.path.name
    if listed is not None:
        facts = listed.of(block, file.has_ids)
        return items_of(facts, listed.path, name, block.ids, is_text=listed.is_text, keep_ids=False)
    own_ids = file.manifest is not None and "id" in block.facts.column_names
    return items_of(block.facts, file.path, name, block.ids, is_text=False, keep_ids=own_ids and not new_ids)
