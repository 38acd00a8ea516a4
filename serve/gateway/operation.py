"""Routes that machines ask which watch over this one."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from serve.gateway.canary import Canary
from serve.gateway.metrics import Metrics
from serve.gateway.problems import documented, problem, problems


def health_routes(canary: Canary) -> APIRouter:
    """/health/live and /health/ready, for which nobody needs a key."""
    router = APIRouter(prefix="/health", tags=["operation"])

    @router.get("/live", summary="The process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @router.get("/ready", summary="The encoder answers", response_model=dict[str, str], responses=problems(503))
    async def ready() -> Response | dict[str, str]:
        fault = await canary.fault()
        return {"status": "ready"} if fault is None else problem(503, fault)

    return router


def metrics_route(metrics: Metrics) -> APIRouter:
    """/metrics."""
    router = APIRouter(tags=["operation"])

    @router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, responses=documented())
    async def metrics_page() -> Response:
        return Response(await asyncio.to_thread(metrics.page), media_type=CONTENT_TYPE_LATEST)

    return router
