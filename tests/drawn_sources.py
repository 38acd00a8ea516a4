"""Drawn pictures under any names, and how a source that cannot be used is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from serve.errors import SourceError
from serve.sources import open_source


def picture(seed=0, size=(9, 7), kind="PNG"):
    """The bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


def fill(root, *names):
    """A picture of its own under each name."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    return root


def refusal(source):
    """The one line that says why."""
    with pytest.raises(SourceError) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)
