"""Re-identification: rank a gallery for one probe under the same-camera rule, and score whole sets as Market-1501 does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError, SourceError
from serve.filters import And, Condition, Where, as_where
from serve.gallery import Gallery
from serve.index import unit_vectors
from serve.metrics import RankingReport, evaluate_rows
from serve.pictures import Picture
from serve.search import Hit
from serve.sources import JUNK_IDENTITY, Sample

_BLOCK_QUERIES, _BLOCK_GALLERY = 256, 8192


@dataclass(frozen=True)
class RankedHit(Hit):
    """A hit with the verdict on it: `match` is None where the identity of the probe or of the hit is unknown."""

    match: bool | None


def rank(
    gallery: Gallery,
    query: Picture | NDArray[np.floating],
    *,
    identity: str | None = None,
    camera: str | None = None,
    other_cameras_only: bool = False,
    where: str | Where | None = None,
    exclude_ids: Iterable[int] = (),
    k: int = 20,
) -> list[RankedHit]:
    """The `k` gallery items nearest to a probe, without junk: identity "-1", and the probe's identity seen by its own camera.

    If the probe's identity is unknown, its own camera's pictures stay; `other_cameras_only` takes all of them out, whoever is
    on them (items of unknown camera stay). Raises: GalleryError, ImageError.
    """
    if other_cameras_only and camera is None:
        raise GalleryError("rank: other_cameras_only needs the probe's camera; give camera=...")
    excluded = [*exclude_ids, *gallery.ids(_equal(identity=JUNK_IDENTITY))]
    if identity is not None and camera is not None:
        excluded += gallery.ids(_equal(identity=identity, camera=camera)).tolist()
    if other_cameras_only and camera is not None:
        where = And((as_where(where), Condition("camera", "!=", (camera,))))
    hits = gallery.search(query, k, where, excluded)
    return [RankedHit(**vars(hit), match=_match(identity, hit.identity)) for hit in hits]


def _equal(**values: str) -> Where:
    return And(tuple(Condition(field, "=", (value,)) for field, value in values.items()))


def _match(probe: str | None, found: str | None) -> bool | None:
    return None if probe is None or found is None else probe == found


def evaluate_market(
    vectors_QD: NDArray[np.floating],
    query_samples: Sequence[Sample],
    vectors_GD: NDArray[np.floating],
    gallery_samples: Sequence[Sample],
) -> RankingReport:
    """Market-1501's protocol by cosine distance; gallery pictures of unknown identity are junk, as "-1" is.

    Where no sample names a camera, there is no same-camera rule. Distances are worked out in blocks: never all Q x G.
    Raises: SourceError if identities or cameras are missing, GalleryError or ValueError for vectors that do not fit.
    """
    cameras = any(sample.camera is not None for sample in (*query_samples, *gallery_samples))
    for sample in query_samples:
        if sample.identity is None:
            raise SourceError(f"{sample.source}: a query without identity cannot be scored; name it or leave it out")
    for sample in (*query_samples, *gallery_samples):
        if cameras and sample.camera is None:
            raise SourceError(f"{sample.source}: names no camera, others do; name it, or leave the camera out everywhere")
    queries = unit_vectors(vectors_QD, vectors_GD.shape[1], "query vectors")
    return evaluate_rows(
        _rows(queries, unit_vectors(vectors_GD, vectors_GD.shape[1], "gallery vectors")),
        [str(sample.identity) for sample in query_samples],
        [sample.identity if sample.identity is not None else JUNK_IDENTITY for sample in gallery_samples],
        [str(sample.camera) for sample in query_samples] if cameras else None,
        [str(sample.camera) for sample in gallery_samples] if cameras else None,
    )


def _rows(queries_QD: NDArray[np.float32], gallery_GD: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Negative cosines, one query (G,) at a time.

    Worked out in double and rounded: a float32 product depends in its last bits on where a row stands, so that twins in the
    gallery would rank by their place instead of being equal.
    """
    for start in range(0, len(queries_QD), _BLOCK_QUERIES):
        block = queries_QD[start : start + _BLOCK_QUERIES].astype(np.float64)
        distances = np.empty((len(block), len(gallery_GD)), np.float32)
        for first in range(0, len(gallery_GD), _BLOCK_GALLERY):
            part = gallery_GD[first : first + _BLOCK_GALLERY].astype(np.float64)
            distances[:, first : first + _BLOCK_GALLERY] = -(block @ part.T)
        yield from distances
