"""Saying no to a request before a route has seen it, so that its client sees the answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from serve.gateway.metrics import Metrics
from serve.gateway.problems import problem

DROPPED_BYTES = 2**20
"""A refused body up to this size is read and dropped, and the connection lives on; after a larger one it is closed."""
LINGER_S = 2.0
"""For so long an unread body is still taken off the wire: many clients look for an answer only when they have sent everything,
and would find a closed connection in its place."""


class RefusedError(Exception):
    """A request that gets no answer of a route. `reason` is what the metrics call it; `unread`: its body is still to come."""

    def __init__(
        self, status: int, reason: str, detail: str, *, unread: bool = False, headers: dict[str, str] | None = None
    ) -> None:
        self.status, self.reason, self.detail, self.unread, self.headers = status, reason, detail, unread, headers


def content_length(scope: Scope) -> int | None:
    """Of the body; None if it comes in chunks. The server has refused what is not a number."""
    headers = Headers(scope=scope)
    return None if "transfer-encoding" in headers else int(headers.get("content-length", 0))


async def refuse(refused: RefusedError, metrics: Metrics, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once and in full, then let the client finish sending."""
    metrics.rejections.labels(refused.reason).inc()
    length = content_length(scope)
    response = problem(refused.status, refused.detail, refused.headers)
    headers = list(response.raw_headers)
    if refused.unread and (length is None or length > DROPPED_BYTES):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": refused.unread})
    if refused.unread:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})
