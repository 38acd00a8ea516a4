"""Re-identification: rank a gallery for one probe under the same-camera rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError
from serve.filters import And, Condition, Where, as_where
from serve.gallery import Gallery
from serve.pictures import Picture
from serve.samples import JUNK_IDENTITY
from serve.search import Hit


@dataclass(frozen=True)
class RankedHit(Hit):
    """A hit with the verdict on it: `match` is None where the identity of the probe or of the hit is unknown."""

    match: bool | None


def rank(
    gallery: Gallery,
    query: Picture | NDArray[np.floating],
    *,
    identity: str | None = None,
    camera: str | None = None,
    other_cameras_only: bool = False,
    where: str | Where | None = None,
    exclude_ids: Iterable[int] = (),
    k: int = 20,
) -> list[RankedHit]:
    """The `k` gallery items nearest to a probe, without junk: identity "-1", and the probe's identity seen by its own camera.

    If the probe's identity is unknown, its own camera's pictures stay; `other_cameras_only` takes all of them out, whoever is
    on them (items of unknown camera stay). Raises: GalleryError, ImageError.
    """
    if other_cameras_only and camera is None:
        raise GalleryError("rank: other_cameras_only needs the probe's camera; give camera=...")
    excluded = [*exclude_ids, *gallery.ids(_equal(identity=JUNK_IDENTITY))]
    if identity is not None and camera is not None:
        excluded += gallery.ids(_equal(identity=identity, camera=camera)).tolist()
    if other_cameras_only and camera is not None:
        where = And((as_where(where), Condition("camera", "!=", (camera,))))
    hits = gallery.search(query, k, where, excluded)
    return [RankedHit(**vars(hit), match=_match(identity, hit.identity)) for hit in hits]


def _equal(**values: str) -> Where:
    return And(tuple(Condition(field, "=", (value,)) for field, value in values.items()))


def _match(probe: str | None, found: str | None) -> bool | None:
    return None if probe is None or found is None else probe == found
