"""One request to one kind of server, made up beforehand; what it answers, as one of six kinds.

The bodies are finished before the load begins, and an answer is not taken apart: per request there is as little to do as the
protocol allows, so that it is the server that is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import aiohttp
import grpc.aio  # type: ignore[import-untyped]

from serve.triton.transport import CHANNEL

_SERVICE = "/inference.GRPCInferenceService/ModelInfer"
_CONNECTIONS = 8
"""Many clients have many connections. One alone was the bottleneck here: 8 clients with 49 KB each got answers in 8 to 12 ms
(p50) over one, in 3 to 8 ms over four."""
_CHANNEL = [*CHANNEL, ("grpc.use_local_subchannel_pool", 1)]  # or else equal channels share one connection
_NO_CONNECTION = re.compile(
    "failed to connect|errors resolving|socket closed|connection reset|goaway|cancelling all calls", re.I
)
"""gRPC says UNAVAILABLE for these too, and nothing but its text tells them from a server that sheds load."""
_REASON_LENGTH = 200


class Kind(IntEnum):
    """What became of a request."""

    ANSWERED = 0
    SHED = 1
    """Turned away by a server that has too much to do, or is not ready: 429, 503, UNAVAILABLE, RESOURCE_EXHAUSTED."""
    TIMEOUT = 2
    NO_CONNECTION = 3
    """Refused, or lost before the answer."""
    BAD_REQUEST = 4
    OTHER = 5


class RequestFailed(Exception):
    """A request that got no vectors; the text is the server's, in one line."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(" ".join(reason.split())[:_REASON_LENGTH])
        self.kind = kind


class Target(Protocol):
    """A server that is sent requests."""

    async def send(self, number: int) -> None:
        """Send the request of this number and read the answer. Raises: RequestFailed."""

    async def aclose(self) -> None:
        """Close its connections."""


class GrpcTarget:
    """Triton's ModelInfer with finished messages. Must be made inside the running event loop."""

    def __init__(self, address: str, messages: Sequence[bytes], timeout_s: float) -> None:
        self._messages = messages
        self._timeout_s = timeout_s
        self._channels = [grpc.aio.insecure_channel(address, options=_CHANNEL) for _ in range(_CONNECTIONS)]
        self._infer = [channel.unary_unary(_SERVICE) for channel in self._channels]

    async def send(self, number: int) -> None:
        """See `Target`."""
        try:
            await self._infer[number % _CONNECTIONS](self._messages[number % len(self._messages)], timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
            raise RequestFailed(_grpc_kind(error.code(), reason), reason) from error

    async def aclose(self) -> None:
        """See `Target`."""
        for channel in self._channels:
            await channel.close()


class HttpTarget:
    """POSTs finished bodies, each with its headers, over as many connections as are needed."""

    def __init__(self, url: str, bodies: Sequence[tuple[bytes, dict[str, str]]], timeout_s: float) -> None:
        self._url = url
        self._bodies = bodies
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=timeout_s)
        )

    async def send(self, number: int) -> None:
        """See `Target`."""
        body, headers = self._bodies[number % len(self._bodies)]
        try:
            async with self._session.post(self._url, data=body, headers=headers) as response:
                answer = await response.read()
        except TimeoutError as error:
            raise RequestFailed(Kind.TIMEOUT, "no answer in time") from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise RequestFailed(Kind.NO_CONNECTION, str(error) or type(error).__name__) from error
        except aiohttp.ClientError as error:
            raise RequestFailed(Kind.OTHER, str(error) or type(error).__name__) from error
        if response.status != 200:
            raise RequestFailed(_http_kind(response.status), f"{response.status} {answer.decode(errors='replace')}")

    async def aclose(self) -> None:
        """See `Target`."""
        await self._session.close()


def _grpc_kind(code: grpc.StatusCode, reason: str) -> Kind:
    if code is grpc.StatusCode.UNAVAILABLE:
        return Kind.NO_CONNECTION if _NO_CONNECTION.search(reason) else Kind.SHED
    kinds = {
        grpc.StatusCode.RESOURCE_EXHAUSTED: Kind.SHED,
        grpc.StatusCode.DEADLINE_EXCEEDED: Kind.TIMEOUT,
        grpc.StatusCode.INVALID_ARGUMENT: Kind.BAD_REQUEST,
        grpc.StatusCode.NOT_FOUND: Kind.BAD_REQUEST,
    }
    return kinds.get(code, Kind.OTHER)


def _http_kind(status: int) -> Kind:
    if status in (429, 503):
        return Kind.SHED
    if status in (408, 504):
        return Kind.TIMEOUT
    return Kind.BAD_REQUEST if 400 <= status < 500 else Kind.OTHER
