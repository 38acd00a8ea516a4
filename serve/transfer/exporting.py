"""A gallery, or what passes a filter, as a Parquet file: the columns of `simclr embed`, ids, and all else that is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from serve.contract import METADATA_KEY
from serve.engines.shards import WRITER, table_of
from serve.files import atomic_path
from serve.gallery import Gallery
from serve.item import Item, sample_of

ENCODER_ID_KEY = "simclr_encoder_id"


def export_gallery(gallery: Gallery, out: Path, where: str | None = None) -> int:
    """Write the items that pass, by growing id, all of one moment; others may write meanwhile. Only a block is in memory.

    Returns: how many they are. Raises: GalleryError, OSError; no file is written then.
    """
    info = gallery.info()
    metadata = {METADATA_KEY: gallery.manifest, ENCODER_ID_KEY: info.encoder_id}
    schema = _table([], np.empty((0, info.embedding_dim), np.float32)).schema.with_metadata(metadata)
    count = 0
    with (
        tqdm(total=gallery.count(where), desc="exporting", unit="vec", dynamic_ncols=True) as bar,
        atomic_path(out) as temporary,
        pq.ParquetWriter(temporary, schema, **WRITER) as writer,
    ):
        for items, vectors_ND in gallery.rows(where):
            writer.write_table(_table(items, vectors_ND).replace_schema_metadata(schema.metadata))
            count += len(items)
            bar.update(len(items))
    return count


def _table(items: list[Item], vectors_ND: NDArray[np.float32]) -> pa.Table:
    table = table_of([sample_of(item) for item in items], vectors_ND)
    table = table.append_column("id", pa.array([item.id for item in items], pa.int64()))
    return table.append_column("extra", pa.array([json.dumps(item.extra) for item in items], pa.string()))
