"""Routes that say something of pictures: their vectors, their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.classify import Head
from serve.contract import Manifest
from serve.gateway.batching import Batcher
from serve.gateway.examples import ENCODER_ID, VECTOR, example
from serve.gateway.limits import Limits
from serve.gateway.problems import PICTURE_PROBLEMS, documented
from serve.gateway.uploads import PICTURES_BODY, read_pictures
from serve.preprocess import ImageError

_T = TypeVar("_T")


_CLASSIFIED = {"label": "cat", "probabilities": {"cat": 0.9, "dog": 0.1}}
_UNREADABLE = {"error": "image: not a readable picture (not a picture in a known format)"}


class Embedded(BaseModel):
    """A picture's unit vector (D)."""

    embedding: list[float]


class Classified(BaseModel):
    """A picture's likeliest class, null where the head is not confident enough, and the probability of each."""

    label: str | None
    probabilities: dict[str, float]


class Unreadable(BaseModel):
    """Why there is nothing to say of a picture."""

    error: str


class EmbedAnswer(BaseModel):
    """One result per picture, in the order they were sent."""

    model_config = example({"encoder_id": ENCODER_ID, "results": [{"embedding": VECTOR}, _UNREADABLE]})
    encoder_id: str
    results: list[Embedded | Unreadable]


class ClassifyAnswer(BaseModel):
    """One result per picture, in the order they were sent."""

    model_config = example({"encoder_id": ENCODER_ID, "results": [_CLASSIFIED, _UNREADABLE]})
    encoder_id: str
    results: list[Classified | Unreadable]


class Info(BaseModel):
    """What serves here."""

    manifest: Manifest
    classes: list[str]
    """Of the first head; empty without one."""
    heads: dict[str, list[str]]
    """The classes of each head, by its name."""
    limits: Limits


def picture_routes(batcher: Batcher, heads: Mapping[str, Head], limits: Limits) -> APIRouter:
    """/v1/info, /v1/embed, and /v1/classify if there is a head: the first, unless another is named."""
    router = APIRouter(prefix="/v1", tags=["pictures"])
    manifest = batcher.encoder.manifest
    names = list(heads)

    async def results(request: Request, tell: Callable[[NDArray[np.float32]], _T]) -> list[_T | Unreadable]:
        answers = await batcher.embed_each(await read_pictures(request, most=limits.max_pictures))
        if len(answers) == 1 and isinstance(answers[0], ImageError):
            raise answers[0]
        return [Unreadable(error=str(one)) if isinstance(one, ImageError) else tell(one) for one in answers]

    @router.get("/info", summary="Which encoder serves, and within which limits", responses=documented())
    async def info() -> Info:
        classes = {name: list(head.classes) for name, head in heads.items()}
        return Info(manifest=manifest, classes=classes[names[0]] if names else [], heads=classes, limits=limits)

    @router.post(
        "/embed", summary="Unit vectors of pictures", openapi_extra=PICTURES_BODY, responses=documented(*PICTURE_PROBLEMS)
    )
    async def embed(request: Request) -> EmbedAnswer:
        found = await results(request, lambda vector: Embedded(embedding=vector.tolist()))
        return EmbedAnswer(encoder_id=manifest.encoder_id, results=found)

    if not names:
        return router

    which = Query(names[0], description="Whose classes.", json_schema_extra={"enum": [*names]})

    @router.post(
        "/classify", summary="Classes of pictures", openapi_extra=PICTURES_BODY, responses=documented(*PICTURE_PROBLEMS)
    )
    async def classify(request: Request, head: str = which) -> ClassifyAnswer:
        if head not in heads:
            raise HTTPException(422, f"head: there is no head {head!r}; there are {', '.join(names)}")
        found = await results(request, partial(_classified, heads[head]))
        return ClassifyAnswer(encoder_id=manifest.encoder_id, results=found)

    return router


def _classified(head: Head, vector: NDArray[np.float32]) -> Classified:
    (probabilities,) = head.probabilities(vector[None])
    return Classified(
        label=head.decide(probabilities),
        probabilities=dict(zip(head.classes, probabilities.tolist(), strict=True)),
    )
