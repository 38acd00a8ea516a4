"""The vectors that a protocol compares: of pictures, kept on disk meanwhile, or read from Parquet files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from serve.bulk import embed_samples
from serve.bulk_local import embed_here
from serve.bulk_shards import plan_shards, read_outcome
from serve.contract import METADATA_KEY, Manifest
from serve.encoder import Encoder
from serve.errors import SourceError, first_line
from serve.protocols.flip import Mirrored, combine
from serve.protocols.names import Flip
from serve.samples import Sample

_WORKERS = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Pictures, or tracks of them, and their vectors (N, D)."""

    samples: list[Sample]
    values: NDArray[np.float32]
    encoder_id: str
    unreadable: int = 0

    def at(self, places: NDArray[np.intp]) -> Vectors:
        """Some of them."""
        return Vectors([self.samples[place] for place in places], self.values[places], self.encoder_id)


def embed(encoder: Encoder, samples: Sequence[Sample], name: str, flip: Flip, parts: Path | None) -> Vectors:
    """Vectors of the readable pictures. What is in the folder `parts` already is not embedded again. Raises: SourceError."""
    vectors = _embed(encoder, samples, name, parts)
    if flip == "none":
        return vectors
    mirrored = _embed(Mirrored(encoder), samples, f"{name}, mirrored", parts)
    if flip == "sysu-official" and np.allclose(np.linalg.norm(mirrored.values, axis=1), 1, atol=1e-3):
        _log.warning("this encoder gives unit vectors, of which sysu-official is sum; name a RUN and --flip for plain features")
    return Vectors(vectors.samples, combine(vectors.values, mirrored.values, flip), vectors.encoder_id, vectors.unreadable)


def _embed(encoder: Encoder, samples: Sequence[Sample], name: str, parts: Path | None) -> Vectors:
    if parts is None:
        values, kept, unreadable = embed_samples(encoder, samples, name)
        return Vectors(kept, values, encoder.encoder_id, len(unreadable))
    parts.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(samples, encoder.encoder_id)
    missing = [shard for shard in shards if not (parts / shard.part_name).is_file()]
    done = len(samples) - sum(len(shard.samples) for shard in missing)
    with tqdm(total=len(samples), initial=done, desc=name, unit="img", dynamic_ncols=True) as bar:
        if missing:
            embed_here(missing, parts, bar.update, encoder=encoder, workers=_WORKERS)
    return _join([parts / shard.part_name for shard in shards], encoder, len(samples))


def _join(parts: Sequence[Path], encoder: Encoder, asked: int) -> Vectors:
    """All of them in one array, filled part by part: half a million vectors need not be there twice."""
    outcomes = [read_outcome(part) for part in parts]
    values = np.empty((sum(rows for rows, _ in outcomes), encoder.manifest.embedding_dim), np.float32)
    if not len(values):
        raise SourceError(f"none of {asked} pictures can be read; the first: {outcomes[0][1][0].reason}")
    kept: list[Sample] = []
    for part in map(read_vectors, parts):
        values[len(kept) : len(kept) + len(part.samples)] = part.values
        kept += part.samples
    return Vectors(kept, values, encoder.encoder_id, asked - len(kept))


def read_vectors(path: Path) -> Vectors:
    """A Parquet file with a column `vector`, and source, label, identity, camera, time, track where known.

    `simclr embed` writes such files; of others the encoder is unknown, and called "". Raises: SourceError.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    if "vector" not in table.column_names:
        raise SourceError(
            f"{path}: columns are {sorted(table.column_names)}, wanted vector, identity, camera; see simclr embed"
        )
    card = (table.schema.metadata or {}).get(METADATA_KEY.encode())
    encoder_id = Manifest.parse(card, str(path)).encoder_id if card else ""
    return Vectors(_samples(path, table), _values(path, table), encoder_id)


def has_vectors(source: str) -> bool:
    """Whether a source is a Parquet file of vectors, rather than a list of pictures. Raises: SourceError."""
    if not source.lower().endswith(".parquet"):
        return False
    try:
        return "vector" in pq.read_schema(source).names
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{source}: not a readable Parquet file ({first_line(error)})") from error


def _samples(path: Path, table: pa.Table) -> list[Sample]:
    names = [field.name for field in fields(Sample) if field.name in table.column_names]
    rows = table.select(names).to_pylist()
    for number, row in enumerate(rows):
        row["source"] = row.get("source") or f"{path}, row {number}"
        for name in ("identity", "camera", "track", "label"):
            row[name] = None if row.get(name) is None else str(row[name])
    return [Sample(**row) for row in rows]


def _values(path: Path, table: pa.Table) -> NDArray[np.float32]:
    """(N, D). Raises: SourceError for vectors of several sizes, or with holes."""
    column = table["vector"].combine_chunks()
    try:
        flat = column.flatten().to_numpy(zero_copy_only=False)
        values: NDArray[np.float32] = flat.astype(np.float32, copy=False).reshape(len(column), -1 if len(column) else 0)
    except (AttributeError, TypeError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path}: vector is {column.type}, wanted lists of numbers, all of one size") from error
    return values


def pool_tracks(frames: Vectors) -> Vectors:
    """One vector for every track, the mean of its frames'. Raises: SourceError for a picture of no track."""
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for place, sample in enumerate(frames.samples):
        if sample.track is None:
            raise SourceError(f"{sample.source}: names no track; wanted one for every picture, or another protocol")
        groups.setdefault((sample.identity, sample.camera, sample.track), []).append(place)
    values = np.stack([frames.values[places].mean(axis=0) for places in groups.values()])
    firsts = [frames.samples[places[0]] for places in groups.values()]
    return Vectors(firsts, values, frames.encoder_id, frames.unreadable)
