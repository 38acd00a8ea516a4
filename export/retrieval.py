"""What a lower precision costs a search, measured on the user's own pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serve.classify import Head
from serve.contract import Manifest, Retrieval

NEAREST = 10
BATCH, REPEATS = 32, 3
_BLOCK = 512
"""Queries scored at a time: 2,000 x 2,000 similarities need not be in memory at once."""


def measure_retrieval(
    graph: Path,
    reference: Path,
    manifest: Manifest,
    images: NDArray[np.uint8],
    *,
    labels: Sequence[str | None] = (),
    head: Head | None = None,
) -> Retrieval:
    """`graph` beside the float32 `reference`, on prepared uint8 images (N, H, W, 3), more than ten of them."""
    vectors, wanted = (embed(path, manifest, images) for path in (graph, reference))
    cosines = (vectors.astype(np.float64) * wanted).sum(1)
    truth = nearest(wanted, wanted)
    known = np.array([label or "" for label in labels]) if len(set(labels) - {None}) > 1 else None
    rates = dict.fromkeys((graph, reference), 0.0)
    for _ in range(REPEATS):  # in turn, so that a busy minute hits both
        for path in rates:
            rates[path] = max(rates[path], images_per_s(path, manifest, images[:BATCH]))
    return Retrieval(
        pictures=len(images),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        overlap_at_10=overlap(nearest(vectors, vectors), truth),
        recall_at_10=overlap(nearest(vectors, wanted), truth),
        knn_accuracy=None if known is None else knn_accuracy(nearest(vectors, vectors), known),
        knn_accuracy_fp32=None if known is None else knn_accuracy(truth, known),
        head_agreement=None if head is None else _agreement(head, vectors, wanted),
        size_bytes=graph.stat().st_size,
        size_bytes_fp32=reference.stat().st_size,
        images_per_s=rates[graph],
        images_per_s_fp32=rates[reference],
    )


def nearest(queries_ND: NDArray[np.float32], gallery_ND: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows (N, 10) of the gallery that are most similar to each query, itself left out; the lower row first where equal."""
    found = []
    for start in range(0, len(queries_ND), _BLOCK):
        scores = queries_ND[start : start + _BLOCK] @ gallery_ND.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST])
    return np.concatenate(found)


def overlap(found_N10: NDArray[np.int64], wanted_N10: NDArray[np.int64]) -> float:
    """Share of the wanted rows that were found, in any order."""
    return float((found_N10[:, :, None] == wanted_N10[:, None, :]).any(2).mean())


def knn_accuracy(nearest_N10: NDArray[np.int64], labels_N: NDArray[np.str_]) -> float:
    """Share of labelled pictures whose ten nearest vote for their label; among equals the first in the alphabet wins."""
    classes, codes = np.unique(labels_N, return_inverse=True)
    votes = (codes[nearest_N10][:, :, None] == np.arange(len(classes))).sum(1)
    votes[:, classes == ""] = -1
    right = votes.argmax(1) == codes
    return float(right[labels_N != ""].mean())


def embed(graph: Path, manifest: Manifest, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors (N, D) of prepared images."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    name = manifest.input.name
    return np.concatenate([session.run(None, {name: images[at : at + BATCH]})[0] for at in range(0, len(images), BATCH)])


def images_per_s(graph: Path, manifest: Manifest, images: NDArray[np.uint8]) -> float:
    """Of one batch on all cores, after a first run that is not counted."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    session.run(None, {manifest.input.name: images})
    started = time.perf_counter()
    session.run(None, {manifest.input.name: images})
    return len(images) / (time.perf_counter() - started)


def _agreement(head: Head, vectors: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    classes = (head.probabilities(found).argmax(1) for found in (vectors, wanted))
    return float(np.equal(*classes).mean())
