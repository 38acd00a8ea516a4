"""The client against servers that are absent, silent, rude or not ours; the real server is in tests/slow."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve.contract import METADATA_KEY
from serve.encoder import open_encoder
from serve.errors import ContractError, EncoderUnavailable, SimclrError
from serve.ports import free_port
from serve.triton.client import TritonEncoder
from serve.triton.endpoints import WAITS_S
from tests.toy_encoder import write_toy_encoder


class RudeServer:
    """Accepts connections; closes them at once, or keeps them and never says a word."""

    def __init__(self, *, silent):
        self.silent, self.connections = silent, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            if not self.silent:
                connection.close()


@pytest.fixture
def rude():
    servers = []

    def make(**options):
        servers.append(RudeServer(**options))
        return servers[-1]

    yield make
    for server in servers:
        server.listener.close()
        for connection in server.connections:
            connection.close()


@pytest.fixture
def fake_triton():
    """An HTTP server that answers from a dictionary path -> (status, JSON), or a list of these to be used in turn."""
    answers, seen = {}, []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            seen.append(self.path)
            answer = answers.get(self.path, (404, {"error": "Request for unknown model: 'x_encoder' is not found"}))
            status, body = answer.pop(0) if isinstance(answer, list) else answer
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers, seen
    server.shutdown()
    server.server_close()


@pytest.fixture
def page():
    """An HTTP server that knows nothing but one page; and the statuses that it will show it with, in turn."""
    statuses = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = b"<html>It works!</html>"
            self.send_response(statuses.pop(0))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", statuses
    server.shutdown()
    server.server_close()


def config(tmp_path):
    _, manifest = write_toy_encoder(tmp_path)
    return {"max_batch_size": 32, "parameters": {METADATA_KEY: {"string_value": manifest.model_dump_json()}}}


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_nobody_listens(scheme):
    url = f"{scheme}://127.0.0.1:{free_port()}/toy"
    started = time.monotonic()
    with pytest.raises(EncoderUnavailable, match=r"refused.*simclr triton") as caught:
        open_encoder(url)
    assert str(caught.value).startswith(url)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_silent_server_costs_one_timeout_not_three(scheme, rude):
    server = rude(silent=True)
    started = time.monotonic()
    with pytest.raises(EncoderUnavailable, match=r"no answer within 0.5 s"):
        TritonEncoder(f"{scheme}://127.0.0.1:{server.port}/toy", timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < 3


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_hangs_up(scheme, rude):
    server = rude(silent=False)
    with pytest.raises(EncoderUnavailable, match="no Triton server answers"):
        TritonEncoder(f"{scheme}://127.0.0.1:{server.port}/toy", timeout_s=2)


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_server_that_is_no_triton(page, status):
    url, statuses = page
    statuses += [status]
    with pytest.raises(SimclrError, match=f"{url}.*(none of a Triton server's|HTTP status {status})") as caught:
        TritonEncoder(f"{url}/toy")
    assert "\n" not in str(caught.value)


def test_a_proxy_whose_server_is_away_is_asked_again(page):
    url, statuses = page
    statuses += [502, 503, 504]
    with pytest.raises(EncoderUnavailable, match="HTTP status 504"):
        TritonEncoder(f"{url}/toy")
    assert statuses == []


def test_a_host_that_does_not_exist():
    for scheme in ("grpc", "http"):
        with pytest.raises(EncoderUnavailable, match="no Triton server answers"):
            TritonEncoder(f"{scheme}://no-such-host.invalid:8000/toy", timeout_s=2)


def test_a_server_that_is_still_starting_is_asked_again(fake_triton, tmp_path):
    url, answers, seen = fake_triton
    answers["/v2/models/toy_encoder/config"] = [
        (503, {"error": "not ready"}),
        (503, {"error": "not ready"}),
        (200, config(tmp_path)),
    ]
    assert TritonEncoder(f"{url}/toy").manifest.name == "toy"
    assert len(seen) == len(WAITS_S) == 3


def test_a_server_that_stays_unavailable_is_given_up(fake_triton):
    url, answers, seen = fake_triton
    answers["/v2/models/toy_encoder/config"] = (503, {"error": "draining"})
    with pytest.raises(EncoderUnavailable, match="draining"):
        TritonEncoder(f"{url}/toy")
    assert len(seen) == len(WAITS_S)


def test_a_model_that_is_not_there(fake_triton):
    url, _, seen = fake_triton
    with pytest.raises(ContractError, match="unknown model"):
        TritonEncoder(f"{url}/x")
    assert len(seen) == 1, "asking again would not help"


@pytest.mark.parametrize(
    ("parameters", "reason"), [({}, "carries no manifest"), ({METADATA_KEY: {"string_value": "{}"}}, "not a valid manifest")]
)
def test_a_model_that_is_not_ours(fake_triton, parameters, reason):
    url, answers, _ = fake_triton
    answers["/v2/models/toy_encoder/config"] = (200, {"max_batch_size": 8, "parameters": parameters})
    with pytest.raises(ContractError, match=reason):
        TritonEncoder(f"{url}/toy")


@pytest.mark.parametrize(("names", "found"), [([], "none"), (["a_encoder", "b_encoder", "a_embed"], "a, b")])
def test_the_name_may_be_left_out_only_if_it_is_clear(fake_triton, tmp_path, names, found):
    url, answers, _ = fake_triton
    answers["/v2/models/stats"] = (200, {"model_stats": [{"name": name} for name in names]})
    with pytest.raises(ContractError, match=f"the server has {found}"):
        TritonEncoder(url)
    names = ("toy_encoder", "toy_embed", "something")
    answers["/v2/models/stats"] = (200, {"model_stats": [{"name": name} for name in names]})
    answers["/v2/models/toy_encoder/config"] = (200, config(tmp_path))
    assert TritonEncoder(url).manifest.name == "toy"


@pytest.mark.parametrize(
    "url", ["grpc://", "grpc:///toy", "http://host:port/toy", "grpc://host:8001/a/b", "http://host/a?b=c", "ftp://h/a"]
)
def test_addresses_that_make_no_sense(url):
    with pytest.raises(ContractError, match="not the address of an encoder"):
        TritonEncoder(url)
