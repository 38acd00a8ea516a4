"""Pictures by their URL, from hosts that were named beforehand and from no other: a stranger must not look through our eyes.

A host's name is resolved once, the addresses are looked at, and those very ones are connected to. Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from starlette.exceptions import HTTPException
from yarl import URL

from serve.gateway.limits import Limits

_CARRIERS = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::ffff:0:0/96")]
"""IPv6 addresses that lead to an IPv4 address, which may be one of ours."""
_CHUNK_BYTES = 1 << 16


class _ForbiddenError(OSError):
    """The name leads to an address that is not public."""


class PublicResolver(AbstractResolver):
    """The system's, but for addresses that are not public. aiohttp asks none for a URL that has an address as its host."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Addresses of `host`. Raises: OSError if it has none, or one that is not public."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        addresses = [(str(place[0]), kind) for kind, _, _, _, place in found]
        if not all(is_public(address) for address, _ in addresses):
            raise _ForbiddenError(f"{host} leads to an address that is not public")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for address, kind in addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


class Fetcher:
    """Fetches from `hosts`, each a name or an address, on the usual port unless one is named. An address may be private."""

    def __init__(self, hosts: Iterable[str], limits: Limits) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._limits = limits

    async def fetch(self, text: str) -> bytes:
        """The encoded picture. Raises: HTTPException 403 for what is not allowed, 422 too large, 502 if the host fails."""
        url = self._allowed(text)
        try:
            async with asyncio.timeout(self._limits.fetch_s), self._session() as session:
                return await self._get(session, url)
        except TimeoutError as error:
            raise HTTPException(502, f"url: {url.host} did not answer within {self._limits.fetch_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(getattr(error, "os_error", error), _ForbiddenError):
                raise HTTPException(403, f"url: {url.host} leads to an address that is not public; list the address") from error
            raise HTTPException(502, f"url: {url.host} could not be asked ({type(error).__name__})") from error

    def _allowed(self, text: str) -> URL:
        try:
            url = URL(text)
            host, port = (url.host_subcomponent or "").lower(), url.port
        except ValueError as error:
            raise HTTPException(422, "url: not a URL; wanted https://host/path") from error
        if url.scheme not in ("http", "https") or not host or url.user is not None or url.password is not None:
            raise HTTPException(422, "url: wanted https://host/path or http://host/path, without a user name")
        if f"{host}:{port}" not in self._hosts and not (url.is_default_port() and host in self._hosts):
            named = (host if url.is_default_port() else f"{host}:{port}")[:300]
            raise HTTPException(403, f"url: this server may not ask {named}; who runs it can allow that: --url-hosts {named}")
        return url

    def _session(self) -> aiohttp.ClientSession:
        """One for each picture: nothing is shared between those who ask."""
        connector = aiohttp.TCPConnector(resolver=PublicResolver(), use_dns_cache=False, limit=1)
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "simclr-serve"}
        return aiohttp.ClientSession(
            connector=connector, headers=headers, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        )

    async def _get(self, session: aiohttp.ClientSession, url: URL) -> bytes:
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status != 200:
                hint = "; redirects are not followed, give the address it leads to" if 300 <= answer.status < 400 else ""
                raise HTTPException(502, f"url: {url.host} answered {answer.status}, wanted 200{hint}")
            picture = bytearray()
            async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                picture += chunk
                if len(picture) > self._limits.max_bytes:
                    raise HTTPException(422, f"url: the picture has more than {self._limits.max_bytes:,} bytes")
            return bytes(picture)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, and leads to no other."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _CARRIERS)
