"""Admission control: what the encoder cannot take is turned away on its headers, before its body is read.

A request holds a place from its headers to the end of its answer. There are `at_once + waiting` places, and whoever finds
none is refused at once, so no more bodies than that are in memory. A holder reads its body, stands in line (first come, first
served) and goes inside, where `at_once` are together: nobody who is accepted has more than the other holders before them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.limits import Limits
from serve.gateway.metrics import Metrics
from serve.gateway.problems import problem

DROPPED_BYTES = 2**20
"""A refused body up to this size is read and dropped, and the connection lives on; after a larger one it is closed."""
LINGER_S = 2.0
"""For so long an unread body is still taken off the wire: many clients look for an answer only when they have sent everything,
and would find a closed connection in its place."""


class Admission:
    """ASGI middleware. Only requests that bring work are governed: GET is free, so health and metrics answer under any load."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._held = 0
        self._inside = asyncio.Semaphore(limits.at_once)
        metrics.held.set_function(lambda: self._held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] == "GET" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        length = _content_length(scope)
        try:
            await self._admit(length, scope, receive, send)
        except _RefusedError as refused:
            self._metrics.rejections.labels(refused.reason).inc()
            await _refuse(refused, length, receive, send)
        except _ClientLeftError:
            pass

    async def _admit(self, length: int | None, scope: Scope, receive: Receive, send: Send) -> None:
        if length is not None and length > self._limits.max_bytes:
            raise self._too_large()
        if self._held == self._limits.at_once + self._limits.waiting:
            raise _RefusedError(429, "full", f"{self._held} requests are here already; come back in a moment", unread=True)
        self._held += 1
        try:
            body = await self._body(receive)
            async with self._turn(receive):
                await self._answer(scope, _replay(body, receive), send)
        finally:
            self._held -= 1

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        message: Message = {"more_body": True}
        try:
            async with asyncio.timeout(self._limits.upload_s):
                while message.get("more_body", False):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeftError
                    body += message.get("body", b"")
                    if len(body) > self._limits.max_bytes:
                        raise self._too_large()
        except TimeoutError:
            slow = f"the body did not arrive within {self._limits.upload_s:g} s; send fewer pictures or smaller ones"
            raise _RefusedError(408, "slow upload", slow, unread=True) from None
        return bytes(body)

    @asynccontextmanager
    async def _turn(self, receive: Receive) -> AsyncIterator[None]:
        """Stand in line, then be inside. A client that leaves meanwhile leaves the line."""
        turn = asyncio.create_task(self._inside.acquire())
        left = asyncio.ensure_future(receive())  # after the body nothing comes but the client's leaving
        try:
            with self._metrics.line_s.time():
                await asyncio.wait((turn, left), timeout=self._limits.wait_s, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                raise _ClientLeftError
            if not turn.done():
                raise _RefusedError(429, "waited", f"no turn came within {self._limits.wait_s:g} s; come back in a moment")
            left.cancel()
            with self._metrics.inside.track_inprogress():
                yield
        finally:
            left.cancel()
            if not turn.cancel():  # too late to cancel: it had its turn
                self._inside.release()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._limits.answer_s):
                await self._app(scope, receive, noting)
        except TimeoutError:
            if not started:  # else the client does not read it, and the server hangs up
                late = f"no answer within {self._limits.answer_s:g} s; is the encoder stuck?"
                raise _RefusedError(503, "no answer", late) from None

    def _too_large(self) -> _RefusedError:
        most = f"at most {self._limits.max_bytes:,} bytes are accepted; send fewer pictures or smaller ones"
        return _RefusedError(413, "too large", most, unread=True)


class _RefusedError(Exception):
    """A request that gets no answer of a route."""

    def __init__(self, status: int, reason: str, detail: str, *, unread: bool = False) -> None:
        self.status, self.reason, self.detail, self.unread = status, reason, detail, unread


class _ClientLeftError(Exception):
    """Nobody is there to be answered."""


def _content_length(scope: Scope) -> int | None:
    """None: the body comes in chunks. The server has refused what is not a number."""
    text = Headers(scope=scope).get("content-length")
    return int(text) if text is not None else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the route receives: the body in one piece, then whatever the server has to say."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def next_message() -> Message:
        return next(messages, None) or await receive()

    return next_message


async def _refuse(refused: _RefusedError, length: int | None, receive: Receive, send: Send) -> None:
    """Answer at once and in full, then let the client finish sending, so that it sees the answer."""
    response = problem(refused.status, refused.detail)
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
