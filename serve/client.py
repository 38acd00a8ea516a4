"""A thin client of the HTTP API (docs/gateway.md): `Client`, and for asyncio `AsyncClient` with the same methods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import httpx

from serve.http_client.calls import Calls, Request, Steps

TIMEOUT_S = 30.0
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _blocking(call: Callable[Concatenate[Calls, _P], Steps[_T]]) -> Callable[Concatenate[Client, _P], _T]:
    @wraps(call)
    def method(self: Client, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._result(call(self._calls, *args, **kwargs))

    return method


def _awaited(
    call: Callable[Concatenate[Calls, _P], Steps[_T]],
) -> Callable[Concatenate[AsyncClient, _P], Coroutine[Any, Any, _T]]:
    @wraps(call)
    async def method(self: AsyncClient, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._result(call(self._calls, *args, **kwargs))

    return method


class Client:
    """Asks one gateway, over connections that are kept; a context manager. Safe from several threads."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """Args: timeout_s, for each request, its repetitions after 429 and 503 included; then EncoderUnavailable."""
        self._calls = Calls(url, timeout_s)
        self._http = httpx.Client(base_url=url, headers=_headers(key))

    embed = _blocking(Calls.embed)
    embed_each = _blocking(Calls.embed_each)
    classify = _blocking(Calls.classify)
    search = _blocking(Calls.search)
    identify = _blocking(Calls.identify)
    items = _blocking(Calls.items)
    item = _blocking(Calls.item)
    vector = _blocking(Calls.vector)
    add = _blocking(Calls.add)
    relabel = _blocking(Calls.relabel)
    replace = _blocking(Calls.replace)
    remove = _blocking(Calls.remove)
    info = _blocking(Calls.info)
    ready = _blocking(Calls.ready)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _result(self, steps: Steps[_T]) -> _T:
        try:
            request = next(steps)
            while True:
                request = steps.send(self._answer(request))
        except StopIteration as done:
            return cast("_T", done.value)

    def _answer(self, request: Request) -> httpx.Response | httpx.RequestError:
        time.sleep(request.after_s)
        try:
            return self._http.request(request.method, request.path, timeout=request.timeout_s, **request.options)
        except httpx.RequestError as error:
            return error


class AsyncClient:
    """`Client` for the tasks of one event loop; use it with `async with`, or `close` it."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """Args: as `Client`."""
        self._calls = Calls(url, timeout_s)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key))

    embed = _awaited(Calls.embed)
    embed_each = _awaited(Calls.embed_each)
    classify = _awaited(Calls.classify)
    search = _awaited(Calls.search)
    identify = _awaited(Calls.identify)
    items = _awaited(Calls.items)
    item = _awaited(Calls.item)
    vector = _awaited(Calls.vector)
    add = _awaited(Calls.add)
    relabel = _awaited(Calls.relabel)
    replace = _awaited(Calls.replace)
    remove = _awaited(Calls.remove)
    info = _awaited(Calls.info)
    ready = _awaited(Calls.ready)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _result(self, steps: Steps[_T]) -> _T:
        try:
            request = next(steps)
            while True:
                request = steps.send(await self._answer(request))
        except StopIteration as done:
            return cast("_T", done.value)

    async def _answer(self, request: Request) -> httpx.Response | httpx.RequestError:
        await asyncio.sleep(request.after_s)
        try:
            return await self._http.request(request.method, request.path, timeout=request.timeout_s, **request.options)
        except httpx.RequestError as error:
            return error


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
