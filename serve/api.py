"""The gateway's HTTP API: embed and classify behind admission control, health, metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse, Response

from serve.classify import Head
from serve.contract import Manifest
from serve.encoder import Encoder
from serve.gateway.admission import Admission
from serve.gateway.batching import Batcher
from serve.gateway.canary import Canary
from serve.gateway.limits import Limits
from serve.gateway.metrics import CountRequests, Metrics
from serve.gateway.problems import add_problem_handlers, documented, problem
from serve.gateway.uploads import PICTURES_BODY, read_pictures
from serve.preprocess import ImageError

_PROBLEMS = documented((400, 408, 409, 413, 415, 422, 429, 500, 503))
_T = TypeVar("_T")


def _example(result: dict[str, Any]) -> ConfigDict:
    unreadable: dict[str, Any] = {"error": "image: not a readable picture (not a picture in a known format)"}
    return {"json_schema_extra": {"examples": [{"encoder_id": "9f86d081884c7d65", "results": [result, unreadable]}]}}


class Embedded(BaseModel):
    """A picture's unit vector (D)."""

    embedding: list[float]


class Classified(BaseModel):
    """A picture's likeliest class, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class Unreadable(BaseModel):
    """Why there is nothing to say of a picture."""

    error: str


class EmbedAnswer(BaseModel):
    """One result per picture, in the order they were sent."""

    model_config = _example({"embedding": [0.6, 0.0, -0.8]})
    encoder_id: str
    results: list[Embedded | Unreadable]


class ClassifyAnswer(BaseModel):
    """One result per picture, in the order they were sent."""

    model_config = _example({"label": "cat", "probabilities": {"cat": 0.9, "dog": 0.1}})
    encoder_id: str
    results: list[Classified | Unreadable]


class Info(BaseModel):
    """What serves here."""

    manifest: Manifest
    classes: list[str]
    """Empty without a head."""
    limits: Limits


def create_api(encoder: Encoder, *, head: Head | None = None, limits: Limits | None = None) -> FastAPI:
    """The gateway in front of one encoder, with /v1/classify if there is a head.

    Raises: EncoderMismatch if the head is another encoder's.
    """
    if head is not None:
        head.require(encoder.encoder_id)
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(encoder, metrics, batches=limits.batches, room=limits.at_once * limits.max_pictures)
    api = FastAPI(title="simclr-serve", version="1", docs_url=None, redoc_url=None)  # its pages would fetch scripts from afar
    add_problem_handlers(api)
    api.include_router(_pictures(batcher, head, limits))
    api.include_router(_operation(Canary(batcher), metrics))
    api.add_middleware(Admission, limits=limits, metrics=metrics)
    api.add_middleware(CountRequests, metrics=metrics)
    return api


def _pictures(batcher: Batcher, head: Head | None, limits: Limits) -> APIRouter:
    """What is asked about pictures; governed by admission control."""
    router = APIRouter(prefix="/v1")
    manifest = batcher.encoder.manifest

    async def results(request: Request, tell: Callable[[NDArray[np.float32]], _T]) -> list[_T | Unreadable]:
        answers = await batcher.embed_each(await read_pictures(request, most=limits.max_pictures))
        if len(answers) == 1 and isinstance(answers[0], ImageError):
            raise answers[0]
        return [Unreadable(error=str(one)) if isinstance(one, ImageError) else tell(one) for one in answers]

    @router.get("/info", summary="Which encoder serves, and within which limits")
    async def info() -> Info:
        return Info(manifest=manifest, classes=list(head.classes) if head else [], limits=limits)

    @router.post("/embed", summary="Unit vectors of pictures", openapi_extra=PICTURES_BODY, responses=_PROBLEMS)
    async def embed(request: Request) -> EmbedAnswer:
        found = await results(request, lambda vector: Embedded(embedding=vector.tolist()))
        return EmbedAnswer(encoder_id=manifest.encoder_id, results=found)

    if head is None:
        return router

    @router.post("/classify", summary="Classes of pictures", openapi_extra=PICTURES_BODY, responses=_PROBLEMS)
    async def classify(request: Request) -> ClassifyAnswer:
        found = await results(request, partial(_classified, head))
        return ClassifyAnswer(encoder_id=manifest.encoder_id, results=found)

    return router


def _classified(head: Head, vector: NDArray[np.float32]) -> Classified:
    (probabilities,) = head.probabilities(vector[None])
    return Classified(
        label=head.classes[int(probabilities.argmax())],
        probabilities=dict(zip(head.classes, probabilities.tolist(), strict=True)),
    )


def _operation(canary: Canary, metrics: Metrics) -> APIRouter:
    """What machines ask that watch over this one."""
    router = APIRouter()

    @router.get("/health/live", summary="The process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get("/health/ready", summary="The encoder answers", response_model=dict[str, str], responses=documented([503]))
    async def ready() -> Response | dict[str, str]:
        fault = await canary.fault()
        return {"status": "ready"} if fault is None else problem(503, fault)

    @router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
    async def page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return router
