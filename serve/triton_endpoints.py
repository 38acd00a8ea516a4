"""Several Triton servers of one encoder: who is asked next, who rests, and what a request survives."""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from tritonclient.utils import InferenceServerException

from serve.errors import ContractError, EncoderUnavailable
from serve.triton_transport import Grpc, Http, Transport

TRIES = 3
BACKOFF_S = 0.1
"""Waited before every server is asked a second time; doubles for each further round."""
REST_S, MOST_REST_S = 0.2, 5.0
"""A server that failed is asked last for so long, doubling with every further failure up to the second."""
GREETED_FOR_S = 0.5
"""A server is asked who it is before the first request, after a failure, and so often: no Triton restarts faster than this, so
none is replaced unnoticed between two requests."""
_T = TypeVar("_T")


class RefusedError(ContractError):
    """The server understood the request and does not want it."""


@dataclass(eq=False)
class Endpoint:
    """One server and how it is doing."""

    address: str
    transport: Transport
    outstanding: int = 0
    asked: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    greeted: dict[str, float] = field(default_factory=dict)
    """Role -> when it last said who it is: another encoder may have come up in its place."""


class Endpoints:
    """The servers behind one address; may be used from many threads at once.

    Each request goes to the server with the least under way. One that does not answer is left for the next: inference has no
    side effects, so asking twice is harmless. Of several servers each gets an equal share of the deadline.
    """

    def __init__(self, url: str, scheme: str, addresses: list[str], timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        kind = Grpc if scheme == "grpc" else Http
        self.all = [Endpoint(address, kind(address, timeout_s / len(addresses))) for address in addresses]
        self._lock = threading.Lock()

    def call(
        self, request: Callable[[Transport], _T], greet: Callable[[Transport], object] | None = None, role: str = ""
    ) -> _T:
        """Send, and send again while nobody answers. Every foreign exception is translated here.

        Args: greet, run first on a server that has not been greeted for this role lately; its EncoderMismatch ends the request.
        """
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            slow = False
            for endpoint in self._in_turn():
                try:
                    return self._ask(endpoint, request, greet, role)
                except InferenceServerException as error:
                    slow = slow or error.status() == "StatusCode.DEADLINE_EXCEEDED"
                    reason = str(error.message())
                except TimeoutError:
                    slow = True
                except (OSError, http.client.HTTPException) as error:
                    reason = str(error) or type(error).__name__
            if slow:  # the time is used up
                raise EncoderUnavailable(
                    f"{self._url}: no answer within {self._timeout_s:g} s; is the server overloaded or stuck?"
                )
        do = "start one with `simclr triton --repository REPO` or correct the address"
        raise EncoderUnavailable(f"{self._url}: no Triton server answers ({reason.splitlines()[0]}); {do}")

    def meet(self, greet: Callable[[Transport], object]) -> None:
        """Greet every server that answers, so that a wrong one is known now and not at some later request."""
        if len(self.all) == 1:  # it has just answered
            return
        for endpoint in self.all:
            with suppress(InferenceServerException, OSError, http.client.HTTPException):  # it rests, and is met later
                self._ask(endpoint, lambda _: None, greet, "")

    def _ask(
        self,
        endpoint: Endpoint,
        request: Callable[[Transport], _T],
        greet: Callable[[Transport], object] | None,
        role: str,
    ) -> _T:
        with self._lock:
            endpoint.outstanding += 1
            endpoint.asked += 1
        try:
            if greet is not None and time.monotonic() - endpoint.greeted.get(role, -math.inf) >= GREETED_FOR_S:
                greet(endpoint.transport)
                endpoint.greeted[role] = time.monotonic()
            answer = request(endpoint.transport)
        except InferenceServerException as error:
            if error.status() not in ("StatusCode.UNAVAILABLE", "503", "StatusCode.DEADLINE_EXCEEDED"):
                raise self._translated(error) from error
            self._failed(endpoint)
            raise
        except (OSError, http.client.HTTPException):
            self._failed(endpoint)
            raise
        finally:
            with self._lock:
                endpoint.outstanding -= 1
        endpoint.failures = 0
        return answer

    def _in_turn(self) -> Iterator[Endpoint]:
        """Every server once: those that are well before those that rest, then by what they have under way."""
        asked: set[str] = set()
        while len(asked) < len(self.all):
            now = time.monotonic()
            left = [endpoint for endpoint in self.all if endpoint.address not in asked]
            best = min(left, key=lambda endpoint: (max(0.0, endpoint.rests_until - now), endpoint.outstanding, endpoint.asked))
            asked.add(best.address)
            yield best

    def _failed(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.rests_until = time.monotonic() + min(MOST_REST_S, REST_S * 2**endpoint.failures)
            endpoint.failures += 1
            endpoint.greeted.clear()

    def _translated(self, error: InferenceServerException) -> Exception:
        status, message = error.status(), str(error.message())
        if "unknown model" in message:
            head = "; export with --head" if "_classify'" in message else "; look at the address, or export the run again"
            return ContractError(f"{self._url}: {message[0].lower()}{message[1:]}{head}")
        if status in ("StatusCode.INVALID_ARGUMENT", "400"):
            return RefusedError(message)
        return EncoderUnavailable(f"{self._url}: the server failed ({message.splitlines()[0]}); its log says more")
