"""Which data set a root or an archive holds."""

from __future__ import annotations

import re

from serve.datasets import cuhk03, folders, market, mars, msmt17, sysu30k, vehicles
from serve.datasets.tree import Tree
from serve.samples import ImageSet

_READERS = (
    market.read,
    msmt17.read,
    mars.read,
    vehicles.read_veri,
    vehicles.read_vehicleid,
    sysu30k.read,
    cuhk03.read,
    folders.read,
)
_CHOICE = re.compile(r"(.*?/)?((?:train_test_split/)?test_list_\d+\.txt|cuhk03_new_protocol_config_\w+\.mat)")


def recognise(tree: Tree) -> ImageSet | None:
    """The set whose layout these files have; None if it is none of those known. Raises: SourceError."""
    return next((images for read in _READERS if (images := read(tree)) is not None), None)


def split_choice(text: str) -> tuple[str, str]:
    """A source that names one of a set's lists in place of its root -> the root, and the list; any other -> itself, nothing."""
    match = _CHOICE.fullmatch(text)
    return (match[1] or "./", match[2]) if match else (text, "")
