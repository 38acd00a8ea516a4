"""CUHK03 as single pictures, `C_PPP_V_II.png`: camera pair, person of it, view, number. The camera is the view.

The new protocol's lists (767 people to train, 700 to test) are in `cuhk03_new_protocol_config_detected.mat` and
`..._labeled.mat`; detected is read unless the other file is named in place of the root. Without either, all pictures are one
set: the classic protocol draws its people. The release itself, cuhk-03.mat, is HDF5, for which this package has no reader.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from serve.datasets.mat import variables, whole_numbers
from serve.datasets.tree import Tree, sample_named
from serve.errors import SourceError
from serve.samples import ImageSet, Sample

_NAME = re.compile(r"(?P<identity>[1-5]_\d{3})_(?P<camera>[12])_\d{2}\.\w+$")
_CONFIG = "cuhk03_new_protocol_config_{}.mat"
_KINDS = ("detected", "labeled")
_FOLDERS = ("images_{}", "{}", "images")
_RELEASE = ("cuhk-03.mat", "cuhk03_release/cuhk-03.mat")


def read(tree: Tree) -> ImageSet | None:
    """By a list of the new protocol, or by the names of all pictures. Raises: SourceError."""
    root = tree.find(*map(_CONFIG.format, _KINDS))
    if root is not None:
        return _new_protocol(tree, root)
    if tree.pictures and all(_NAME.match(member.rpartition("/")[2]) for member in tree.pictures):
        both = tree.find("images_detected")  # beside images_labeled, which shows the same people once more
        return ImageSet(train=tree.named("" if both is None else f"{both}images_detected", _NAME), layout="cuhk03-classic")
    _refuse_release(tree)
    return None


def _new_protocol(tree: Tree, root: str) -> ImageSet:
    there = [kind for kind in _KINDS if tree.has(root + _CONFIG.format(kind))]
    kind = next((kind for kind in there if tree.choice.endswith(_CONFIG.format(kind))), there[0])
    folder = next((name for pattern in _FOLDERS if tree.has(root + (name := pattern.format(kind)))), None)
    if folder is None:
        _refuse_release(tree)
        raise SourceError(f"{tree.source(root)}: has no folder images_{kind} with pictures named like 1_001_1_01.png")
    config = root + _CONFIG.format(kind)
    names, *parts = variables(tree, config, "filelist", "train_idx", "query_idx", "gallery_idx")
    train, query, gallery = (_chosen(tree, config, f"{root}{folder}", names, part) for part in parts)
    return ImageSet(train=train, query=query, gallery=gallery, layout="cuhk03")


def _chosen(tree: Tree, config: str, folder: str, names: NDArray[np.object_], places: NDArray[np.number]) -> tuple[Sample, ...]:
    """The pictures at these places, from 1, of the list of all."""
    rows = whole_numbers(places, tree.source(config)) - 1
    beyond = rows[(rows < 0) | (rows >= len(names))]
    if len(beyond):
        raise SourceError(f"{tree.source(config)}: points at picture {beyond[0] + 1:,} of {len(names):,}; download it again")
    members = [f"{folder}/{np.squeeze(names[row])}" for row in rows]
    samples, there = [], tree.present(members, config)
    for member in members:
        match = _NAME.match(member.rpartition("/")[2])
        if match is None:
            raise SourceError(f"{tree.source(config)}: lists {member}, wanted names like 1_001_1_01.png")
        if member in there:
            samples.append(sample_named(tree.source(member), match))
    return tuple(sorted(samples, key=lambda sample: sample.source))


def _refuse_release(tree: Tree) -> None:
    if not tree.pictures and any(tree.has(name) for name in _RELEASE):
        raise SourceError(
            f"{tree.source('cuhk-03.mat')}: HDF5 is not read here; unpack its pictures as images_detected/1_001_1_01.png "
            "and so on (camera pair, person, view, number), as torchreid does at its first use"
        )
