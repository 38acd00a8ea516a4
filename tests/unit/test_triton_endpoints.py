"""Which server is asked, and what a request survives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tritonclient.utils import InferenceServerException

from serve import triton_endpoints
from serve.errors import ContractError, EncoderMismatch, EncoderUnavailable
from serve.triton_endpoints import Endpoints
from serve.triton_transport import parse_url


class Clock:
    """Time that passes only when told, or when somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(triton_endpoints, "time", found)
    return found


@pytest.fixture
def servers(clock):
    """Three servers; a request is a function of the transport, which here is the server's number."""
    found = Endpoints("grpc://a,b,c/x", "grpc", ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], timeout_s=9)
    for number, endpoint in enumerate(found.all):
        endpoint.transport = number
    return found


def down(status="StatusCode.UNAVAILABLE"):
    return InferenceServerException("gone", status)


def asked(servers, broken=(), error=None):
    """Numbers of the servers that one request goes to."""
    order = []

    def request(number):
        order.append(number)
        if number in broken:
            raise error or down()

    servers.call(request)
    return order


def test_idle_servers_take_turns(servers):
    assert [asked(servers) for _ in range(6)] == [[0], [1], [2], [0], [1], [2]]


def test_the_least_busy_server_is_asked(servers):
    hold, entered = threading.Event(), threading.Barrier(3)

    def slow(number):
        entered.wait(5)
        hold.wait(5)
        return number

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(servers.call, slow) for _ in range(2)]
        entered.wait(5)
        assert [asked(servers) for _ in range(3)] == [[2]] * 3
        hold.set()
        assert {future.result() for future in busy} == {0, 1}
    assert [endpoint.outstanding for endpoint in servers.all] == [0, 0, 0]


@pytest.mark.parametrize(
    "error", [down(), down("503"), down("StatusCode.DEADLINE_EXCEEDED"), ConnectionResetError(), TimeoutError()]
)
def test_who_does_not_answer_is_left_for_the_next_and_rests(servers, clock, error):
    assert asked(servers, {0}, error) == [0, 1]
    assert [asked(servers, {0}, error) for _ in range(4)] == [[2], [1], [2], [1]]
    clock.now += triton_endpoints.REST_S
    assert asked(servers, {0}, error) == [0, 2], "after its rest it is tried again"
    clock.now += triton_endpoints.REST_S
    assert asked(servers, {0}, error) == [1], "the next rest is longer"
    clock.now += triton_endpoints.MOST_REST_S
    assert asked(servers) == [0]
    assert servers.all[0].failures == 0


def test_all_are_asked_before_a_request_is_given_up(servers, clock):
    order = []

    def request(number):
        order.append(number)
        raise down()

    with pytest.raises(EncoderUnavailable, match="no Triton server answers"):
        servers.call(request)
    assert sorted(order) == sorted([0, 1, 2] * triton_endpoints.TRIES)
    assert clock.now > 100


def test_when_time_is_used_up_nobody_is_asked_again(servers):
    order = []

    def request(number):
        order.append(number)
        raise down("StatusCode.DEADLINE_EXCEEDED")

    with pytest.raises(EncoderUnavailable, match="no answer within 9 s"):
        servers.call(request)
    assert order == [0, 1, 2]


def test_a_refusal_is_no_failure_of_the_server(servers):
    with pytest.raises(ContractError):
        asked(servers, {0}, down("StatusCode.INVALID_ARGUMENT"))
    assert [endpoint.failures for endpoint in servers.all] == [0, 0, 0]


def test_a_server_that_was_away_is_asked_who_it_is_before_it_gets_work(servers, clock):
    greeted = []
    servers.meet(greeted.append)
    assert greeted == [0, 1, 2]
    call = lambda: servers.call(lambda number: number, greeted.append)  # noqa: E731
    assert [call() for _ in range(3)] == [0, 1, 2]
    assert greeted == [0, 1, 2], "who has just said who it is is not asked again"
    asked(servers, {0})
    clock.now += triton_endpoints.REST_S
    assert sorted(call() for _ in range(3)) == [0, 1, 2]
    assert greeted == [0, 1, 2, 0]


def test_no_server_can_be_replaced_unnoticed_between_two_requests(servers, clock):
    greeted = []
    servers.meet(greeted.append)
    clock.now += triton_endpoints.GREETED_FOR_S
    for _ in range(6):
        servers.call(lambda number: number, greeted.append)
    assert greeted == [0, 1, 2] * 2


def test_another_encoder_at_one_address_stops_the_request(servers):
    def greet(number):
        if number == 1:
            raise EncoderMismatch("another one")

    with pytest.raises(EncoderMismatch):
        servers.meet(greet)


def test_a_server_that_is_down_at_the_start_is_met_later(servers, clock):
    def away(number):
        if number == 1:
            raise down()

    servers.meet(away)
    assert [bool(endpoint.greeted) for endpoint in servers.all] == [True, False, True]


def test_addresses():
    assert parse_url("grpc://a:1,b,[::1]:3/x") == ("grpc", ["a:1", "b:8001", "[::1]:3"], "x")
    assert parse_url("http://a,b:9") == ("http", ["a:8000", "b:9"], "")
    for url in ("grpc://a:1,/x", "grpc://a,a:8001/x", "grpc://a:1,b:port/x"):
        with pytest.raises(ContractError, match="not the address of an encoder"):
            parse_url(url)
