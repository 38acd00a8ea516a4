"""Routes that say who is on pictures: somebody enrolled in the gallery, or nobody known."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from serve.errors import GalleryError
from serve.filters import Where
from serve.gallery import Gallery
from serve.gateway.batching import Batcher
from serve.gateway.examples import ENCODER_ID, ITEM, VECTOR, example
from serve.gateway.json_body import json_body, read_json
from serve.gateway.limits import MAX_HITS, Limits
from serve.gateway.metrics import Metrics
from serve.gateway.problems import PICTURE_PROBLEMS, documented
from serve.gateway.shelf import Shelf, asked_where
from serve.gateway.subject import WAYS, Numbers, Subject, one_of, unit_vector, vector_of
from serve.gateway.uploads import PICTURES_BODY, read_pictures
from serve.gateway.urls import Fetcher
from serve.identity.calibration import Calibration
from serve.identity.decision import Decision
from serve.identity.identify import identify, outgrown
from serve.pooling import pool
from serve.preprocess import ImageError
from serve.search import Hit

_LOOK_AGAIN_S = 60
"""Whether the gallery has outgrown its threshold takes a look at every item, so it is asked as seldom as this."""
_IDENTIFY_WAYS = {**WAYS, "vectors": "array"}


class Among(BaseModel):
    """Whom to look among, and how many of them to tell of."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(5, ge=1, le=MAX_HITS, description="At most so many candidates.")
    where: str | None = Field(None, description="Only among items that pass, such as `camera != 2 and time > 5`.")


class IdentifyQuery(Among, Subject):
    """Who is asked about, where an item is left out of its own answer, and whom to look among."""

    ways: ClassVar[Mapping[str, str]] = _IDENTIFY_WAYS
    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            **one_of(_IDENTIFY_WAYS),
            "examples": [
                {"id": 7, "where": "camera != 2"},
                {"vector": VECTOR, "k": 3},
                {"vectors": [VECTOR, VECTOR]},
                {"url": "https://pictures.example/felix.jpg"},
            ],
        },
    )

    vectors: Annotated[list[Numbers], Field(min_length=1)] | None = Field(
        None, description="Of several pictures of one tracklet, which are pooled."
    )


class IdentifyAnswer(BaseModel):
    """Who it is, and the best picture of each of the best identities; `undecided` where no threshold is served.

    `probability`: that the best identity is the right one. `warning`: why the threshold no longer keeps its promise.
    """

    model_config = example(
        {
            "encoder_id": ENCODER_ID,
            "verdict": "known",
            "identity": "felix",
            "score": 0.9,
            "probability": 0.97,
            "threshold": 0.71,
            "candidates": [{**ITEM, "score": 0.9}],
            "warning": "the threshold was chosen among 50 identities, now there are 80: ...",
        }
    )
    encoder_id: str
    verdict: Literal["known", "unknown", "undecided"]
    identity: str | None
    score: float | None
    probability: float | None
    threshold: float | None
    candidates: list[Hit]
    warning: str | None


def reid_routes(
    shelf: Shelf, batcher: Batcher, fetcher: Fetcher, limits: Limits, metrics: Metrics, calibration: Calibration | None
) -> APIRouter:
    """/v1/reid/identify and /v1/reid/identify/image."""
    router = APIRouter(prefix="/v1/reid/identify", tags=["reid"])
    encoder_id, dim = batcher.encoder.encoder_id, batcher.encoder.manifest.embedding_dim

    @lru_cache(maxsize=1)
    def warning(gallery: Gallery, _: int) -> str | None:
        return None if calibration is None else outgrown(gallery, calibration)

    async def answer(probe_D: NDArray[np.float32], where: Where, k: int, exclude_ids: Sequence[int] = ()) -> IdentifyAnswer:
        def decide(gallery: Gallery) -> tuple[Decision, str | None]:
            with metrics.search_s.time():
                decision = identify(gallery, probe_D[None], calibration, where=where, exclude_ids=exclude_ids, k=k)
            return decision, warning(gallery, int(time.monotonic() / _LOOK_AGAIN_S))

        decision, warned = await shelf.read(decide)
        return IdentifyAnswer(**vars(decision), encoder_id=encoder_id, warning=warned)

    @router.post(
        "",
        name="identify",
        summary="Who is on an item, on the pictures of vectors, or on the picture behind a URL",
        openapi_extra=json_body(IdentifyQuery),
        responses=documented(*PICTURE_PROBLEMS, 404, 502),
    )
    async def identify_subject(request: Request) -> IdentifyAnswer:
        query = await read_json(request, IdentifyQuery)
        where = asked_where(query.where)
        if query.vectors is not None:
            probe_D = _pooled([unit_vector(vector, dim) for vector in query.vectors])
        else:
            probe_D = await vector_of(query, shelf, batcher, fetcher)
        return await answer(probe_D, where, query.k, [] if query.id is None else [query.id])

    @router.post(
        "/image",
        summary="Who is on the pictures of one tracklet",
        openapi_extra=PICTURES_BODY,
        responses=documented(*PICTURE_PROBLEMS),
    )
    async def identify_image(request: Request, among: Annotated[Among, Query()]) -> IdentifyAnswer:
        where = asked_where(among.where)
        return await answer(await _embedded(batcher, await read_pictures(request, most=limits.max_pictures)), where, among.k)

    return router


async def _embedded(batcher: Batcher, pictures: Sequence[bytes]) -> NDArray[np.float32]:
    """One unit vector (D,) of them. Raises: ImageError of the first that cannot be read, HTTPException 422."""
    vectors = []
    for vector in await batcher.embed_each(pictures):
        if isinstance(vector, ImageError):
            raise vector
        vectors.append(vector)
    return _pooled(vectors)


def _pooled(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Now, so that vectors which cancel out are the fault of who sent them. Raises: HTTPException 422."""
    try:
        return pool(np.stack(vectors))
    except GalleryError as error:
        raise HTTPException(422, str(error)) from error
