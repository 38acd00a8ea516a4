"""Routes that find what is similar in the gallery: to an item, a vector, a picture, or a picture that is named by its URL."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from serve.filters import Where
from serve.gallery import Gallery
from serve.gateway.batching import Batcher
from serve.gateway.examples import ENCODER_ID, ITEM, VECTOR, example
from serve.gateway.json_body import json_body, read_json
from serve.gateway.limits import MAX_HITS, MAX_ID, MAX_OFFSET
from serve.gateway.metrics import Metrics
from serve.gateway.problems import PICTURE_PROBLEMS, documented
from serve.gateway.shelf import Shelf, asked_where
from serve.gateway.subject import WAYS, Subject, one_of, vector_of
from serve.gateway.uploads import PICTURE_BODY, read_picture
from serve.gateway.urls import Fetcher
from serve.search import Hit

ItemId = Annotated[int, Path(ge=1, le=MAX_ID)]


class Choice(BaseModel):
    """Which of the hits are wanted."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(10, ge=1, le=MAX_HITS, description="At most so many hits.")
    where: str | None = Field(None, description="A condition such as `label = cat and time > 5`.")
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="Skip the best so many: the next page.")
    threshold: float | None = Field(None, ge=-1, le=1, allow_inf_nan=False, description="Only hits of this score or more.")


class SearchQuery(Choice, Subject):
    """What to search with, where an item is its own first hit, and which hits are wanted."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            **one_of(WAYS),
            "examples": [
                {"id": 7, "k": 10, "where": "camera != 2"},
                {"vector": VECTOR, "threshold": 0.5},
                {"url": "https://pictures.example/cat.jpg"},
            ],
        },
    )


class SearchAnswer(BaseModel):
    """Hits by falling score; equal ones by growing id."""

    model_config = example({"encoder_id": ENCODER_ID, "hits": [{**ITEM, "score": 0.9}]})
    encoder_id: str
    hits: list[Hit]


def search_routes(shelf: Shelf, batcher: Batcher, fetcher: Fetcher, metrics: Metrics) -> APIRouter:
    """/v1/search and /v1/search/image."""
    router = APIRouter(prefix="/v1/search", tags=["search"])
    encoder_id = batcher.encoder.encoder_id

    async def answer(query_D: NDArray[np.float32], where: Where, choice: Choice) -> SearchAnswer:
        def search(gallery: Gallery) -> list[Hit]:
            with metrics.search_s.time():
                return _hits(gallery, query_D, where, choice)

        return SearchAnswer(encoder_id=encoder_id, hits=await shelf.read(search))

    @router.post(
        "",
        summary="What is similar to an item, a vector, or the picture behind a URL",
        openapi_extra=json_body(SearchQuery),
        responses=documented(*PICTURE_PROBLEMS, 404, 502),
    )
    async def search(request: Request) -> SearchAnswer:
        query = await read_json(request, SearchQuery)
        where = asked_where(query.where)
        return await answer(await vector_of(query, shelf, batcher, fetcher), where, query)

    @router.post(
        "/image", summary="What is similar to a picture", openapi_extra=PICTURE_BODY, responses=documented(*PICTURE_PROBLEMS)
    )
    async def search_image(request: Request, choice: Annotated[Choice, Query()]) -> SearchAnswer:
        where = asked_where(choice.where)
        return await answer(await batcher.embed(await read_picture(request)), where, choice)

    return router


def _hits(gallery: Gallery, query_D: NDArray[np.float32], where: Where, choice: Choice) -> list[Hit]:
    if choice.threshold is None:
        return gallery.search(query_D, choice.k, where, offset=choice.offset)
    return gallery.within(query_D, choice.threshold, where, choice.k, offset=choice.offset)
