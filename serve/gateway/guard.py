"""Who may come in, and how often: decided on a request's headers, before its body is read or anything is done for it."""

from __future__ import annotations

import math
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from serve.errors import ContractError
from serve.gateway.keys import Key, Keyring, Scope
from serve.gateway.limits import Limits
from serve.gateway.metrics import Metrics
from serve.gateway.rates import Rates
from serve.gateway.refusal import RefusedError, content_length, refuse
from serve.ports import is_loopback

FREE = ("/health/live", "/health/ready", "/openapi.json")
ASKING = ("/v1/embed", "/v1/classify", "/v1/search", "/v1/search/image", "/v1/reid/identify", "/v1/reid/identify/image")
"""POST, because they bring a picture or a vector; they change nothing."""
_NO_NAME = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]+)?", re.IGNORECASE)
"""A Host that no stranger's DNS can make lead here."""


def needed_scope(method: str, path: str) -> Scope | None:
    """What a key must allow for this; None: no key is needed. A path that nobody thought of needs one."""
    if path in FREE:
        return None
    if path == "/metrics":
        return "admin"
    return "read" if method in ("GET", "HEAD", "OPTIONS") or path in ASKING else "write"


class Guard:
    """ASGI middleware. Without keys everybody is let in, but for what another site's page makes a browser send.

    Such a page has an Origin of its own; or its name leads here by now, so that its browser takes us for its site.
    """

    def __init__(self, app: ASGIApp, keys: Keyring | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics
        self._rates, self._rate = Rates(limits.rate_per_s, limits.burst), f"{limits.rate_per_s:g} requests/s"

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """ASGI."""
        needed = needed_scope(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if needed is not None:
            try:
                self._limit_rate(self._caller(scope, needed))
            except RefusedError as refused:
                refused.unread = content_length(scope) != 0
                await refuse(refused, self._metrics, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, scope: AsgiScope, needed: Scope) -> str:
        headers = Headers(scope=scope)
        if self._keys is not None:
            return f"key {_checked(self._keys, headers, needed).name}"
        origin, host = headers.get("origin"), headers.get("host", "")
        if is_loopback((scope.get("server") or ("", 0))[0]) and not _NO_NAME.fullmatch(host):
            told = "without keys it answers to localhost or an address; serve with --keys FILE"
            raise RefusedError(403, "host", f"this server was asked by the name {host[:100]!r}; {told}")
        if origin is not None and origin.partition("://")[2] != host:
            told = "pages of other sites are not let in where there are no keys; serve with --keys FILE"
            raise RefusedError(403, "cross-site", f"the request comes from a page of {origin[:100]}; {told}")
        return f"address {(scope.get('client') or ('unknown', 0))[0]}"

    def _limit_rate(self, caller: str) -> None:
        wait_s = self._rates.wait_s(caller)
        if wait_s:
            retry = {"Retry-After": str(math.ceil(wait_s))}
            raise RefusedError(429, "rate", f"more than {self._rate} came from this {caller}; come back later", headers=retry)


def _checked(keys: Keyring, headers: Headers, needed: Scope) -> Key:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise _unauthorized("no key was given; send `Authorization: Bearer KEY`", "")
    try:
        key = keys.find(secret.strip())
    except ContractError as error:  # it names the file, which is no business of a stranger
        raise RefusedError(503, "keys", "the keys cannot be read at the moment; the server's log says why") from error
    if key is None:
        raise _unauthorized("this key is not known here; was it taken back?", ', error="invalid_token"')
    if not key.allows(needed):
        header = {"WWW-Authenticate": f'Bearer realm="simclr", error="insufficient_scope", scope="{needed}"'}
        raise RefusedError(403, "scope", f"key {key.name} has scope {key.scope}, wanted {needed}", headers=header)
    return key


def _unauthorized(detail: str, error: str) -> RefusedError:
    return RefusedError(401, "key", detail, headers={"WWW-Authenticate": f'Bearer realm="simclr"{error}'})
