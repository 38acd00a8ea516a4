"""The gateway's HTTP API: pictures, search, re-ID and a gallery's items behind keys and admission control; health and metrics.

The routes of each subject are in serve/gateway/; before them a request passes, in this order, the count of all requests, the
guard (keys, rate) and admission.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from serve.classify import Head
from serve.encoder import Encoder
from serve.errors import EncoderMismatch
from serve.gallery import Gallery
from serve.gateway.admission import Admission
from serve.gateway.batching import Batcher
from serve.gateway.canary import Canary
from serve.gateway.guard import Guard
from serve.gateway.items import item_routes
from serve.gateway.keys import Keyring
from serve.gateway.limits import Limits
from serve.gateway.metrics import CountRequests, Metrics
from serve.gateway.operation import health_routes, metrics_route
from serve.gateway.pictures import picture_routes
from serve.gateway.problems import add_problem_handlers
from serve.gateway.recall import RecallCanary
from serve.gateway.reid import reid_routes
from serve.gateway.search import search_routes
from serve.gateway.shelf import Shelf
from serve.gateway.urls import Fetcher
from serve.identity.calibration import Calibration

_KEY = HTTPBearer(scheme_name="key", description="`Authorization: Bearer KEY`; see `simclr key`", auto_error=False)
"""Says in OpenAPI what the guard asks for."""


def create_api(
    encoder: Encoder,
    *,
    heads: Mapping[str, Head] | None = None,
    gallery: Gallery | None = None,
    keys: Keyring | None = None,
    url_hosts: Iterable[str] = (),
    limits: Limits | None = None,
    calibration: Calibration | None = None,
) -> FastAPI:
    """The gateway in front of one encoder, with /v1/classify if there are heads; search, re-ID and items if there is a gallery.

    Without `keys` everybody may do everything. `url_hosts`: whom a search by URL may ask. Without a `calibration` re-ID ranks
    and decides nothing. Raises: EncoderMismatch if a head, the gallery or the calibration is another encoder's.
    """
    for head in (heads or {}).values():
        head.require(encoder.encoder_id)
    if calibration is not None:
        calibration.require(encoder.encoder_id)
    limits, metrics = limits or Limits(), Metrics()
    batcher = Batcher(encoder, metrics, batches=limits.batches, room=limits.at_once * limits.max_pictures)
    routers = [picture_routes(batcher, heads or {}, limits), metrics_route(metrics)]
    if gallery is not None:
        _require(gallery, encoder)
        shelf, fetcher = Shelf(gallery, metrics), Fetcher(url_hosts, limits)
        routers += [search_routes(shelf, batcher, fetcher, metrics), item_routes(shelf, batcher)]
        routers += [reid_routes(shelf, batcher, fetcher, limits, metrics, calibration)]
    api = _empty_api(None if gallery is None else RecallCanary(gallery, metrics))
    api.include_router(health_routes(Canary(batcher)))
    for router in routers:
        api.include_router(router, dependencies=[] if keys is None else [Security(_KEY)])
    api.add_middleware(Admission, limits=limits, metrics=metrics)
    api.add_middleware(Guard, keys=keys, limits=limits, metrics=metrics)
    api.add_middleware(CountRequests, metrics=metrics)
    return api


def _empty_api(recall: RecallCanary | None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with nullcontext() if recall is None else recall.flying():
            yield

    api = FastAPI(
        title="simclr-serve",
        version="1",
        docs_url=None,  # these pages would fetch scripts from afar
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    add_problem_handlers(api)
    return api


def _operation_id(route: APIRoute) -> str:
    """The name of its function: what clients that are made from OpenAPI call it."""
    return route.name


def _require(gallery: Gallery, encoder: Encoder) -> None:
    made_by = gallery.info().encoder_id
    if made_by != encoder.encoder_id:
        raise EncoderMismatch(f"the gallery was made by encoder {made_by}, this one is {encoder.encoder_id}; serve that one")
