"""Admission control: what the encoder cannot take is turned away on its headers, before its body is read.

A request holds a place from its headers to the end of its answer. There are `at_once + waiting` places, and whoever finds
none is refused at once, so no more bodies than that are in memory. A holder reads its body, stands in line (first come, first
served) and goes inside, where `at_once` are together: nobody who is accepted has more than the other holders before them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.limits import Limits
from serve.gateway.metrics import Metrics
from serve.gateway.refusal import RefusedError, content_length, refuse

FREE = "/v1/info"


class Admission:
    """ASGI middleware. Only requests that bring work are governed, so health and metrics answer under any load."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._held = 0
        self._inside = asyncio.Semaphore(limits.at_once)
        metrics.held.set_function(lambda: self._held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/") or scope["path"] == FREE:
            await self._app(scope, receive, send)
            return
        try:
            await self._admit(content_length(scope), scope, receive, send)
        except RefusedError as refused:
            await refuse(refused, self._metrics, scope, receive, send)
        except _ClientLeftError:
            pass

    async def _admit(self, length: int | None, scope: Scope, receive: Receive, send: Send) -> None:
        if length is not None and length > self._limits.max_bytes:
            raise self._too_large()
        if self._held == self._limits.at_once + self._limits.waiting:
            raise RefusedError(429, "full", f"{self._held} requests are here already; come back in a moment", unread=True)
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
            raise RefusedError(408, "slow upload", slow, unread=True) from None
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
                raise RefusedError(429, "waited", f"no turn came within {self._limits.wait_s:g} s; come back in a moment")
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
                stuck = "is the encoder or the gallery stuck? A write may still be done"
                late = f"no answer within {self._limits.answer_s:g} s; {stuck}"
                raise RefusedError(503, "no answer", late) from None

    def _too_large(self) -> RefusedError:
        most = f"at most {self._limits.max_bytes:,} bytes are accepted; send fewer pictures or smaller ones"
        return RefusedError(413, "too large", most, unread=True)


class _ClientLeftError(Exception):
    """Nobody is there to be answered."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the route receives: the body in one piece, then whatever the server has to say."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def next_message() -> Message:
        return next(messages, None) or await receive()

    return next_message
