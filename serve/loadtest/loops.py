"""Load on a server: who sends when, and when each request was meant to be sent, was sent and was answered.

Closed loop: each client asks again when it has its answer, so a server that stalls is asked less, and few requests tell of it
(coordinated omission). Open loop: requests come at random moments whatever the server does, and latency counts from the moment
that a request was meant for, so a stall is in the figures of everybody who came meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import select
import selectors
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.loadtest.targets import Kind, RequestFailed

PAUSE_S = 0.05
"""A client that finds nobody at the address waits so long, rather than ask ten thousand times a second."""
BEHIND_S = 1.0
"""An open loop that is still sending so long after its end is given up: the generator cannot keep up."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Every request. Times are seconds since the measurement began; what was meant for before 0 is the warm-up."""

    intended_s: NDArray[np.float64]
    sent_s: NDArray[np.float64]
    done_s: NDArray[np.float64]
    kind: NDArray[np.uint8]
    """See `Kind`."""
    reasons: dict[Kind, str]
    """The first of each kind of failure, in the server's words."""
    seconds: float
    """Length of the measurement: shorter than asked if it was stopped."""
    unsent: int = 0
    """Requests of an open loop that the generator never came to."""
    stopped: bool = False
    """Ended early by Ctrl-C."""


class Load:
    """One test under way; cancelling it (Ctrl-C) ends the sending, and what is under way is still waited for."""

    def __init__(self, send: Callable[[int], Awaitable[None]], *, seconds: float, warmup_s: float) -> None:
        self._send = send
        self._seconds = seconds
        self._zero = time.perf_counter() + warmup_s
        self._rows: list[tuple[float, float, float, int]] = []
        self._reasons: dict[Kind, str] = {}
        self.failed = 0
        self._unsent = 0
        self._stopped_s: float | None = None

    def now(self) -> float:
        """Seconds since the measurement began; negative while it warms up."""
        return time.perf_counter() - self._zero

    @property
    def sending(self) -> bool:
        """Whether requests are still being sent."""
        return self._stopped_s is None and self.now() < self._seconds

    @property
    def done(self) -> int:
        """Requests that were answered or failed."""
        return len(self._rows)

    async def closed(self, clients: int) -> None:
        """Each of so many clients asks again when it has its answer."""
        everyone = asyncio.gather(*(self._client(number, clients) for number in range(clients)))
        try:
            await asyncio.shield(everyone)
        except asyncio.CancelledError:
            self._stop()
            await everyone

    async def open(self, arrivals_s: Sequence[float]) -> None:
        """Send at these moments (ascending), answered or not."""
        under_way: set[asyncio.Task[Kind]] = set()
        try:
            for number, intended_s in enumerate(arrivals_s):
                await asyncio.sleep(max(0.0, intended_s - self.now()))
                if self.now() > self._seconds + BEHIND_S:
                    self._unsent = len(arrivals_s) - number
                    break
                task = asyncio.create_task(self._request(number, intended_s))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.shield(asyncio.gather(*under_way))
        except asyncio.CancelledError:
            self._stop()
            await asyncio.gather(*under_way)

    def samples(self) -> Samples:
        """What was measured."""
        columns = np.array(self._rows, np.float64).reshape(-1, 4).T
        return Samples(
            intended_s=columns[0],
            sent_s=columns[1],
            done_s=columns[2],
            kind=columns[3].astype(np.uint8),
            reasons=self._reasons,
            seconds=self._seconds if self._stopped_s is None else self._stopped_s,
            unsent=self._unsent,
            stopped=self._stopped_s is not None,
        )

    def _stop(self) -> None:
        if self.sending:
            self._stopped_s = self.now()

    async def _client(self, number: int, clients: int) -> None:
        for turn in itertools.count(number, clients):
            if not self.sending:
                return
            if await self._request(turn) is Kind.NO_CONNECTION:
                await asyncio.sleep(PAUSE_S)

    async def _request(self, number: int, intended_s: float | None = None) -> Kind:
        sent_s = self.now()
        kind = Kind.ANSWERED
        try:
            await self._send(number)
        except RequestFailed as failure:
            kind = failure.kind
            self.failed += 1
            self._reasons.setdefault(kind, str(failure))
        self._rows.append((sent_s if intended_s is None else intended_s, sent_s, self.now(), kind))
        return kind


def poisson_arrivals(rate: float, start_s: float, end_s: float, seed: int) -> NDArray[np.float64]:
    """Moments of a Poisson process of `rate` per second: given their number, they are independent and uniform."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(start_s, end_s, rng.poisson(rate * (end_s - start_s))))


class _FineSelector(selectors.DefaultSelector):
    """epoll waits for whole milliseconds, rounded up, which would be part of every latency; select is exact."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def event_loop() -> asyncio.AbstractEventLoop:
    """An event loop that wakes within 0.1 ms of the moment it should, where the system is Linux."""
    return asyncio.SelectorEventLoop(_FineSelector()) if sys.platform == "linux" else asyncio.new_event_loop()
