"""An ASGI app on a port until Ctrl-C or SIGTERM; requests that are under way are answered first."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from serve.errors import SimclrError
from serve.ports import HOST
from serve.signals import stopped_by_sigterm

DRAIN_S = 30
"""After SIGTERM nobody new comes in; whoever is not answered within this time is given up."""
KEEP_ALIVE_S = 75
"""Longer than load balancers keep a connection (60 s): who closes it must be the one who sends the next request."""


def serve_api(api: FastAPI, *, host: str = HOST, port: int = 7861) -> None:
    """Serve; port 0 takes a free one. Raises: SimclrError if the port is busy."""
    config = uvicorn.Config(
        api,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    for strangers in ("python_multipart", "uvicorn.error"):  # who sends broken requests must not fill our log
        logging.getLogger(strangers).setLevel(logging.ERROR)
    with suppress(KeyboardInterrupt), stopped_by_sigterm(), _listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        print(f"the API is at http://{address}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise SimclrError(f"port {port} is busy or not allowed on {host} ({reason}); use --port") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it; without it answers take 40 ms
    return listener
