"""Market-1501 and those with its folders and names: DukeMTMC-reID, and CUHK03-NP as its authors pack it.

`0002_c1s1_000451_03.jpg`: identity, camera and sequence, frame, box (DukeMTMC-reID: `0001_c2_f0046182.jpg`). -1 is junk, 0000 a
distractor: somebody who is in no query. `images/` beside the folders holds the 500,000 distractors that came later.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from serve.datasets.tree import Tree
from serve.samples import ImageSet

MARKET_NAME = re.compile(r"(?P<identity>-?\d+)_c(?P<camera>\d+)(?:s\d+_(?P<time>\d+))?")
WHOLE_NAME = re.compile(r"-?\d+_c\d+s\d+_\d+_\d+\.\w+$")
"""A name that is Market-1501's from end to end: pictures of such names need no folders to be recognised."""
_DUKE_NAME = re.compile(r"\d+_c\d+_f\d+\.\w+$")
_TRAIN, _QUERY, _GALLERY, _MORE = "bounding_box_train", "query", "bounding_box_test", "images"


def read(tree: Tree) -> ImageSet | None:
    """Market-1501's folders."""
    root = tree.find(_TRAIN, _GALLERY)
    if root is None:
        return None
    train, query, gallery, more = (tree.named(f"{root}{name}", MARKET_NAME) for name in (_TRAIN, _QUERY, _GALLERY, _MORE))
    names = [PurePosixPath(sample.source).name for sample in (train + query + gallery)[:1]]
    duke = any(map(_DUKE_NAME.match, names))
    return ImageSet(train=train, query=query, gallery=gallery + more, layout="duke" if duke else "market")
