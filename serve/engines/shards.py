"""Shards of a large embedding: which pictures each holds, the work on one of them, and the file that comes of it.

A part is called `part-NUMBER-DIGEST.parquet` after all that decides what is in it, and appears whole or not at all. So a part
that is there is finished, whichever process or machine made it: that is all that resuming needs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from serve.contract import METADATA_KEY, Manifest
from serve.encoder import Encoder
from serve.errors import EncoderMismatch, SourceError, first_line
from serve.files import atomic_path
from serve.samples import Sample, Unreadable
from serve.sources import misnamed, name_fault, read_batches

SHARD_SIZE = 1024
"""Pictures: what a killed process loses at most, for each shard that it had under way."""
PART_NAME = re.compile(r"part-\d{6,}-[0-9a-f]{16}\.parquet")
_FORMAT = 1
_FACTS = ("source", "label", "identity", "camera", "track")
_QUARANTINE_KEY = b"simclr_quarantine"
WRITER: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": list(_FACTS[1:]),  # of vectors, a dictionary would make a file 30 % larger
    "write_page_checksum": True,
}

Tell: TypeAlias = Callable[[int], object]
"""Called with the number of pictures that have just been dealt with."""
Engine: TypeAlias = Callable[[Sequence["Shard"], Path, Tell], None]
"""Makes the part of every shard in a folder, in any order."""


@dataclass(frozen=True)
class Shard:
    """Some pictures that are embedded together, and the name of the file that comes of it."""

    part_name: str
    encoder_id: str
    samples: tuple[Sample, ...]


def plan_shards(samples: Sequence[Sample], encoder_id: str, size: int = SHARD_SIZE) -> list[Shard]:
    """Cut pictures into shards of `size`, in order. The same pictures and encoder give the same plan, anywhere and always."""
    return [
        _shard(number, encoder_id, tuple(samples[start : start + size]))
        for number, start in enumerate(range(0, len(samples), size))
    ]


def _shard(number: int, encoder_id: str, samples: tuple[Sample, ...]) -> Shard:
    content = json.dumps([_FORMAT, encoder_id, [list(vars(sample).values()) for sample in samples]])
    return Shard(f"part-{number:06}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.parquet", encoder_id, samples)


def embed_shard(shard: Shard, encoder: Encoder, folder: Path, tell: Tell = lambda _: None) -> None:
    """Write the shard's part into `folder`: rows and vectors of its pictures, and which of them are left out and why.

    Batches never reach across shards and so are the same in every run; kernels may round differently for other batches.
    Raises: EncoderMismatch, OSError, and what the encoder raises; no part is written then.
    """
    if encoder.encoder_id != shard.encoder_id:
        raise EncoderMismatch(
            f"{folder}: planned for encoder {shard.encoder_id}, got {encoder.encoder_id} ({encoder.manifest.name}); "
            "repeat the command, which begins anew with that"
        )
    named = [sample for sample in shard.samples if name_fault(sample.source) is None]
    unreadable = misnamed(shard.samples)
    tell(len(unreadable))
    vectors, samples, bad = embed_pictures(encoder, named, tell)
    table = table_of(samples, vectors).replace_schema_metadata(
        {
            METADATA_KEY: encoder.manifest.model_dump_json(),
            _QUARANTINE_KEY: json.dumps([vars(picture) for picture in unreadable + bad]),
        }
    )
    with atomic_path(folder / shard.part_name) as temporary:
        pq.write_table(table, temporary, **WRITER)


def embed_pictures(
    encoder: Encoder, samples: Sequence[Sample], tell: Tell
) -> tuple[NDArray[np.float32], list[Sample], list[Unreadable]]:
    """Vectors (N, D) of the readable pictures, those pictures, and the others; all in memory."""
    vectors = [np.empty((0, encoder.manifest.embedding_dim), np.float32)]
    kept: list[Sample] = []
    unreadable: list[Unreadable] = []
    for good, pixels, bad in read_batches(samples, encoder.manifest.preprocess):
        vectors.append(encoder.embed(list(pixels)))
        kept += good
        unreadable += bad
        tell(len(good) + len(bad))
    return np.concatenate(vectors), kept, unreadable


def table_of(samples: Sequence[Sample], vectors_ND: NDArray[np.float32]) -> pa.Table:
    """The columns of an embedding file: source, label, identity, camera, track, time and vector."""
    columns: dict[str, Any] = {}
    for name in _FACTS:
        columns[name] = pa.array([getattr(sample, name) for sample in samples], pa.string())  # so also where none is known
    columns["time"] = pa.array([sample.time for sample in samples], pa.float64())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    return pa.table(columns)


def read_outcome(part: Path) -> tuple[int, list[Unreadable]]:
    """How many rows a part has, and which pictures were left out. Raises: SourceError if it is damaged."""
    try:
        footer = pq.read_metadata(part)
        return footer.num_rows, [Unreadable(**picture) for picture in json.loads(footer.metadata[_QUARANTINE_KEY])]
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise _damaged(part, error) from error


def join_parts(parts: Iterable[Path], path: Path, manifest: Manifest, workshop: Path) -> None:
    """One Parquet file of many parts, a row group each; only one is in memory. The manifest goes into the file's metadata.

    Args: workshop, a folder of the same file system to write in. Raises: SourceError if a part is damaged, OSError.
    """
    nothing = table_of([], np.empty((0, manifest.embedding_dim), np.float32))
    schema = nothing.schema.with_metadata({METADATA_KEY: manifest.model_dump_json()})
    with atomic_path(path, workshop=workshop) as temporary, pq.ParquetWriter(temporary, schema, **WRITER) as writer:
        for part in parts:
            table = _read(part)
            if len(table):
                writer.write_table(table.replace_schema_metadata(schema.metadata))


def _read(part: Path) -> pa.Table:
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(part, error) from error


def _damaged(part: Path, error: Exception) -> SourceError:
    return SourceError(f"{part}: damaged ({first_line(error)}); remove it and repeat the command")
