"""What is asked about, an item of the gallery, a vector or the picture behind a URL, and the unit vector of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator
from starlette.exceptions import HTTPException

from serve.errors import GalleryError
from serve.gateway.batching import Batcher
from serve.gateway.limits import MAX_ID, MAX_URL
from serve.gateway.shelf import Shelf, on_item
from serve.gateway.urls import Fetcher
from serve.index import unit_vectors

Numbers: TypeAlias = list[Annotated[float, Field(allow_inf_nan=False)]]
WAYS = {"id": "integer", "vector": "array", "url": "string"}
"""To say what is asked about, with the JSON type of each."""


class Subject(BaseModel):
    """What is asked about, by exactly one of its `ways`."""

    ways: ClassVar[Mapping[str, str]] = WAYS

    id: int | None = Field(None, ge=1, le=MAX_ID, description="An item of the gallery.")
    vector: Numbers | None = Field(None, description="As long as the encoder's; it need not be of unit length.")
    url: str | None = Field(None, max_length=MAX_URL, description="Of a picture, on one of the hosts that this server may ask.")

    @model_validator(mode="after")
    def _one_of_its_ways(self) -> Self:
        given = [name for name in self.ways if getattr(self, name) is not None]
        if len(given) != 1:
            wanted = f"wanted exactly one of {', '.join(self.ways)}"
            raise ValueError(f"got {' and '.join(given) or 'nothing'} to search with, {wanted}")
        return self


def one_of(ways: Mapping[str, str]) -> dict[str, Any]:
    """What OpenAPI says of that."""
    return {"oneOf": [{"required": [name], "properties": {name: {"type": kind}}} for name, kind in ways.items()]}


async def vector_of(subject: Subject, shelf: Shelf, batcher: Batcher, fetcher: Fetcher) -> NDArray[np.float32]:
    """The unit vector (D,). Raises: HTTPException, ImageError, GalleryError, and what the encoder raises."""
    if subject.id is not None:
        item_id = subject.id
        return await shelf.read(on_item(item_id, lambda gallery: gallery.vector(item_id)))
    if subject.url is not None:
        return await batcher.embed(await fetcher.fetch(subject.url))
    return unit_vector(subject.vector or [], batcher.encoder.manifest.embedding_dim)


def unit_vector(vector: Numbers, dim: int) -> NDArray[np.float32]:
    """The unit vector (D,) of what was sent. Raises: HTTPException 422."""
    try:
        unit: NDArray[np.float32] = unit_vectors(np.array([vector], np.float64), dim, "vector")[0]
    except GalleryError as error:
        raise HTTPException(422, str(error)) from error
    return unit
