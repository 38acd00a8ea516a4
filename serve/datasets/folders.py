"""Pictures in folders by identity and camera, as people lay out their own: `query/ID/[CAMERA/]x.jpg`, `gallery/...`.

Without the two roles it is `ID/cam1/x.jpg`, where the camera's folder says that it is one. Below `query` and `gallery` a camera
may also stand in the names of the pictures, as `0002_c1...` in folder 0002.
"""

from __future__ import annotations

import re

from serve.datasets.market import MARKET_NAME
from serve.datasets.tree import Tree
from serve.samples import ImageSet, Sample

_CAMERA = re.compile(r"(?:c|cam|camera)[-_ ]?\d+", re.IGNORECASE)
_QUERY, _GALLERY, _TRAIN = "query", "gallery", "train"


def read(tree: Tree) -> ImageSet | None:
    """Folders `query` and `gallery`, or a camera's folder in every identity's."""
    root = tree.find(_QUERY)
    if root is not None and tree.has(f"{root}{_GALLERY}"):
        train, query, gallery = (_samples(tree, f"{root}{role}") for role in (_TRAIN, _QUERY, _GALLERY))
        return ImageSet(train=train, query=query, gallery=gallery) if query and gallery else None
    shift = len(tree.wrapping)
    if tree.pictures and all(_is_camera(member[shift:].split("/")) for member in tree.pictures):
        return ImageSet(train=_samples(tree, tree.wrapping.rstrip("/")))
    return None


def _is_camera(path: list[str]) -> bool:
    return len(path) == 3 and _CAMERA.fullmatch(path[1]) is not None


def _samples(tree: Tree, folder: str) -> tuple[Sample, ...]:
    """Pictures that lie in no identity's folder are left out."""
    shift = len(folder) + 1 if folder else 0
    paths = ((member, member[shift:].split("/")) for member in tree.below(folder))
    return tuple(_sample(tree.source(member), *path) for member, path in paths if len(path) > 1)


def _sample(source: str, identity: str, *inner: str) -> Sample:
    match = MARKET_NAME.match(inner[-1])
    if len(inner) > 1:
        return Sample(source, identity=identity, camera=inner[0])
    if match is not None and match["identity"] == identity:
        return Sample(source, identity=identity, camera=str(int(match["camera"])))
    return Sample(source, identity=identity)
