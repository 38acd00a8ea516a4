"""Admission control as a bare ASGI application: every request is moved by hand, and no clock decides."""

import asyncio
import json
import random
from contextlib import asynccontextmanager

import pytest

from serve.gateway.admission import Admission
from serve.gateway.limits import Limits
from serve.gateway.metrics import Metrics
from serve.gateway.refusal import DROPPED_BYTES


class Request:
    """One request whose body arrives, and whose client leaves, when the test says so."""

    def __init__(self, door, body=b"picture", *, length=None, method="POST", path="/v1/embed"):
        headers = [(b"transfer-encoding", b"chunked") if length is None else (b"content-length", str(length).encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        self.incoming = asyncio.Queue()
        if body is not None:
            self.arrives(body)
        self.reads = self.reads_before_answer = 0
        self.sent = []
        self.task = asyncio.create_task(door(scope, self._receive, self._send))

    def arrives(self, body, more=False):
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leaves(self):
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def _receive(self):
        self.reads += 1
        return await self.incoming.get()

    async def _send(self, message):
        if not self.sent:
            self.reads_before_answer = self.reads
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self):
        return dict(self.sent[0]["headers"])

    @property
    def detail(self):
        return json.loads(b"".join(message["body"] for message in self.sent[1:]))["detail"]


class Room:
    """The application behind the door: who is inside, until they are let out."""

    def __init__(self, **limits):
        self.metrics = Metrics()
        self.door = Admission(self._enter, Limits(**{"at_once": 2, "waiting": 3, "max_bytes": 1000, **limits}), self.metrics)
        self.inside, self.most_inside, self.bodies = {}, 0, []

    async def _enter(self, scope, receive, send):
        if scope["method"] == "GET":
            await self._answer(send)
            return
        body = (await receive())["body"]
        assert body not in self.inside
        self.inside[body] = asyncio.Event()
        self.bodies.append(body)
        self.most_inside = max(self.most_inside, len(self.inside))
        try:
            await self.inside[body].wait()
        finally:
            del self.inside[body]
        await self._answer(send)

    async def _answer(self, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"vector"})

    async def fill(self, count=5):
        requests = [Request(self.door, bytes([number])) for number in range(count)]
        await settle()
        return requests

    async def empty(self):
        """Let everybody out, and those who come in after them."""
        for _ in range(1000):
            for out in self.inside.values():
                out.set()
            await asyncio.sleep(0)

    def rejections(self, reason):
        return self.metrics.registry.get_sample_value("simclr_rejections_total", {"reason": reason})

    def held(self):
        return self.metrics.registry.get_sample_value("simclr_requests_held")


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def room(**limits):
    yield (one := Room(**limits))
    await one.empty()
    assert one.held() == 0, "a place was lost"
    assert one.door._inside._value == one.door._limits.at_once


def scenario(test):
    def run():
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@scenario
async def test_two_inside_three_in_line_and_the_sixth_is_refused_before_its_body_is_read():
    async with room() as here:
        await here.fill()
        assert (len(here.inside), here.held()) == (2, 5)
        sixth = Request(here.door, b"x" * 900, length=900)
        await settle()
        assert (sixth.status, sixth.reads_before_answer) == (429, 0)
        assert sixth.headers[b"retry-after"] == b"1"
        assert sixth.headers[b"content-type"] == b"application/problem+json"
        assert "5 requests are here already" in sixth.detail
        assert here.rejections("full") == 1


@scenario
async def test_first_come_first_served_and_every_place_is_used_again():
    async with room() as here:
        requests = await here.fill()
        for turn in range(5):
            here.inside[bytes([turn])].set()
            await settle()
            assert requests[turn].status == 200
            requests.append(Request(here.door, bytes([5 + turn])))
            await settle()
        assert here.bodies == [bytes([number]) for number in range(7)]
        assert here.most_inside == 2


@scenario
async def test_what_is_no_work_is_free():
    async with room(at_once=1, waiting=0) as here:
        await here.fill(1)
        free = [Request(here.door, method="GET", path=path) for path in ("/v1/info", "/metrics", "/health/live")]
        work = [Request(here.door, method="PUT"), Request(here.door, b"", length=0, method="GET", path="/v1/items")]
        Request(here.door, b"page", path="/gradio_api/queue/join")
        await settle()
        assert [request.status for request in (*free, *work)] == [200, 200, 200, 429, 429]
        assert b"connection" not in work[1].headers, "there was no body to read"
        assert b"page" in here.inside


@scenario
async def test_whoever_stands_in_line_too_long_is_sent_away_and_the_place_is_free():
    async with room(wait_s=0.02) as here:
        requests = await here.fill()
        await asyncio.sleep(0.1)
        assert [request.status for request in requests] == [None, None, 429, 429, 429]
        assert "no turn came within 0.02 s" in requests[2].detail
        assert (here.held(), here.rejections("waited")) == (2, 3)
        late = Request(here.door, b"late")
        here.inside[b"\0"].set()
        await settle()
        assert b"late" in here.inside
        assert late.status is None


@scenario
async def test_a_client_that_leaves_the_line_frees_its_place():
    async with room() as here:
        requests = await here.fill()
        requests[3].leaves()
        await settle()
        assert requests[3].task.done()
        assert (requests[3].sent, here.held()) == ([], 4)
        last = Request(here.door, b"last")
        for number in (0, 1, 2):
            here.inside[bytes([number])].set()
            await settle()
        assert set(here.inside) == {b"\4", b"last"}
        assert last.status is None


@scenario
async def test_a_client_that_leaves_during_its_upload_frees_its_place():
    async with room(at_once=1, waiting=0) as here:
        request = Request(here.door, None)
        request.arrives(b"half", more=True)
        await settle()
        assert here.held() == 1
        request.leaves()
        await settle()
        assert (request.sent, here.held()) == ([], 0)


@scenario
async def test_an_upload_does_not_keep_others_out():
    """A slow client holds a place, but not one inside, where the encoder would wait for it."""
    async with room(at_once=1, waiting=1) as here:
        slow = Request(here.door, None)
        slow.arrives(b"sl", more=True)
        await settle()
        Request(here.door, b"quick")
        await settle()
        assert list(here.inside) == [b"quick"]
        slow.arrives(b"ow")
        here.inside[b"quick"].set()
        await settle()
        assert list(here.inside) == [b"slow"]


@scenario
async def test_an_upload_that_takes_too_long():
    async with room(upload_s=0.02) as here:
        request = Request(here.door, None, length=10)
        request.arrives(b"half", more=True)
        await asyncio.sleep(0.1)
        assert request.status == 408
        assert "within 0.02 s" in request.detail
        assert (here.held(), here.rejections("slow upload")) == (0, 1)
        request.leaves()


@scenario
async def test_a_body_that_says_it_is_too_large_is_not_read_at_all():
    async with room() as here:
        request = Request(here.door, b"x" * 1001, length=1001)
        await settle()
        assert (request.status, request.reads_before_answer) == (413, 0)
        assert "at most 1,000 bytes" in request.detail
        just = Request(here.door, b"x" * 1000, length=1000)
        await settle()
        assert b"x" * 1000 in here.inside
        assert just.status is None


@scenario
async def test_a_body_in_chunks_is_read_up_to_the_limit():
    async with room() as here:
        request = Request(here.door, None)
        for _ in range(50):
            request.arrives(b"x" * 100, more=True)
        await settle()
        assert (request.status, request.reads_before_answer) == (413, 11)
        assert request.headers[b"connection"] == b"close"
        assert here.held() == 0, "who is refused holds no place while the rest of the body is dropped"
        request.leaves()


@pytest.mark.parametrize(
    ("length", "kept"), [(10, True), (DROPPED_BYTES, True), (DROPPED_BYTES + 1, False), (None, False)], ids=str
)
def test_small_refused_bodies_are_dropped_and_the_connection_is_kept(length, kept):
    async def test():
        async with room(at_once=1, waiting=0, max_bytes=2 * DROPPED_BYTES) as here:
            await here.fill(1)
            request = Request(here.door, None, length=length)
            await settle()
            assert request.status == 429
            assert (b"connection" not in request.headers) == kept
            assert [message.get("more_body") for message in request.sent[1:]] == [True], "the answer is whole by now"
            request.arrives(b"a", more=True)
            request.arrives(b"b")
            await settle()
            assert request.task.done()
            assert request.incoming.empty()
            assert request.sent[-1] == {"type": "http.response.body", "body": b""}

    asyncio.run(test())


def test_who_refuses_does_not_wait_for_ever_for_the_rest_of_a_body(monkeypatch):
    monkeypatch.setattr("serve.gateway.refusal.LINGER_S", 0.02)

    async def test():
        async with room(at_once=1, waiting=0) as here:
            await here.fill(1)
            request = Request(here.door, None, length=10)
            await asyncio.sleep(0.1)
            assert request.task.done()
            assert request.status == 429

    asyncio.run(test())


@scenario
async def test_an_answer_that_does_not_come():
    async with room(answer_s=0.02) as here:
        requests = await here.fill(3)
        await asyncio.sleep(0.15)
        assert [request.status for request in requests] == [503, 503, 503]
        assert "no answer within 0.02 s" in requests[0].detail
        assert here.rejections("no answer") == 3
        assert not here.inside


@scenario
async def test_a_client_that_does_not_read_its_answer_is_hung_up_on():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()  # as uvicorn does when the client's buffers are full

    door = Admission(app, Limits(at_once=1, waiting=0, answer_s=0.02), metrics := Metrics())
    request = Request(door)
    await asyncio.sleep(0.1)
    assert request.task.done()
    assert [message["type"] for message in request.sent] == ["http.response.start"]
    assert metrics.registry.get_sample_value("simclr_requests_held") == 0


@scenario
async def test_a_route_that_fails_frees_its_place():
    async def app(scope, receive, send):
        raise RuntimeError("broken")

    door = Admission(app, Limits(at_once=1, waiting=0), Metrics())
    for _ in range(3):
        request = Request(door)
        await settle()
        assert isinstance(request.task.exception(), RuntimeError)


@pytest.mark.parametrize("seed", range(10))
def test_no_place_is_ever_lost_or_given_twice(seed):
    """Many requests that arrive, upload, leave, are cancelled and answered in any order; then all places are there again."""
    chance = random.Random(seed)  # noqa: S311

    async def test():
        async with room(wait_s=0.01 if seed % 2 else 60) as here:
            requests = []
            for number in range(300):
                request = Request(here.door, None)
                requests.append(request)
                body = number.to_bytes(2, "big")
                acts = [lambda r=request, b=body: r.arrives(b), request.leaves, request.task.cancel]
                chance.choices(acts, [8, 1, 1])[0]()
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                for waiting in chance.sample(requests[-8:], min(2, len(requests))):
                    chance.choice([waiting.leaves, waiting.task.cancel, lambda: None, lambda: None])()
                for out in list(here.inside.values()):
                    if chance.random() < 0.3:
                        out.set()
                assert len(here.inside) <= 2
                assert 0 <= here.held() <= 5
            await here.empty()
            assert all(request.task.done() for request in requests)
            assert {request.status for request in requests} == {None, 200, 429}
            assert here.held() == 0
            await here.fill()
            assert len(here.inside) == 2

    asyncio.run(test())


@pytest.mark.parametrize("wrong", [{"at_once": 0}, {"waiting": -1}, {"max_bytes": 0}, {"wait_s": 0.0}], ids=str)
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="wanted"):
        Limits(**wrong)
