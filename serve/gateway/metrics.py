"""What the gateway counts, for Prometheus."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STAGES = ("line", "decode", "queue", "infer", "search")
"""In line for admission; decoding; waiting for the encoder to come free; in the encoder; in the gallery's index."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PICTURES = (1, 2, 4, 8, 16, 32)
CLIENT_LEFT = 499
"""Status of a request whose client went before it was answered; nginx's number."""


class Metrics:
    """Those of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("simclr_requests", "Requests by route and status.", ["route", "status"], registry=self.registry)
        self.rejections = Counter("simclr_rejections", "Requests refused before a route.", ["reason"], registry=self.registry)
        self.held = Gauge("simclr_requests_held", "Requests inside, in line or sending their body.", registry=self.registry)
        self.inside = Gauge("simclr_requests_in_flight", "Requests inside.", registry=self.registry)
        self.pictures = Counter("simclr_pictures", "Pictures by outcome.", ["outcome"], registry=self.registry)
        self.queued = Gauge("simclr_pictures_queued", "Decoded, and not yet sent to the encoder.", registry=self.registry)
        self.batches = Histogram("simclr_batch_pictures", "Pictures a batch.", buckets=_PICTURES, registry=self.registry)
        stage = Histogram("simclr_stage_seconds", "Seconds by stage.", ["stage"], buckets=_SECONDS, registry=self.registry)
        self.line_s, self.decode_s, self.queue_s, self.infer_s, self.search_s = (stage.labels(name) for name in STAGES)
        self.gallery_items = Gauge("simclr_gallery_items", "Items of the gallery.", registry=self.registry)
        self.recall = Gauge(
            "simclr_recall_at_10",
            "Share of the 10 nearest that the index finds, lately.",
            registry=self.registry,
        )
        self.recall.set(math.nan)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware around all others: every request, also one that is refused, under its route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")  # never the path as it came: strangers would fill the memory
            self._metrics.requests.labels(route, status).inc()
