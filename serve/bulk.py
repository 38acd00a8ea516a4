"""Many pictures at once, with a progress bar: into a gallery, into Parquet files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.contract import Manifest
from serve.encoder import Encoder
from serve.engines.quarantine import read_quarantine, write_quarantine
from serve.engines.shards import (
    PART_NAME,
    SHARD_SIZE,
    Engine,
    Shard,
    embed_pictures,
    join_parts,
    plan_shards,
    read_outcome,
)
from serve.errors import SimclrError, SourceError
from serve.gallery import AddReport, Gallery
from serve.samples import JUNK_IDENTITY, Sample, Unreadable
from serve.sources import open_source, printable


def add_pictures(gallery: Gallery, samples: Sequence[Sample], quarantine: Path | None = None) -> AddReport:
    """`Gallery.add` with a progress bar; junk boxes of re-ID sets stay out.

    `quarantine` lists what was left out, this time and in former runs unless it has been tried again.
    Raises: SourceError if `quarantine` is another kind of file.
    """
    former = read_quarantine(quarantine) if quarantine else []
    wanted = [sample for sample in samples if sample.identity != JUNK_IDENTITY]
    with _bar("adding", len(wanted)) as bar:
        report = gallery.add(wanted, on_batch=bar.update)
    if quarantine:
        tried = {printable(sample.source) for sample in wanted}
        write_quarantine(quarantine, [picture for picture in former if picture.source not in tried] + [*report.unreadable])
    return report


def embed_samples(
    encoder: Encoder, samples: Sequence[Sample], name: str
) -> tuple[NDArray[np.float32], list[Sample], list[Unreadable]]:
    """Vectors (N, D) of the readable pictures, those pictures, and the others. Raises: SourceError if none can be read."""
    with _bar(name, len(samples)) as bar:
        vectors, kept, unreadable = embed_pictures(encoder, samples, bar.update)
    if unreadable and not kept:
        raise _none_readable(unreadable)
    return vectors, kept, unreadable


def _bar(name: str, total: int, done: int = 0) -> Any:  # noqa: ANN401
    return tqdm(total=total, initial=done, desc=name, unit="img", dynamic_ncols=True)


def _none_readable(unreadable: Sequence[Unreadable]) -> SourceError:
    return SourceError(f"none of {len(unreadable)} pictures can be read; the first: {unreadable[0].reason}")


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_to_parquet` did: the number of vectors, the pictures left out, and the file that lists those, if any."""

    count: int
    unreadable: tuple[Unreadable, ...]
    quarantine: Path


def embed_to_parquet(manifest: Manifest, source: str, out: str, engine: Engine, shard_size: int = SHARD_SIZE) -> EmbedReport:
    """Write what is known of every picture, and its vector; the manifest goes into the files' metadata.

    `out`: FILE, or FOLDER/ for a file per shard; what is there of another run is replaced. Shards that a broken run has
    finished (in FILE.parts/, or FOLDER/) are not embedded again; the outcome is the same. Pictures left out are listed in
    OUT.quarantine.jsonl. Raises: SourceError, SimclrError, OSError, and what the encoder raises.
    """
    path = Path(out).absolute()
    as_parts = out.endswith(("/", os.sep))
    if path.is_dir() and not as_parts:
        raise SimclrError(f"{out}: is a folder; give FILE.parquet, or {out}/ for a file per shard")
    folder = path if as_parts else path.with_name(f"{path.name}.parts")
    shards = plan_shards(open_source(source).everything, manifest.encoder_id, shard_size)
    parts = [folder / shard.part_name for shard in shards]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        make_missing(shards, folder, engine, "embedding")
        report = _outcome(parts, path.with_name(f"{path.name}.quarantine.jsonl"))
        write_quarantine(report.quarantine, report.unreadable)
        if as_parts:
            _remove_parts(folder, keep={part.name for part in parts})
        else:
            join_parts(parts, path, manifest, folder)
            shutil.rmtree(folder)
    finally:
        with suppress(OSError):  # nothing is finished: nothing to go on with
            folder.rmdir()
    return report


def make_missing(shards: Sequence[Shard], folder: Path, engine: Engine, name: str) -> None:
    """Make the parts that are not in the folder yet, with a progress bar called `name`. Raises: what the engine raises."""
    missing = [shard for shard in shards if not (folder / shard.part_name).is_file()]
    total, left = (sum(len(shard.samples) for shard in some) for some in (shards, missing))
    with _bar(name, total, total - left) as bar:
        if missing:
            engine(missing, folder, bar.update)


def _outcome(parts: Sequence[Path], quarantine: Path) -> EmbedReport:
    """Raises: SourceError if no picture could be read; the parts are gone then."""
    outcomes = [read_outcome(part) for part in parts]
    count = sum(rows for rows, _ in outcomes)
    unreadable = tuple(picture for _, bad in outcomes for picture in bad)
    if count == 0:
        _remove_parts(parts[0].parent, keep=frozenset())
        raise _none_readable(unreadable)
    return EmbedReport(count, unreadable, quarantine)


def _remove_parts(folder: Path, keep: Set[str]) -> None:
    """Parts of other plans, and what killed processes have left half-written."""
    for path in folder.iterdir():
        if path.name not in keep and PART_NAME.match(path.name.removeprefix(".")):
            path.unlink(missing_ok=True)
