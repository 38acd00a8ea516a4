"""Which server is asked, and what a request survives."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import BadStatusLine

import pytest
from tritonclient.utils import InferenceServerException

from serve.errors import ContractError, EncoderMismatch, EncoderUnavailable
from serve.triton import endpoints
from serve.triton.endpoints import Endpoints, RefusedError
from serve.triton.transport import parse_url


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
    monkeypatch.setattr(endpoints, "time", found)
    return found


class Beside:
    """In place of the threads that probe: what was submitted runs when the test says so."""

    def __init__(self):
        self.work = []

    def submit(self, *call):
        self.work.append(call)

    def run(self):
        """How many probes there were."""
        work, self.work = self.work, []
        for function, *arguments in work:
            function(*arguments)
        return len(work)


@pytest.fixture
def servers(clock):
    """Three servers; a request is a function of the transport, which here is the server's number, and of its deadline."""
    found = Endpoints("grpc://a,b,c/x", "grpc", ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], timeout_s=9)
    for number, endpoint in enumerate(found.all):
        endpoint.transport = number
    found._probes.shutdown()
    found._probes = Beside()
    return found


def down(status="StatusCode.UNAVAILABLE", message="gone"):
    return InferenceServerException(message, status)


def asked(servers, broken=(), error=None, greet=None):
    """Numbers of the servers that one request goes to."""
    order = []

    def request(number, _ends):
        order.append(number)
        if number in broken:
            raise error or down()

    servers.call(request, greet)
    return order


def well(_number, _ends):
    pass


def ill(_number, _ends):
    raise down()


def test_idle_servers_take_turns(servers):
    assert [asked(servers) for _ in range(6)] == [[0], [1], [2], [0], [1], [2]]


def test_the_least_busy_server_is_asked(servers):
    hold, entered = threading.Event(), threading.Barrier(3)

    def slow(number, _ends):
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


def test_requests_of_one_moment_are_spread_evenly(servers):
    """Choosing a server and counting it busy is one step."""
    together, taken = threading.Barrier(30), []

    def request(number, _ends):
        taken.append(number)
        together.wait(10)

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(lambda _: servers.call(request), range(30)))
    assert sorted(taken) == sorted([0, 1, 2] * 10)


FAULTS = [
    down(),
    down("503"),
    down("502"),
    down("StatusCode.DEADLINE_EXCEEDED"),
    down("StatusCode.NOT_FOUND", "Request for unknown model: 'x_encoder' has no available versions"),
    down("StatusCode.INTERNAL", "Stub process 'x_encoder_0_0' is not healthy."),
    down("500"),
    down("StatusCode.INTERNAL", ""),
    ConnectionResetError(),
    TimeoutError(),
    BadStatusLine("?"),
    EncoderMismatch("another one"),
]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_who_has_no_answer_is_left_for_the_next_and_rests(servers, error):
    assert asked(servers, {0}, error) == [0, 1]
    assert [asked(servers, {0}, error) for _ in range(4)] == [[2], [1], [2], [1]]


def test_a_resting_server_is_probed_beside_the_requests(servers, clock):
    """After 0.2 s, then after twice as long each time; never two probes at once; no request waits for one."""
    asked(servers, {0})
    asked(servers, greet=well)
    assert servers._probes.run() == 0, "it rests"
    found = []
    for rest_s in (0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
        clock.now += rest_s - 0.01
        asked(servers, greet=ill_if_first)
        found.append(servers._probes.run())
        clock.now += 0.02
        assert 0 not in asked(servers, greet=ill_if_first)
        assert 0 not in asked(servers, greet=ill_if_first)
        found.append(servers._probes.run())
    assert found == [0, 1] * 7


def ill_if_first(number, ends):
    if number == 0:
        ill(number, ends)


def test_a_probe_that_succeeds_brings_the_server_back(servers, clock):
    asked(servers, {0})
    clock.now += endpoints.REST_S
    assert 0 not in asked(servers, greet=well)
    assert servers._probes.run() == 1
    assert sorted(asked(servers, greet=well)[0] for _ in range(3)) == [0, 1, 2]
    asked(servers, {0, 1, 2} - {1})
    assert servers.all[0].rest_s == endpoints.REST_S, "who was well since rests as shortly as at first"


def test_a_server_may_fail_for_ever(servers, clock):
    """2.0 ** 1024 is too large."""
    asked(servers, {0})
    for _ in range(1100):
        clock.now += endpoints.MOST_REST_S
        asked(servers, greet=ill_if_first)
        assert servers._probes.run() == 1
    assert servers.all[0].rest_s == endpoints.MOST_REST_S


def test_when_all_rest_they_are_asked_all_the_same(servers):
    with pytest.raises(EncoderUnavailable):
        asked(servers, {0, 1, 2})
    assert [endpoint.rests for endpoint in servers.all] == [True] * 3
    (first,) = asked(servers)
    assert [endpoint.rests for endpoint in servers.all] == [number != first for number in range(3)]


def test_all_are_asked_before_a_request_is_given_up(servers, clock):
    order = []

    def request(number, _ends):
        order.append(number)
        raise down()

    with pytest.raises(EncoderUnavailable, match="no Triton server answers"):
        servers.call(request)
    assert sorted(order) == sorted([0, 1, 2] * len(endpoints.WAITS_S))
    assert clock.now > 100


def test_the_deadline_is_shared_and_holds_for_all(servers, clock):
    """9 s for three servers that hang: 3 s each, and 5 of 10 for the last two if the first is quick to fail."""
    ends = []

    def hang(number, until):
        ends.append(until - 100)
        clock.now = until
        raise down("StatusCode.DEADLINE_EXCEEDED")

    with pytest.raises(EncoderUnavailable, match="no answer within 9 s"):
        servers.call(hang)
    assert ends == pytest.approx([3, 6, 9])

    began, ends = clock.now, []

    def first_is_away(number, until):
        ends.append(until - began)
        if len(ends) == 1:
            raise down()
        clock.now = until
        raise TimeoutError

    with pytest.raises(EncoderUnavailable, match="no answer within 9 s"):
        servers.call(first_is_away)
    assert ends == pytest.approx([3, 4.5, 9])


def test_no_round_begins_after_the_deadline(servers, clock):
    def slow_refusal(number, _ends):
        clock.now += 2.99
        raise down()

    with pytest.raises(EncoderUnavailable):
        servers.call(slow_refusal)
    assert clock.now < 109


def test_when_time_is_used_up_nobody_is_asked_again(servers):
    order = []

    def request(number, _ends):
        order.append(number)
        raise down("StatusCode.DEADLINE_EXCEEDED")

    with pytest.raises(EncoderUnavailable, match="no answer within 9 s"):
        servers.call(request)
    assert order == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (down("404", "Request for unknown model: 'x' is not found"), ContractError),
        (down("500", "Stub process is not healthy"), EncoderUnavailable),
        (EncoderMismatch("another one"), EncoderMismatch),
    ],
)
def test_what_all_servers_say_is_believed_at_once(servers, error, wanted):
    order = []

    def request(number, _ends):
        order.append(number)
        raise error

    with pytest.raises(wanted) as caught:
        servers.call(request)
    assert type(caught.value) is wanted
    assert order == [0, 1, 2]


def test_what_one_server_says_outweighs_the_silence_of_the_others(servers):
    def request(number, _ends):
        raise EncoderMismatch("another one") if number == 1 else down()

    with pytest.raises(EncoderMismatch):
        servers.call(request)


@pytest.mark.parametrize("status", ["StatusCode.INVALID_ARGUMENT", "400"])
def test_a_refusal_is_no_failure_of_the_server(servers, status):
    with pytest.raises(RefusedError):
        asked(servers, {0}, down(status))
    assert not any(endpoint.rests for endpoint in servers.all)


def test_a_server_that_was_away_is_asked_who_it_is_before_it_gets_work(servers, clock):
    greeted = []
    greet = lambda number, _ends: greeted.append(number)  # noqa: E731
    servers.meet(greet)
    assert greeted == [0, 1, 2]
    assert [asked(servers, greet=greet) for _ in range(3)] == [[0], [1], [2]]
    assert greeted == [0, 1, 2], "who has just said who it is is not asked again"
    asked(servers, {0})
    clock.now += endpoints.REST_S
    asked(servers, greet=greet)
    servers._probes.run()
    assert sorted(asked(servers, greet=greet)[0] for _ in range(3)) == [0, 1, 2]
    assert greeted == [0, 1, 2, 0]


def test_no_server_can_be_replaced_unnoticed_between_two_requests(servers, clock):
    greeted = []
    greet = lambda number, _ends: greeted.append(number)  # noqa: E731
    servers.meet(greet)
    clock.now += endpoints.GREETED_FOR_S
    for _ in range(6):
        asked(servers, greet=greet)
    assert greeted == [0, 1, 2] * 2


def test_a_server_with_another_encoder_gets_no_work(servers, clock):
    def greet(number, _ends):
        if number == 1:
            raise EncoderMismatch("another one")

    for _ in range(6):
        assert 1 not in asked(servers, greet=greet)
        clock.now += endpoints.MOST_REST_S
        servers._probes.run()


def test_servers_of_two_encoders_are_refused_on_connecting(servers):
    def greet(number, _ends):
        if number == 1:
            raise EncoderMismatch("another one")

    with pytest.raises(EncoderMismatch):
        servers.meet(greet)


@pytest.mark.parametrize("error", [down(), down("404", "Request for unknown model"), TimeoutError()], ids=repr)
def test_a_server_that_is_not_ready_at_the_start_is_met_later(servers, error):
    def away(number, _ends):
        if number == 1:
            raise error

    servers.meet(away)
    assert [bool(endpoint.greeted) for endpoint in servers.all] == [True, False, True]
    assert 1 not in [number for _ in range(4) for number in asked(servers, greet=away)]


def test_addresses():
    assert parse_url("grpc://a:1,b,[::1]:3/x") == ("grpc", ["a:1", "b:8001", "[::1]:3"], "x")
    assert parse_url("http://a,b:9") == ("http", ["a:8000", "b:9"], "")
    for url in ("grpc://a:1,/x", "grpc://a,a:8001/x", "grpc://a:1,b:port/x", "https://a:1/x", "a:1"):
        with pytest.raises(ContractError, match="not the address of an encoder"):
            parse_url(url)
