"""MSMT17, both versions: lists name the pictures and their identities, the pictures' names their cameras.

`0000/0000_000_01_0303morning_0015_0.jpg 0` in list_train.txt: identity 0, camera 1. Training and test people are both numbered
from 0, so that the former are called train-0 here. `list_val.txt` is of the training people: it becomes the role `test`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from serve.datasets.tree import Tree, sample_named
from serve.errors import SourceError
from serve.samples import ImageSet, Sample

_NAME = re.compile(r"\d+_\d+_(?P<camera>\d+)_")
_QUERY, _GALLERY = "list_query.txt", "list_gallery.txt"


def read(tree: Tree) -> ImageSet | None:
    """MSMT17_V1 (train, test) or MSMT17_V2 (mask_train_v2, mask_test_v2)."""
    root = tree.find(_QUERY, _GALLERY)
    if root is None:
        return None
    train_folder, test_folder = ("mask_train_v2", "mask_test_v2") if tree.has(f"{root}mask_test_v2") else ("train", "test")
    return ImageSet(
        train=_listed(tree, f"{root}list_train.txt", f"{root}{train_folder}", "train-"),
        test=_listed(tree, f"{root}list_val.txt", f"{root}{train_folder}", "train-"),
        query=_listed(tree, f"{root}{_QUERY}", f"{root}{test_folder}", ""),
        gallery=_listed(tree, f"{root}{_GALLERY}", f"{root}{test_folder}", ""),
        layout="msmt17",
    )


def _listed(tree: Tree, listing: str, folder: str, prefix: str) -> tuple[Sample, ...]:
    if not tree.has(listing):
        return ()
    samples = []
    rows = [(f"{folder}/{path}", identity) for path, identity in tree.rows(listing, 2)]
    there = tree.present([member for member, _ in rows], listing)
    for member, identity in rows:
        match = _NAME.match(member.rpartition("/")[2])
        if match is None:
            raise SourceError(f"{tree.source(listing)}: {member} names no camera, wanted 0000_000_01_0303morning_0015_0.jpg")
        if member in there:
            samples.append(replace(sample_named(tree.source(member), match), identity=f"{prefix}{identity}"))
    return tuple(sorted(samples, key=lambda sample: sample.source))
