"""`simclr reid evaluate`: pictures or vectors in, scores out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.datasets.published import difference
from serve.encoder import Encoder
from serve.errors import SourceError
from serve.protocols.choice import settle
from serve.protocols.known import PROTOCOLS, counts, default_name, roles
from serve.protocols.names import Flip, ProtocolName
from serve.protocols.report import figures
from serve.protocols.score import Rerank, Scores, score
from serve.protocols.vectors import Vectors, embed, has_vectors, read_vectors
from serve.samples import ImageSet
from serve.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be said besides the data. `parts`: where vectors are kept, so that a broken run goes on."""

    protocol: ProtocolName | None = None
    flip: Flip | None = None
    rerank: Rerank | None = None
    parts: Path | None = None
    seed: int = 0
    strict: bool = False


@dataclass(frozen=True)
class Outcome:
    """Scores, and what else is to be told of the run."""

    scores: Scores
    options: Options
    encoder_id: str
    unreadable: int
    flip: Flip = "none"
    data: str | None = None
    """How the data differ from the published set; None if they do not, or there is none."""

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON."""
        rerank = self.options.rerank
        return {
            **figures(self.scores),
            "rerank": None if rerank is None else "transductive" if rerank.transductive else "per query",
            "flip": self.flip,
            "seed": self.options.seed,
            "data": self.data,
            "unreadable": self.unreadable,
            "encoder_id": self.encoder_id,
        }


def evaluate_pictures(encoder: Encoder, source: str, options: Options) -> Outcome:
    """Score an encoder on a set of pictures, by its layout's protocol unless another is asked for.

    Raises: SourceError, and what the encoder raises.
    """
    images = open_source(source)
    asked = options.protocol or default_name(images)
    data = difference(asked, images)
    if data and options.strict:
        raise SourceError(f"{source}: {data}; --strict wants the counts as published")
    who = roles(PROTOCOLS[asked], images)
    if not who.queries or who.gallery == ():
        raise SourceError(f"{source}: no re-ID set; wanted a known data set, ID/cam1/x.jpg, or a CSV with identity and camera")
    flip = options.flip or PROTOCOLS[asked].flip
    with _naming(source):
        choice = settle(asked, who.queries, who.gallery or who.queries)
        queries = embed(encoder, who.queries, "queries", flip, options.parts)
        gallery = embed(encoder, who.gallery, "gallery", flip, options.parts) if who.gallery else None
        scores = score(choice, queries, gallery, rerank=options.rerank, seed=options.seed)
    lost = queries.unreadable + (gallery.unreadable if gallery else 0)
    return Outcome(scores, options, encoder.encoder_id, lost, flip, data)


def evaluate_files(query: str, gallery: str, encoder: Encoder | None, options: Options) -> Outcome:
    """The same for queries and gallery apart: each Parquet vectors, or pictures of any source. Raises: SourceError."""
    queries, everything = (_side(source, encoder, options) for source in (query, gallery))
    among = everything.at(np.flatnonzero([counts(sample) for sample in everything.samples]))
    asked = options.protocol or default_name(ImageSet(query=tuple(queries.samples), gallery=tuple(among.samples)))
    if PROTOCOLS[asked].draws:
        raise SourceError(f"protocol {asked} draws queries and gallery itself; wanted --images")
    with _naming(query):
        choice = settle(asked, queries.samples, among.samples)
        scores = score(choice, queries, among, rerank=options.rerank, seed=options.seed)
    lost = queries.unreadable + everything.unreadable
    return Outcome(scores, options, queries.encoder_id, lost, options.flip or "none")


def _side(source: str, encoder: Encoder | None, options: Options) -> Vectors:
    if has_vectors(source):
        if options.flip not in (None, "none"):
            raise SourceError(f"{source}: holds vectors, which cannot be mirrored; wanted pictures for --flip {options.flip}")
        return read_vectors(Path(source))
    if encoder is None:
        raise SourceError(f"{source}: holds pictures; give --encoder, or vectors of simclr embed")
    return embed(encoder, open_source(source).everything, Path(source).name, options.flip or "none", options.parts)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Complaints about the data say which."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
