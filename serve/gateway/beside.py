"""The API on the port of another app, such as the web page: its paths go to it, all others to that app."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.gateway.guard import FREE

_OURS = (*FREE, "/metrics")


class ApiFirst:
    """ASGI middleware. It stands before the API's own, so that what is the other app's is neither counted nor limited."""

    def __init__(self, app: ASGIApp, api: ASGIApp) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        ours = scope["type"] == "http" and (scope["path"].startswith("/v1/") or scope["path"] in _OURS)
        await (self._api if ours else self._app)(scope, receive, send)
