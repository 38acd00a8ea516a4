"""Many pictures at once, with a progress bar: into a gallery, into a Parquet file, through a re-ID protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from serve.contract import METADATA_KEY
from serve.encoder import Encoder
from serve.errors import SourceError
from serve.files import atomic_path
from serve.gallery import AddReport, Gallery
from serve.reid import evaluate_market
from serve.sources import JUNK_IDENTITY, Sample, Unreadable, name_fault, open_source, read_batches


def add_pictures(gallery: Gallery, samples: Sequence[Sample]) -> AddReport:
    """`Gallery.add` with a progress bar; junk boxes of re-ID sets stay out."""
    wanted = [sample for sample in samples if sample.identity != JUNK_IDENTITY]
    with tqdm(total=len(wanted), desc="adding", unit="img", dynamic_ncols=True) as bar:
        return gallery.add(wanted, on_batch=bar.update)


def embed_samples(
    encoder: Encoder, samples: Sequence[Sample], name: str
) -> tuple[NDArray[np.float32], list[Sample], list[Unreadable]]:
    """Vectors (N, D) of the readable pictures, those pictures, and the others. Raises: SourceError if none can be read."""
    vectors = [np.empty((0, encoder.manifest.embedding_dim), np.float32)]
    kept: list[Sample] = []
    unreadable: list[Unreadable] = []
    with tqdm(total=len(samples), desc=name, unit="img", dynamic_ncols=True) as bar:
        for good, pixels, bad in read_batches(samples, encoder.manifest.preprocess):
            vectors.append(encoder.embed(list(pixels)))
            kept += good
            unreadable += bad
            bar.update(len(good) + len(bad))
    if unreadable and not kept:
        raise SourceError(f"none of {len(samples)} pictures can be read; the first: {unreadable[0].reason}")
    return np.concatenate(vectors), kept, unreadable


def embed_to_parquet(encoder: Encoder, source: str, path: Path) -> tuple[int, list[Unreadable]]:
    """Write source, label, identity, camera, time and vector of every picture; the manifest goes into the file's metadata.

    Returns: the number of rows and what could not be read. Raises: SourceError, OSError.
    """
    faults = [(sample, name_fault(sample.source)) for sample in open_source(source).everything]
    named = [sample for sample, fault in faults if fault is None]
    vectors, samples, unreadable = embed_samples(encoder, named, "embedding")
    unreadable += [Unreadable(sample.source, fault) for sample, fault in faults if fault is not None]
    columns: dict[str, Any] = {
        name: pa.array([getattr(sample, name) for sample in samples], pa.string())  # a string even where none is known
        for name in ("source", "label", "identity", "camera")
    }
    columns["time"] = pa.array([sample.time for sample in samples], pa.float64())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: encoder.manifest.model_dump_json()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    return len(samples), unreadable


def evaluate_reid(encoder: Encoder, source: str) -> dict[str, Any]:
    """Market-1501's protocol over a root with queries and a gallery. Raises: SourceError if it has none."""
    images = open_source(source)
    if not images.query or not images.gallery:
        raise SourceError(f"{source}: no re-ID set; wanted the folders query and bounding_box_test (Market-1501 layout)")
    queries, query_samples, lost = embed_samples(encoder, images.query, "queries")
    gallery, gallery_samples, unreadable = embed_samples(encoder, images.gallery, "gallery")
    try:
        report = evaluate_market(queries, query_samples, gallery, gallery_samples)
    except ValueError as error:
        raise SourceError(f"{source}: {error}") from error
    return {
        "rank1": float(report.cmc[0]),
        "rank5": float(report.cmc[4]),
        "rank10": float(report.cmc[9]),
        "map_step": report.map_step,
        "map_trapezoid": report.map_trapezoid,
        "minp": report.minp,
        "queries": report.n_queries,
        "without_match": report.n_without_match,
        "gallery": len(gallery_samples),
        "unreadable": len(lost) + len(unreadable),
        "encoder_id": encoder.encoder_id,
    }
