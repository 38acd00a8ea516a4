"""SYSU-30k: a test set of 1,000 queries among half a million, and training pictures that are labelled by the bag.

`000028311_c1_1.jpg`: identity, camera. `0000others_c1_1.jpg` is somebody who is in no query. `bag_level_label.json` says which
people are in a bag, not who is on which of its pictures: a training picture has its bag's label, such as "2 3 4", no identity.
"""

from __future__ import annotations

import json
import re

from serve.datasets.tree import Tree
from serve.errors import SourceError
from serve.samples import ImageSet, Sample

_NAME = re.compile(r"(?P<identity>\d+(?:others)?)_c(?P<camera>\d+)")
_TRAIN, _TEST, _BAGS = "sysu_train_set_all", "sysu_test_set_all", "bag_level_label.json"
_OTHERS = "gallery/0000others"


def read(tree: Tree) -> ImageSet | None:
    """The whole of it, or sysu_test_set_all alone. Raises: SourceError."""
    root = tree.find(_TRAIN, _TEST)
    test = tree.find(_OTHERS) if root is None else f"{root}{_TEST}/"
    if test is None:
        return None
    return ImageSet(
        train=_train(tree, root) if root is not None else (),
        query=tree.named(f"{test}query", _NAME),
        gallery=tree.named(f"{test}gallery", _NAME),
        layout="sysu30k",
    )


def _train(tree: Tree, root: str) -> tuple[Sample, ...]:
    labels = next((_bag_labels(tree, path) for path in (f"{root}{_BAGS}", f"{root}meta/{_BAGS}") if tree.has(path)), {})
    folders = ((member, member.split("/")[-2]) for member in tree.below(f"{root}{_TRAIN}"))
    return tuple(Sample(tree.source(member), label=labels.get(folder)) for member, folder in folders)


def _bag_labels(tree: Tree, member: str) -> dict[str, str]:
    """Folder -> the people of its bags."""
    people: dict[str, set[int]] = {}
    try:
        for bag in json.loads(tree.read(member)):
            for pattern in bag["BagImages"]:
                people.setdefault(pattern.split("/")[0], set()).update(map(int, bag["BagLabel"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SourceError(
            f'{tree.source(member)}: wanted a list of {{"BagLabel": [2, 3], "BagImages": ["0000000002/*"]}} ({error!r}); '
            "download it again"
        ) from error
    return {folder: " ".join(map(str, sorted(ids))) for folder, ids in people.items()}
