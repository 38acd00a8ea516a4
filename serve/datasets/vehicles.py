"""Vehicles: VeRi-776, with twenty cameras, and VehicleID, which names none."""

from __future__ import annotations

import re

from serve.datasets.tree import Tree
from serve.samples import ImageSet, Sample

_VERI_NAME = re.compile(r"(?P<identity>\d+)_c(?P<camera>\d{3})_(?P<time>\d+)_")
_SPLITS = "train_test_split"
_SMALL_TEST = "test_list_800.txt"


def read_veri(tree: Tree) -> ImageSet | None:
    """VeRi-776: `0002_c002_00030600_0.jpg` is vehicle 2, camera 2, frame 30600."""
    root = tree.find("image_query")
    if root is None or not tree.has(f"{root}image_test"):
        return None
    train, query, gallery = (tree.named(f"{root}image_{part}", _VERI_NAME) for part in ("train", "query", "test"))
    return ImageSet(train=train, query=query, gallery=gallery, layout="veri")


def read_vehicleid(tree: Tree) -> ImageSet | None:
    """VehicleID: lists name pictures and vehicles. The test list is that of 800 vehicles unless another is named for the root.

    Its protocol draws queries and gallery, so that all of it has the role `test`.
    """
    root = tree.find(f"{_SPLITS}/train_list.txt", f"{_SPLITS}/{_SMALL_TEST}")
    if root is None:
        return None
    test = tree.choice.rpartition("/")[2] or _SMALL_TEST
    return ImageSet(train=_listed(tree, root, "train_list.txt"), test=_listed(tree, root, test), layout="vehicleid")


def _listed(tree: Tree, root: str, name: str) -> tuple[Sample, ...]:
    listing = f"{root}{_SPLITS}/{name}"
    if not tree.has(listing):
        return ()
    rows = [(f"{root}image/{picture}.jpg", vehicle) for picture, vehicle in tree.rows(listing, 2)]
    there = tree.present([member for member, _ in rows], listing)
    samples = [Sample(tree.source(member), identity=vehicle) for member, vehicle in rows if member in there]
    return tuple(sorted(samples, key=lambda sample: sample.source))
