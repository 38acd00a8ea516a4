"""HTTP to one server over connections that are kept, each request with a deadline for the whole of it.

tritonclient's own (gevent) bounds every single read, so that a server which drips is waited for without end, and leaves four
file descriptors and a thread behind for every thread that has used it.
"""

from __future__ import annotations

import io
import socket
import time
from collections import deque
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import NamedTuple, cast


class Answer(NamedTuple):
    """What the server said."""

    status: int
    headers: HTTPMessage
    body: bytes


class KeepAlive:
    """May be used from many threads at once; each request has a connection of its own while it lasts."""

    def __init__(self, address: str) -> None:
        """Args: address, `host:port` or `[v6]:port`."""
        self._address = address
        self._idle: deque[socket.socket] = deque()

    def ask(self, method: str, path: str, ends: float, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """Args: ends, on time.monotonic's clock. Raises: TimeoutError, OSError, http.client.HTTPException."""
        connection = self._connection(ends)
        try:
            connection.settimeout(_left_s(ends))
            connection.sendall(self._head(method, path, {"Content-Length": str(len(body)), **(headers or {})}))
            connection.sendall(body)
            arriving = cast("socket.socket", _Arriving(connection, ends))  # of a socket, HTTPResponse calls makefile alone
            response = HTTPResponse(arriving, method=method)
            response.begin()
            if response.length is None and not response.chunked:
                raise HTTPException("the answer has no length: it may have been cut short")
            answer = Answer(response.status, response.headers, response.read())
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return answer

    def _head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._address}", *(f"{key}: {value}" for key, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def _connection(self, ends: float) -> socket.socket:
        while self._idle:
            try:
                kept = self._idle.pop()  # the last one used: the others may rest long enough to be closed by the server
            except IndexError:  # another thread was quicker
                break
            if _is_open(kept):
                return kept
            kept.close()
        host, _, port = self._address.rpartition(":")
        made = socket.create_connection((host.strip("[]"), int(port)), _left_s(ends))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made


class _Arriving(io.RawIOBase):
    """What comes in on a socket, until an instant."""

    def __init__(self, connection: socket.socket, ends: float) -> None:
        self._connection = connection
        self._ends = ends

    def makefile(self, _mode: str) -> io.BufferedReader:
        """As a socket's."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        self._connection.settimeout(_left_s(self._ends))
        return self._connection.recv_into(buffer)


def _left_s(ends: float) -> float:
    left_s = ends - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s


def _is_open(connection: socket.socket) -> bool:
    """Nothing is to be read between two requests; if there is, it is the end, or words that nobody asked for."""
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
