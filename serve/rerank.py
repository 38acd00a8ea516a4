"""k-reciprocal re-ranking (Zhong et al. 2017), exact, on sets of neighbours instead of N x N matrices.

Two pictures are reciprocal if each is among the k1 nearest of the other. A picture is described by the weights exp(-d) of its
reciprocal ones, extended by theirs and averaged over its k2 nearest; the overlap of two descriptions (Jaccard) is the new
distance, mixed with the old one. d is the squared Euclidean distance, once, divided by the row's largest. A picture is its own
nearest. All that are as near as the last of a list are on it, so that equal distances are never cut by where pictures stand.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from serve.reciprocal.graph import Graph, overlaps
from serve.reciprocal.joining import Joining
from serve.reciprocal.pairs import Values

_BLOCK_PROBES, _BLOCK_GALLERY = 256, 2048
_TINY = float(np.finfo(np.float32).tiny)


def k_reciprocal(
    query_QD: NDArray[np.floating],
    gallery_GD: NDArray[np.floating],
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    transductive: bool = False,
) -> NDArray[np.float32]:
    """Re-ranked distances (Q, G) in [0, 1]; `lambda_value` is the share of the old distance.

    Each probe joins the gallery alone, so that its answer does not depend on who else asks. `transductive` lets all probes join
    at once, as published and as benchmarks do. Memory: the vectors twice, the distances, blocks, some 100 pairs per vector.
    Raises: ValueError for arguments that do not fit, and where over a thousand vectors are as near as the k1-th.
    """
    queries, gallery = _checked(query_QD, gallery_GD)
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise ValueError(
            f"got k1={k1}, k2={k2}, lambda_value={lambda_value}; wanted k1 and k2 of 1 or more, lambda from 0 to 1"
        )
    found = _together(queries, gallery, k1, k2) if transductive else _alone(queries, gallery, k1, k2)
    distances = _squared_distances(queries, gallery)
    for row, (common, farthest) in zip(distances, found, strict=True):
        row *= lambda_value / max(farthest, _TINY)
        row += ((1 - lambda_value) * (1 - common / (2 - common))).astype(np.float32)
    return distances


def _together(queries: NDArray[np.float32], gallery: NDArray[np.float32], k1: int, k2: int) -> Iterator[tuple[Values, float]]:
    everyone = np.concatenate([queries, gallery])
    graph = Graph(everyone, len(everyone), k1, k2)
    inverted = graph.averaged.transposed()
    for query in range(len(queries)):
        _, places = graph.averaged.places(np.array([query]))
        common = overlaps(graph.averaged.keys[places] % graph.n, graph.averaged.values[places], inverted)
        yield common[len(queries) :], float(graph.farthest[query])


def _alone(queries: NDArray[np.float32], gallery: NDArray[np.float32], k1: int, k2: int) -> Iterator[tuple[Values, float]]:
    graph = Graph(np.concatenate([gallery, gallery[:1]]), len(gallery), k1, k2)
    joining = Joining(graph)
    for start in range(0, len(queries), _BLOCK_PROBES):
        probes = queries[start : start + _BLOCK_PROBES]
        tile, errors = graph.screen.tile(probes)
        for probe, row, error in zip(probes, tile, errors, strict=True):
            yield joining.overlaps(probe, row, float(error))


def _squared_distances(queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> NDArray[np.float32]:
    """(Q, G), worked out in double: equal vectors keep equal distances."""
    distances = np.empty((len(queries), len(gallery)), np.float32)
    left = queries.astype(np.float64)
    squares = np.einsum("nd,nd->n", left, left)[:, None]
    for start in range(0, len(gallery), _BLOCK_GALLERY):
        right = gallery[start : start + _BLOCK_GALLERY].astype(np.float64)
        block = squares + np.einsum("nd,nd->n", right, right) - 2 * (left @ right.T)
        distances[:, start : start + _BLOCK_GALLERY] = np.maximum(block, 0)
    return distances


def _checked(
    query_QD: NDArray[np.floating], gallery_GD: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As float32, contiguous. Raises: ValueError."""
    if query_QD.ndim != 2 or gallery_GD.ndim != 2 or query_QD.shape[1] != gallery_GD.shape[1] or not len(gallery_GD):
        raise ValueError(f"vectors are {query_QD.shape} and {gallery_GD.shape}, wanted (Q, D) and (G, D) with G of 1 or more")
    checked = np.ascontiguousarray(query_QD, np.float32), np.ascontiguousarray(gallery_GD, np.float32)
    for name, vectors in zip(("query", "gallery"), checked, strict=True):
        bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", vectors, vectors)))
        if len(bad):
            raise ValueError(f"{name} vector {bad[0]} is infinite or not a number; leave it out")
    return checked
