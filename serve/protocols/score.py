"""Vectors -> the figures of a protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.errors import EncoderMismatch, SourceError
from serve.metrics import RankingReport, evaluate_ranking, evaluate_vectors
from serve.protocols.choice import Choice
from serve.protocols.known import Protocol, draws, identity_of
from serve.protocols.single_shot import expected_cmc
from serve.protocols.vectors import Vectors, pool_tracks
from serve.rerank import k_reciprocal
from serve.samples import Sample


@dataclass(frozen=True)
class Rerank:
    """k-reciprocal re-ranking: each query alone, or (`transductive`) all of them at once, as published."""

    transductive: bool


@dataclass(frozen=True, eq=False)
class Draw:
    """One set of queries asked among one gallery."""

    queries: list[Sample]
    gallery_size: int
    report: RankingReport
    cmc: NDArray[np.float64]
    """(ranks,): the report's, or CUHK03's with one gallery picture of each person."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a protocol gave; one draw, unless it draws."""

    choice: Choice
    draws: list[Draw]


def score(choice: Choice, queries: Vectors, gallery: Vectors | None, *, rerank: Rerank | None = None, seed: int = 0) -> Scores:
    """Compare; `gallery` None: each picture in turn with all others, or what the protocol draws.

    Raises: SourceError for vectors that cannot be compared, and where no query has a match; EncoderMismatch.
    """
    if gallery is not None and queries.encoder_id != gallery.encoder_id:
        raise EncoderMismatch(
            f"queries are of encoder {queries.encoder_id or 'unknown'}, the gallery of {gallery.encoder_id or 'unknown'}; "
            "embed both with one"
        )
    if choice.protocol.tracks:
        queries, gallery = pool_tracks(queries), None if gallery is None else pool_tracks(gallery)
    return Scores(choice, [_scored(choice, *sides, rerank) for sides in _drawn(choice, queries, gallery, seed)])


def _drawn(choice: Choice, queries: Vectors, gallery: Vectors | None, seed: int) -> Iterator[tuple[Vectors, Vectors]]:
    if choice.protocol.draws and gallery is None:
        identities = [str(identity_of(sample)) for sample in queries.samples]
        for some, among in draws(choice.protocol, identities, seed):
            yield queries.at(some), queries.at(among)
    else:
        yield queries, gallery or queries


def _scored(choice: Choice, queries: Vectors, gallery: Vectors, rerank: Rerank | None) -> Draw:
    sides = queries.samples, gallery.samples
    query_ids, gallery_ids = ([str(identity_of(sample)) for sample in side] for side in sides)
    query_shots, gallery_shots = ([_shot(choice.protocol, sample) for sample in side] for side in sides)
    labels = query_ids, gallery_ids, query_shots, gallery_shots
    try:
        if rerank is None and not choice.protocol.single_shot:
            report = evaluate_vectors(queries.values, gallery.values, *labels)
            return Draw(queries.samples, len(gallery.samples), report, report.cmc)
        distances = _distances(queries.values, gallery.values, rerank)
        report = evaluate_ranking(distances, *labels)
    except ValueError as error:
        raise SourceError(str(error)) from error
    cmc = expected_cmc(distances, *labels, max_rank=len(report.cmc)) if choice.protocol.single_shot else report.cmc
    return Draw(queries.samples, len(gallery.samples), report, cmc)


def _shot(protocol: Protocol, sample: Sample) -> str:
    """What two pictures of one identity must not share to be a match."""
    if protocol.by_camera:
        return str(sample.camera)
    return sample.source if sample.track is None else f"{sample.camera}, track {sample.track}"


def _distances(queries_QD: NDArray[np.float32], gallery_GD: NDArray[np.float32], rerank: Rerank | None) -> NDArray[np.float32]:
    """(Q, G). Raises: ValueError."""
    queries, gallery = (_unit(side) for side in (queries_QD, gallery_GD))
    if rerank is not None:
        return k_reciprocal(queries, gallery, transductive=rerank.transductive)
    return np.asarray(-(queries @ gallery.T), np.float32)  # rounded from double: equal vectors keep equal distances


def _unit(vectors_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("a vector is zero, infinite or not a number, so it has no direction; leave it out")
    return np.asarray(vectors_ND / lengths)
