"""All enrolled pictures of a gallery as of one moment, for what compares each with all others."""

from __future__ import annotations

import tempfile
from array import array
from dataclasses import dataclass
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serve.errors import GalleryError
from serve.filters import And, Condition
from serve.gallery import Gallery
from serve.samples import JUNK_IDENTITY, NOBODY

_RANKED = And((Condition("identity", "is known"), Condition("identity", "!=", (JUNK_IDENTITY,))))
"""What a ranking holds: somebody's pictures, and those of nobody in particular."""


@dataclass(frozen=True, eq=False)
class Enrolled:
    """Made by `Enrolled.of`: N pictures by growing id. In memory are 25 bytes of each; the vectors are in a temporary file."""

    gallery: Gallery
    ids: NDArray[np.int64]
    identity: NDArray[np.int64]
    """(N,), as numbers."""
    camera: NDArray[np.int64]
    """(N,), as numbers; each picture of unknown camera has one of its own."""
    somebody: NDArray[np.bool_]
    """(N,), False for data sets' 0000: people of whom nobody says who is who. They have a number each, and so no match."""
    vectors: NDArray[np.float32]
    """(N, D)"""

    @classmethod
    def of(cls, gallery: Gallery) -> Self:
        """Read the gallery once, in blocks. Raises: GalleryError, also where temporary files have no room for the vectors."""
        try:
            with tempfile.TemporaryFile() as file:
                ids, identity, camera, somebody = _copied(gallery, file)
                file.flush()
                # mapped, a file outlives its closing; an empty one cannot be
                flat = np.asarray(np.memmap(file, np.float32, "r")) if len(ids) else np.empty(0, np.float32)
        except OSError as error:
            raise GalleryError(
                f"{tempfile.gettempdir()}: no room for a copy of the vectors of {gallery.address} ({error.strerror or error}); "
                "free some, or name another folder in TMPDIR"
            ) from error
        return cls(gallery, ids, identity, camera, somebody.astype(bool), flat.reshape(len(ids), -1 if len(ids) else 1))


def _copied(gallery: Gallery, file: IO[bytes]) -> NDArray[np.int64]:
    """Write the vectors. Returns: ids, identities, cameras and whether it is somebody, (4, N)."""
    facts = array("q")
    identities, cameras = dict[str | int | None, int](), dict[str | int, int]()
    with tqdm(total=gallery.count(_RANKED), desc="reading", unit="img", delay=1, leave=False, dynamic_ncols=True) as bar:
        for items, vectors_ND in gallery.rows(_RANKED):
            for item in items:
                somebody = item.identity not in NOBODY
                identity = identities.setdefault(item.identity if somebody else item.id, len(identities))
                camera = cameras.setdefault(item.id if item.camera is None else item.camera, len(cameras))
                facts.extend((item.id, identity, camera, somebody))
            file.write(np.ascontiguousarray(vectors_ND).data)
            bar.update(len(items))
    return np.array(facts, np.int64).reshape(-1, 4).T


def evenly(places: NDArray[np.intp], sample: int) -> NDArray[np.intp]:
    """All of `places`, or `sample` of them at equal steps. Raises: GalleryError."""
    if sample < 1:
        raise GalleryError(f"review: the sample is {sample}, wanted 1 or more")
    few = min(len(places), sample)
    return places[np.arange(few) * len(places) // max(few, 1)]
