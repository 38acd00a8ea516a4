"""One vector of several: expanded queries, several pictures of a query, tracklets. All results are unit vectors, float32.

Several pictures of one query are averaged as the first step of Market-1501's multiple queries; a tracklet is the crops of one
subject past one camera.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.index import unit_vectors
from serve.neighbours import Screen, nearest

How = Literal["mean", "max"]


def expand_queries(
    query_QD: NDArray[np.floating], gallery_GD: NDArray[np.floating], k: int = 5, alpha: float = 3.0
) -> NDArray[np.float32]:
    """Queries (Q, D) moved towards their `k` nearest in the gallery, each weighted by its cosine to the power `alpha`.

    `alpha` of 0 is average query expansion (Chum et al. 2007), above it alpha-QE (Radenovic et al. 2018); who points away
    (cosine below 0) has no weight. Each query is expanded alone.
    Raises: ValueError, and GalleryError for vectors without direction.
    """
    if k < 1 or alpha < 0 or not len(gallery_GD):
        raise ValueError(
            f"got k={k}, alpha={alpha}, a gallery of {len(gallery_GD)}; wanted k of 1 or more, alpha of 0 or more, a gallery"
        )
    gallery = unit_vectors(gallery_GD, gallery_GD.shape[1], "gallery vectors")
    queries = unit_vectors(query_QD, gallery.shape[1], "query vectors")
    near = nearest(queries, Screen(gallery, gallery.mean(axis=0)), k)
    cosines = 1 - near.distances / 2
    weights = np.where(cosines > 0, np.abs(cosines) ** alpha, 0.0)
    expanded = queries.astype(np.float64)
    for i, (start, stop) in enumerate(zip(near.starts, near.starts[1:], strict=False)):
        expanded[i] += weights[start:stop] @ gallery[near.points[start:stop]]
    return unit_vectors(expanded, gallery.shape[1], "expanded queries")


def pool(vectors_ND: ArrayLike, how: How = "mean", quality_N: ArrayLike | None = None) -> NDArray[np.float32]:
    """One vector (D,) of several: their mean, or the largest of each component; `quality_N` weighs the mean.

    The vectors are normalised first: a long one counts no more than a short one.
    Raises: ValueError, and GalleryError if a vector has no direction or they cancel out.
    """
    vectors = np.asarray(vectors_ND)
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"got vectors of shape {vectors.shape}, wanted (N, D) with N of 1 or more")
    if quality_N is not None and how != "mean":
        raise ValueError("quality weighs the mean only; leave it out, or take how='mean'")
    unit = unit_vectors(vectors, vectors.shape[1])
    pooled = unit.max(axis=0) if how == "max" else _weights(quality_N, len(unit)) @ unit
    unit_pooled: NDArray[np.float32] = unit_vectors(pooled[None], vectors.shape[1], "pooled vector")[0]
    return unit_pooled


def pool_groups(
    vectors_ND: NDArray[np.floating], groups_N: ArrayLike, how: How = "mean", quality_N: ArrayLike | None = None
) -> tuple[NDArray[np.float32], list[str]]:
    """A vector (T, D) for each tracklet, or each query of several pictures, and the names (T,), sorted. Raises: as `pool`."""
    groups = np.array([str(group) for group in np.asarray(groups_N)])
    if len(groups) != len(vectors_ND):
        raise ValueError(f"got {len(groups)} groups for {len(vectors_ND)} vectors; give one for each")
    quality = None if quality_N is None else _weights(quality_N, len(groups))
    names = np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    pooled = [pool(vectors_ND[its], how, None if quality is None else quality[its]) for its in members]
    return np.stack(pooled), [str(name) for name in names]


def _weights(quality_N: ArrayLike | None, count: int) -> NDArray[np.float64]:
    if quality_N is None:
        return np.ones(count)
    quality = np.asarray(quality_N, np.float64)
    if quality.shape != (count,) or not np.isfinite(quality).all() or (quality < 0).any() or not quality.any():
        raise ValueError(f"got qualities {quality.shape} {quality[:4]}, wanted {count} numbers of 0 or more, not all 0")
    return quality
