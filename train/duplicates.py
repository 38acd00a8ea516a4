"""Exact and near duplicates among the training pictures: contrastive training takes each for a different picture.

A picture's fingerprint is a digest of its pixels and a grey 16 x 16 thumbnail. What is compared are the thumbnail's
steps from each pixel to its right and lower neighbour, as in a difference hash (dHash, 64 signs of such steps; imagehash,
imagededup). Their correlation says more than their signs: of the 400 pairs that it finds in CIFAR-10, 87 differ in at most
3 of 64 signs. Steps, not grey values: any two clear skies agree in those.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from serve.dedup.files import digest
from serve.samples import Sample

THUMBNAIL_PX = 16
FINGERPRINT = np.dtype([("digest", np.uint64), ("thumbnail", np.uint8, (THUMBNAIL_PX, THUMBNAIL_PX))])
"""264 bytes a picture: a million take a quarter of a GiB."""

NEAR_CORRELATION = 0.85
"""By eye, of the 96 pairs of CIFAR-10 just above it 88 show one photograph; most of the others share a black frame."""
MIN_STEP = 2.0
"""Grey levels, root mean square: below this a thumbnail is flat, and its steps are noise that may agree by chance."""
_COARSE_CORRELATION = 0.7  # of 8 x 8 thumbnails; of the pairs above NEAR_CORRELATION in CIFAR-10 none is below
_NEIGHBOURS = 4  # itself and three others: bounds the work where everything looks alike; groups join by their chains
_EXHAUSTIVE = 4096
_CHUNK_PIXELS = 2**21  # 24 MiB of floats at a time
_Scalar = TypeVar("_Scalar", bound=np.generic)
_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's "L"


@dataclass(frozen=True)
class DuplicateReport:
    """What was found. A picture is `exact` if another has its very pixels, else `near` if another nearly looks like it."""

    pictures: int
    exact_pictures: int
    near_pictures: int
    groups: tuple[tuple[str, ...], ...]
    """Sources that belong together, exact and near alike; the largest groups first."""

    def sentence(self) -> str:
        """One line: how many, what it does to training, and three groups by name."""
        doubles = self.exact_pictures + self.near_pictures
        if not doubles:
            return f"no duplicates among {self.pictures:,} pictures"
        groups = "1 group" if len(self.groups) == 1 else f"{len(self.groups):,} groups"
        counted = f"{self.exact_pictures:,} exact and {self.near_pictures:,} near, in {groups}"
        examples = self.groups[:3]
        names = [name for group in examples for name in group]
        shared = os.path.commonprefix(names)  # noqa: RUF071  commonpath refuses relative beside absolute
        folder = shared[: shared.rfind("/") + 1]
        return (
            f"{doubles:,} of {self.pictures:,} pictures ({doubles / self.pictures:.1%}) are duplicates of others ({counted}): "
            "SimCLR pushes two of one batch apart as if they differed; keep one of each group. "
            f"Such as {'; '.join(_named(group, folder) for group in examples)}"
        )


def report_duplicates(pixels: Tensor, samples: Sequence[Sample]) -> DuplicateReport:
    """Look for doubles among decoded pictures, uint8 (N, 3, H, W), and name them by their samples' sources."""
    if len(pixels) != len(samples):
        raise ValueError(f"{len(pixels)} pictures and {len(samples)} samples, wanted as many")
    rows = max(1, _CHUNK_PIXELS // max(1, pixels.shape[2] * pixels.shape[3]))
    parts = [fingerprints(chunk) for chunk in pixels.split(rows)]
    prints = np.concatenate(parts) if parts else np.empty(0, FINGERPRINT)
    return find_duplicates(prints, [sample.source for sample in samples])


def fingerprints(images: Tensor) -> NDArray[np.void]:
    """Of uint8 (N, 3, H, W): FINGERPRINT (N,). May be taken batch by batch while streaming, and concatenated.

    The thumbnail's pixel i averages rows floor(i H / 16) to ceil((i + 1) H / 16), and columns likewise.
    """
    count, _channels, height, width = images.shape
    prints = np.empty(count, FINGERPRINT)
    prints["digest"] = [digest(image.data) for image in images.cpu().contiguous().numpy()]
    grey = torch.matmul(_LUMA.to(images.device), images.float().flatten(2)).view(count, 1, height, width)
    thumbnails = F.adaptive_avg_pool2d(grey, THUMBNAIL_PX)[:, 0]
    prints["thumbnail"] = thumbnails.round().to(torch.uint8).cpu().numpy()
    return prints


def find_duplicates(prints: NDArray[np.void], names: Sequence[str]) -> DuplicateReport:
    """Group pictures by their fingerprints (N,), named by `names`. About N^1.5 work: a minute or two for a million.

    Near pairs come from each picture's three nearest neighbours, sought among cells of look-alikes (IVF): on CIFAR-10 this
    finds 95 % of the pairs that an exhaustive search finds.
    """
    _, first, picture_to_first, copies = np.unique(prints["digest"], return_index=True, return_inverse=True, return_counts=True)
    exact = copies[picture_to_first] > 1
    pairs = first[_near_pairs(prints["thumbnail"][first])]
    near_firsts = np.zeros(len(prints), bool)
    near_firsts[pairs.ravel()] = True
    near = near_firsts & ~exact
    links = np.stack([np.arange(len(prints)), first[picture_to_first]], axis=1)[exact]
    groups = _connected(np.concatenate([links, pairs]))
    return DuplicateReport(
        pictures=len(prints),
        exact_pictures=int(exact.sum()),
        near_pictures=int(near.sum()),
        groups=tuple(tuple(names[i] for i in group) for group in groups),
    )


def _near_pairs(thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Rows (i, j), i < j, of thumbnails (M, 16, 16) whose steps correlate, the flat ones left out."""
    rows = np.flatnonzero(np.concatenate([_has_texture(chunk) for chunk in _chunks(thumbnails)]))
    candidates = rows[_look_alikes(np.concatenate([_steps(_halved(chunk)) for chunk in _chunks(thumbnails[rows])]))]
    similar = [_correlation(thumbnails, chunk) >= NEAR_CORRELATION for chunk in _chunks(candidates)]
    return candidates[np.concatenate(similar)]


def _look_alikes(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Pairs (P, 2), i < j, of unit vectors (M, D) and their nearest neighbours."""
    count, dimension = vectors.shape
    if not count:
        return np.empty((0, 2), np.int64)
    index: Any = faiss.IndexFlatIP(dimension)
    if count > _EXHAUSTIVE:
        cells = int(2 * count**0.5)
        index = faiss.IndexIVFFlat(index, dimension, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 5, 1, 64
        index.nprobe = 4
        index.train(vectors)
    index.add(vectors)
    with tqdm(total=count, desc="looking for duplicates", unit="img", delay=2, leave=False, dynamic_ncols=True) as bar:
        found = []
        for chunk in _chunks(vectors):
            found.append(index.search(chunk, _NEIGHBOURS))
            bar.update(len(chunk))
    similarity, other = (np.concatenate(part).ravel() for part in zip(*found, strict=True))
    one = np.repeat(np.arange(count), _NEIGHBOURS)
    alike = (one != other) & (other >= 0) & (similarity >= _COARSE_CORRELATION)
    return np.unique(np.sort(np.stack([one, other], axis=1)[alike], axis=1), axis=0)


def _chunks(rows: NDArray[_Scalar], size: int = 8192) -> list[NDArray[_Scalar]]:
    return [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]


def _halved(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    half = THUMBNAIL_PX // 2
    blocks: NDArray[np.float32] = thumbnails.reshape(-1, half, 2, half, 2).mean(axis=(2, 4), dtype=np.float32)
    return blocks


def _raw_steps(thumbnails: NDArray[np.generic]) -> NDArray[np.float32]:
    grey = thumbnails.astype(np.float32)
    count, size, _ = grey.shape
    return np.concatenate([np.diff(grey, axis=axis).reshape(count, size * (size - 1)) for axis in (1, 2)], axis=1)


def _has_texture(thumbnails: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray(np.square(_raw_steps(thumbnails)).mean(axis=1) >= MIN_STEP**2)


def _steps(thumbnails: NDArray[np.generic]) -> NDArray[np.float32]:
    """Steps to the right and lower neighbours as vectors of mean 0 and norm 1."""
    steps = _raw_steps(thumbnails)
    steps -= steps.mean(axis=1, keepdims=True)
    steps /= np.maximum(np.linalg.norm(steps, axis=1, keepdims=True), 1e-6)
    return steps


def _correlation(thumbnails: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    one, other = (_steps(thumbnails[pairs[:, side]]) for side in (0, 1))
    return np.asarray(np.einsum("pd,pd->p", one, other))


def _connected(pairs: NDArray[np.int64]) -> list[list[int]]:
    """The groups of indices that pairs (P, 2) join, the largest first."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while (above := parent.setdefault(i, i)) != i:
            parent[i] = i = parent[above]  # halves the path, so that chains stay cheap
        return i

    for one, other in pairs.tolist():
        parent[root(one)] = root(other)
    groups: dict[int, list[int]] = {}
    for i in sorted(parent):
        groups.setdefault(root(i), []).append(i)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def _named(group: Sequence[str], folder: str) -> str:
    one, other = (name.removeprefix(folder) for name in group[:2])
    return f"{one} = {other}" + (f" and {len(group) - 2:,} more" if len(group) > 2 else "")
