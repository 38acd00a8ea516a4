"""Keeps a Triton server answering: a canary goes the whole way through every encoder, and who does not answer is restarted.

The server's own health says nothing of its Python stubs: with a dead one /v2/health/ready stays 200 and every request fails.
"""

from __future__ import annotations

import io
import sys
import time
from contextlib import suppress
from datetime import datetime

from PIL import Image

from serve.errors import SimclrError, TritonStartError
from serve.ports import HOST
from serve.signals import stopped_by_sigterm
from serve.triton.client import TritonEncoder
from serve.triton_server import TritonServer

PERIOD_S = 5.0
CANARY_TIMEOUT_S = 30.0
"""A busy server is slow and not dead: whoever waits longer than this is not served by it either."""
FAILURES = 2
"""So many canaries must die in a row."""
RESTARTS, WINDOW_S = 5, 600.0
"""More restarts than this in ten minutes will not help."""


def serve(server: TritonServer) -> None:
    """`simclr triton`: run, supervised, until Ctrl-C or SIGTERM. Raises: TritonStartError."""
    with suppress(KeyboardInterrupt), stopped_by_sigterm(), server:
        print(f"Triton serves {server.repository} on {server.url} and {server.http_url}; Ctrl-C stops it", flush=True)
        if server.host != HOST:
            print(f"open to all who reach {server.host}: inference and metrics need no password", file=sys.stderr, flush=True)
        supervise(server)


def supervise(server: TritonServer, *, period_s: float = PERIOD_S) -> None:
    """Restart a started server whenever it ends or its canaries die; one line on stderr for each.

    Runs until interrupted. Raises: TritonStartError after too many restarts.
    """
    restarts: list[float] = []
    not_started: str | None = None
    while True:
        reason = not_started or _until_it_fails(server, period_s)
        now = time.monotonic()
        restarts = [when for when in restarts if now - when < WINDOW_S] + [now]
        if len(restarts) > RESTARTS:
            raise TritonStartError(f"Triton failed {len(restarts)} times in {WINDOW_S / 60:g} minutes, at last: {reason}")
        print(f"{datetime.now():%H:%M:%S} Triton is restarted: {reason}", file=sys.stderr, flush=True)
        server.stop(drain=False)  # whoever is still waiting waits for the dead
        try:
            server.start()
        except TritonStartError as error:
            not_started = str(error)
            continue
        not_started = None
        print(f"{datetime.now():%H:%M:%S} Triton is ready again", file=sys.stderr, flush=True)


def _until_it_fails(server: TritonServer, period_s: float) -> str:
    """Why the server must be restarted."""
    names = [folder.name.removesuffix("_encoder") for folder in server.repository.glob("*_encoder")]
    failures = 0
    while failures < FAILURES:
        if (ended := server.ended_within(period_s)) is not None:
            return ended
        dead = [reason for name in names if (reason := canary_fault(server, name)) is not None]
        failures = failures + 1 if dead else 0
    return dead[0]


def canary_fault(server: TritonServer, name: str) -> str | None:
    """Send one small picture through preprocess and encoder; None if its vector comes back, else what went wrong."""
    try:
        TritonEncoder(f"{server.url}/{name}", timeout_s=CANARY_TIMEOUT_S).embed_bytes([_picture()])
    except SimclrError as error:
        return str(error)
    return None


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, "PNG")
    return buffer.getvalue()
