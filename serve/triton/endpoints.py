"""Several Triton servers of one encoder: who is asked next, who rests, and what a request survives."""

from __future__ import annotations

import http.client
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from tritonclient.utils import InferenceServerException

from serve.errors import ContractError, EncoderMismatch, EncoderUnavailable, SimclrError
from serve.triton.transport import Grpc, Http, Transport

WAITS_S = (0.0, 0.1, 0.2)
"""Before the servers are asked for the first, second and third time."""
REST_S, MOST_REST_S = 0.2, 5.0
"""A server that failed is probed after the first, then after twice as long as before, up to the second."""
PROBE_S = 2.0
"""A probe that is not answered in this time has failed."""
GREETED_FOR_S = 0.5
"""A server is asked who it is before the first request, after a failure, and so often: no Triton restarts faster than this, so
none is replaced unnoticed between two requests."""
_AWAY = ("StatusCode.UNAVAILABLE", "502", "503", "504")
_T = TypeVar("_T")
Request: TypeAlias = Callable[[Transport, float], _T]
"""What is asked of a server, and until when its answer is waited for."""


class RefusedError(ContractError):
    """The server understood the request and does not want it."""


@dataclass(eq=False)
class Endpoint:
    """One server and how it is doing."""

    address: str
    transport: Transport
    outstanding: int = 0
    turn: int = 0
    """Which of all requests it was asked last."""
    rests: bool = False
    """It failed, and nobody has found it well since."""
    rest_s: float = REST_S
    probe_at: float = math.inf
    greeted: dict[str, float] = field(default_factory=dict)
    """Role -> when it last said who it is: another encoder may have come up in its place."""


class Endpoints:
    """The servers behind one address; may be used from many threads at once.

    Each request goes to the server with the least under way. If that does not answer, has not got the model ready or holds
    another encoder, the next one is asked: inference has no side effects, so asking twice is harmless. The server rests then,
    which means that it is asked last, until it passes a probe. Probes run beside the requests, so none waits for a server that
    hangs still. Of several servers each gets an equal share of the deadline.
    """

    def __init__(self, url: str, scheme: str, addresses: list[str], timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        kind = Grpc if scheme == "grpc" else Http
        self.all = [Endpoint(address, kind(address)) for address in addresses]
        self._turns = itertools.count(1)
        self._lock = threading.Lock()
        self._probes = ThreadPoolExecutor(len(addresses), "probe")

    def call(self, request: Request[_T], greet: Request[object] | None = None, role: str = "") -> _T:
        """Ask until a server answers. Every foreign exception is translated here.

        Args: greet, run first on a server that has not been greeted for this role lately, and as its probe.
        Raises: RefusedError at once; when no server has an answer, what is wrong: EncoderMismatch, ContractError or
        EncoderUnavailable.
        """
        ends = time.monotonic() + self._timeout_s
        if greet is not None:
            self._probe_the_rested(greet, role)
        failures: list[Exception] = []
        for wait_s in WAITS_S:
            if time.monotonic() + wait_s > ends:
                break
            time.sleep(wait_s)
            failures = []
            for endpoint, until in self._in_turn(ends):
                try:
                    return self._ask(endpoint, request, greet, role, until)
                except RefusedError:
                    raise
                except (SimclrError, OSError) as failure:
                    failures.append(failure)
                finally:
                    with self._lock:
                        endpoint.outstanding -= 1
            if any(isinstance(failure, TimeoutError) for failure in failures):  # the time is used up
                break
            if all(isinstance(failure, SimclrError) for failure in failures):  # they answer; asking again would not help
                break
        raise self._verdict(failures)

    def meet(self, greet: Request[object]) -> None:
        """Greet every server that answers, so that a wrong one is known now and not at some later request.

        Raises: EncoderMismatch.
        """
        if len(self.all) == 1:  # it has just answered
            return
        for endpoint in self.all:
            try:
                self._ask(endpoint, _nothing, greet, "", time.monotonic() + self._timeout_s / len(self.all))
            except EncoderMismatch:
                raise
            except (SimclrError, OSError):  # it rests, and is met later
                pass

    def _in_turn(self, ends: float) -> Iterator[tuple[Endpoint, float]]:
        """Every server once, counted as busy, and its share of the time: the well before the resting, then the least busy."""
        left = list(self.all)
        while left:
            with self._lock:
                best = min(left, key=lambda endpoint: (endpoint.rests, endpoint.outstanding, endpoint.turn))
                best.outstanding += 1
                best.turn = next(self._turns)
            now = time.monotonic()
            yield best, now + (ends - now) / len(left)
            left.remove(best)

    def _ask(self, endpoint: Endpoint, request: Request[_T], greet: Request[object] | None, role: str, ends: float) -> _T:
        """Raises: RefusedError, another SimclrError if this server cannot help, OSError if it does not answer."""
        try:
            if greet is not None and time.monotonic() - endpoint.greeted.get(role, -math.inf) >= GREETED_FOR_S:
                greet(endpoint.transport, ends)
                endpoint.greeted[role] = time.monotonic()
            answer = request(endpoint.transport, ends)
        except (InferenceServerException, http.client.HTTPException) as error:
            failure = self._translated(error)
            if not isinstance(failure, RefusedError):
                self._rest(endpoint)
            raise failure from error
        except (SimclrError, OSError):
            self._rest(endpoint)
            raise
        endpoint.rests = False
        return answer

    def _rest(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.greeted.clear()
            if not endpoint.rests:
                endpoint.rests, endpoint.rest_s, endpoint.probe_at = True, REST_S, time.monotonic() + REST_S

    def _probe_the_rested(self, greet: Request[object], role: str) -> None:
        if len(self.all) == 1:  # it is asked anyhow
            return
        with self._lock:
            due = [endpoint for endpoint in self.all if endpoint.rests and endpoint.probe_at <= time.monotonic()]
            for endpoint in due:
                endpoint.probe_at = math.inf
        for endpoint in due:
            self._probes.submit(self._probe, endpoint, greet, role)

    def _probe(self, endpoint: Endpoint, greet: Request[object], role: str) -> None:
        with suppress(Exception):  # whatever it is, the server rests on
            self._ask(endpoint, _nothing, greet, role, time.monotonic() + PROBE_S)
        with self._lock:
            endpoint.rest_s = min(MOST_REST_S, 2 * endpoint.rest_s)
            endpoint.probe_at = time.monotonic() + endpoint.rest_s

    def _translated(self, error: Exception) -> Exception:
        if not isinstance(error, InferenceServerException):
            return ConnectionError(str(error) or type(error).__name__)
        status, message = error.status(), str(error.message() or error.status())
        if status == "StatusCode.DEADLINE_EXCEEDED":
            return TimeoutError(message)
        if status in _AWAY:
            return ConnectionError(message)
        if "unknown model" in message:
            head = "; export with --head" if "_classify'" in message else "; look at the address, or export the run again"
            return ContractError(f"{self._url}: {message[0].lower()}{message[1:]}{head}")
        if status in ("StatusCode.INVALID_ARGUMENT", "400"):
            return RefusedError(message)
        return EncoderUnavailable(f"{self._url}: the server failed ({message.splitlines()[0]}); its log says more")

    def _verdict(self, failures: Sequence[Exception]) -> SimclrError:
        """Of a request that no server had an answer for."""
        for failure in failures:
            if isinstance(failure, SimclrError):
                return failure
        if not failures or any(isinstance(failure, TimeoutError) for failure in failures):
            return EncoderUnavailable(
                f"{self._url}: no answer within {self._timeout_s:g} s; is the server overloaded or stuck?"
            )
        reason = str(failures[-1]) or type(failures[-1]).__name__
        do = "start one with `simclr triton --repository REPO` or correct the address"
        return EncoderUnavailable(f"{self._url}: no Triton server answers ({reason.splitlines()[0]}); {do}")


def _nothing(_server: Transport, _ends: float) -> None:
    """To greet a server and ask no more of it."""
