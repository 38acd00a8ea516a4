"""The vectors that a protocol compares: of pictures, kept on disk meanwhile, or read from Parquet files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from serve.bulk import embed_samples, make_missing
from serve.encoder import Encoder
from serve.engines.local import embed_here
from serve.engines.shards import plan_shards, read_outcome
from serve.errors import SourceError, first_line
from serve.protocols.flip import Mirrored, combine
from serve.protocols.names import Flip
from serve.samples import Sample
from serve.transfer.item_list import items_of
from serve.transfer.vector_file import open_vectors

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
    make_missing(shards, parts, partial(embed_here, encoder=encoder, workers=_WORKERS), name)
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
    file = open_vectors(path)
    values = np.empty((file.count, file.dim), np.float32)
    samples: list[Sample] = []
    for block in file.blocks():
        values[len(samples) : len(samples) + len(block.ids)] = block.vectors
        samples += items_of(block.facts, path, path.name, block.ids, is_text=False, keep_ids=False).samples
    return Vectors(samples, values, file.manifest.encoder_id if file.manifest else "")


def has_vectors(source: str) -> bool:
    """Whether a source is a Parquet file of vectors, rather than a list of pictures. Raises: SourceError."""
    if not source.lower().endswith(".parquet"):
        return False
    try:
        return "vector" in pq.read_schema(source).names
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{source}: not a readable Parquet file ({first_line(error)})") from error


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
