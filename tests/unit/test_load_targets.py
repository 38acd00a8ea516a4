"""One request at a time to servers of both protocols that answer, shed, stall, hang up and are not there."""

import asyncio
import io
import json
import logging
import socket
import threading

import grpc
import numpy as np
import pytest
from aiohttp import web
from PIL import Image
from tritonclient.grpc import service_pb2

from serve.errors import SourceError
from serve.loadtest.requests import DRAWN, MOST, PHOTO_PX, TritonRequests, draw_pictures, gateway_bodies, take_pictures
from serve.loadtest.targets import GrpcTarget, HttpTarget, Kind, RequestFailed
from serve.pictures import prepare_batch
from serve.ports import free_port
from tests.bad_images import encoded, good, refused
from tests.toy_encoder import HEIGHT, WIDTH, write_toy_encoder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_toy_encoder(tmp_path_factory.mktemp("toy"))[1]


@pytest.fixture
def hangs_up():
    """The port of a server that closes every connection at once."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        try:
            while True:
                listener.accept()[0].close()
        except OSError:
            return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def failure_of(target, number=0):
    """How the request failed, and closes the target."""

    async def ask():
        try:
            with pytest.raises(RequestFailed) as caught:
                await target.send(number)
            return caught.value
        finally:
            await target.aclose()

    return ask()


async def grpc_server(answer):
    """A server whose only method awaits answer(request, context)."""

    async def handle(request, context):
        return await answer(request, context)

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            assert details.method == "/inference.GRPCInferenceService/ModelInfer"
            return grpc.unary_unary_rpc_method_handler(handle)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, Kind.SHED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Kind.SHED),
        (grpc.StatusCode.INVALID_ARGUMENT, Kind.BAD_REQUEST),
        (grpc.StatusCode.NOT_FOUND, Kind.BAD_REQUEST),
        (grpc.StatusCode.INTERNAL, Kind.OTHER),
    ],
)
def test_what_grpc_answers(code, kind):
    async def run():
        server, address = await grpc_server(lambda request, context: context.abort(code, "Exceeds maximum\nqueue size"))
        failure = await failure_of(GrpcTarget(address, [b""], timeout_s=5))
        await server.stop(None)
        return failure

    failure = asyncio.run(run())
    assert failure.kind is kind
    assert str(failure) == "Exceeds maximum queue size"


def test_grpc_messages_go_out_in_turn_and_as_they_are():
    seen = []

    async def answer(request, context):
        seen.append(request)
        return b"anything"

    async def run():
        server, address = await grpc_server(answer)
        target = GrpcTarget(address, [b"a", b"b", b"c"], timeout_s=5)
        for number in range(20):
            await target.send(number)
        await target.aclose()
        await server.stop(None)

    asyncio.run(run())
    assert seen == [b"abc"[number % 3 :][:1] for number in range(20)]


def test_grpc_without_an_answer_or_a_connection(hangs_up):
    async def run():
        server, address = await grpc_server(lambda request, context: asyncio.sleep(9))
        failures = [await failure_of(GrpcTarget(address, [b""], timeout_s=0.2))]
        leaves = asyncio.create_task(failure_of(GrpcTarget(address, [b""], timeout_s=9)))
        await asyncio.sleep(0.3)
        await server.stop(0)
        places = (f"127.0.0.1:{free_port()}", f"127.0.0.1:{hangs_up}", "no-such-host.invalid:8001")
        return [*failures, await leaves, *[await failure_of(GrpcTarget(place, [b""], timeout_s=5)) for place in places]]

    kinds = [failure.kind for failure in asyncio.run(run())]
    assert kinds == [Kind.TIMEOUT] + 4 * [Kind.NO_CONNECTION]


async def http_server(answer):
    """An HTTP server for any path."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=512).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, Kind.SHED),
        (503, Kind.SHED),
        (400, Kind.BAD_REQUEST),
        (422, Kind.BAD_REQUEST),
        (404, Kind.BAD_REQUEST),
        (504, Kind.TIMEOUT),
        (500, Kind.OTHER),
        (302, Kind.OTHER),
    ],
)
def test_what_http_answers(status, kind):
    async def answer(request):
        return web.Response(status=status, text='{"title": "no",\n"detail": "' + 300 * "x", headers={"Retry-After": "1"})

    async def run():
        runner, url = await http_server(answer)
        failure = await failure_of(HttpTarget(url, [(b"", {})], timeout_s=5))
        await runner.cleanup()
        return failure

    failure = asyncio.run(run())
    assert failure.kind is kind
    assert str(failure).startswith(f'{status} {{"title": "no", "detail": "xx')
    assert len(str(failure)) == 200


def test_http_without_an_answer_or_a_connection(hangs_up):
    async def run():
        async def silent(request):
            await asyncio.sleep(9)

        runner, url = await http_server(silent)
        slow = await failure_of(HttpTarget(url, [(b"", {})], timeout_s=0.2))
        await runner.cleanup()
        places = [f"http://{place}" for place in (f"127.0.0.1:{free_port()}", f"127.0.0.1:{hangs_up}", "no-such-host.invalid")]
        return [slow, *[await failure_of(HttpTarget(place, [(b"", {})], timeout_s=5)) for place in places]]

    kinds = [failure.kind for failure in asyncio.run(run())]
    assert kinds == [Kind.TIMEOUT] + 3 * [Kind.NO_CONNECTION]


def test_http_keeps_as_many_connections_as_are_under_way():
    most = under_way = 0

    async def answer(request):
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(1)
        under_way -= 1
        return web.Response()

    async def run():
        runner, url = await http_server(answer)
        target = HttpTarget(url, [(b"", {})], timeout_s=5)
        await asyncio.gather(*map(target.send, range(150)))
        await target.aclose()
        await runner.cleanup()

    asyncio.run(run())
    assert most == 150


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_pixels_as_a_message_and_as_a_body(manifest, batch):
    pictures = [good(number) for number in range(5)]
    requests = TritonRequests(manifest, pictures, "pixels", batch)
    wanted = prepare_batch(pictures, manifest.preprocess)
    messages, bodies = requests.messages(), requests.bodies()
    assert len(messages) == len(bodies) == -(-5 // batch)
    for start, message, (body, headers) in zip(range(0, 5, batch), messages, bodies, strict=True):
        pixels = wanted[np.arange(start, start + batch) % 5]
        parsed = service_pb2.ModelInferRequest.FromString(message)
        tensor = parsed.inputs[0]
        assert (parsed.model_name, tensor.name, tensor.datatype) == ("toy_encoder", "image", "UINT8")
        assert list(tensor.shape) == [batch, HEIGHT, WIDTH, 3]
        assert parsed.raw_input_contents[0] == pixels.tobytes()
        length = int(headers["Inference-Header-Content-Length"])
        described = json.loads(body[:length])["inputs"][0]
        assert described["shape"] == [batch, HEIGHT, WIDTH, 3]
        assert body[length:] == pixels.tobytes()


def test_bytes_go_to_the_ensemble(manifest):
    pictures = [good(0), good(1), good(2)]
    requests = TritonRequests(manifest, pictures, "bytes", 2)
    assert requests.model == "toy_embed"
    parsed = service_pb2.ModelInferRequest.FromString(requests.messages()[1])
    assert (parsed.model_name, parsed.inputs[0].name, list(parsed.inputs[0].shape)) == ("toy_embed", "bytes", [2, 1])
    raw = b"".join(len(picture).to_bytes(4, "little") + picture for picture in (good(2), good(0)))
    assert parsed.raw_input_contents[0] == raw
    body, headers = requests.bodies()[1]
    assert body[int(headers["Inference-Header-Content-Length"]) :] == raw


def test_the_gateway_gets_whole_files():
    image = Image.new("RGB", (8, 8))
    files = [encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP")]
    bodies = gateway_bodies(files)
    assert [body for body, _ in bodies] == files
    assert [headers["Content-Type"] for _, headers in bodies] == ["application/octet-stream"] * 3


def test_drawn_pictures_are_photos_by_their_size():
    pictures = draw_pictures(1)
    assert len(set(pictures)) == DRAWN
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as image:
            assert (image.format, image.size) == ("JPEG", PHOTO_PX)
        assert 50_000 < len(picture) < 500_000
    assert pictures == draw_pictures(1) != draw_pictures(2)


def test_pictures_that_cannot_be_read_stay_out(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(good())
    for number, data in enumerate(refused().values()):
        (tmp_path / f"bad{number}.png").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert take_pictures(str(tmp_path), seed=0) == [good()]
    assert f"left out: {len(refused())} of {len(refused()) + 1} pictures" in caplog.text
    (tmp_path / "good.png").unlink()
    with pytest.raises(SourceError, match=r"none of \d+ pictures can be read; the first: .*bad"):
        take_pictures(str(tmp_path), seed=0)


def test_some_of_many_pictures_are_taken(tmp_path):
    for number in range(MOST + 20):
        (tmp_path / f"{number:03}.png").write_bytes(encoded(Image.new("RGB", (4, 4), (number % 256, number // 256, 0))))
    taken = take_pictures(str(tmp_path), seed=0)
    assert len(set(taken)) == MOST
    assert taken == take_pictures(str(tmp_path), seed=0) != take_pictures(str(tmp_path), seed=1)
