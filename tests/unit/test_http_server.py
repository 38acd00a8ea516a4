"""The gateway as a process of its own, at the wire: connections that go on after a refusal, and the end."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serve.errors import SimclrError
from serve.gateway.http_server import _listen, serve_api
from tests.bad_images import good

ROOT = Path(__file__).parents[2]
PNG = {"Content-Type": "image/png"}
PROGRAM = """
import sys, time
from pathlib import Path
from serve.api import create_api
from serve.encoder import OnnxEncoder
from serve.gateway.http_server import serve_api
from serve.gateway.limits import Limits
from tests.toy_encoder import write_toy_encoder

folder = Path(sys.argv[1])

class Door:
    def __init__(self):
        self.encoder = OnnxEncoder(write_toy_encoder(folder)[0])
        self.manifest, self.encoder_id = self.encoder.manifest, self.encoder.encoder_id

    def embed(self, images):
        while not (folder / "open").exists():
            time.sleep(0.002)
        return self.encoder.embed(images)

serve_api(create_api(Door(), limits=Limits(at_once=1, waiting=0)), port=0)
"""


class Gateway:
    """One place; its encoder works while the file `open` is there."""

    def __init__(self, folder):
        self._open = folder / "open"
        self._open.touch()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.line = self.process.stdout.readline().decode()
        self.port = int(self.line.split(":")[-1].split()[0])

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def opens(self):
        self._open.touch()

    def occupy(self):
        """Take the one place, for as long as the encoder is shut; returns what will hold the answer."""
        self._open.unlink()
        statuses = []

        def ask():
            connection = self.connect()
            statuses.append(self.post(connection, good()).status)
            connection.close()

        thread = threading.Thread(target=ask)
        thread.start()
        while b"simclr_requests_in_flight 1.0" not in self.get("/metrics"):
            time.sleep(0.005)
        return thread, statuses

    def get(self, path):
        connection = self.connect()
        connection.request("GET", path)
        found = connection.getresponse().read()
        connection.close()
        return found

    @staticmethod
    def post(connection, body, **headers):
        connection.request("POST", "/v1/embed", body, {**PNG, **headers})
        answer = connection.getresponse()
        answer.read()
        return answer


@pytest.fixture
def gateway(tmp_path):
    running = Gateway(tmp_path)
    yield running
    running.process.kill()
    running.process.communicate()


def test_a_connection_goes_on_after_small_bodies_that_were_refused(gateway):
    thread, statuses = gateway.occupy()
    connection = gateway.connect()
    for size in (10, 300_000, 1_000_000):
        answer = gateway.post(connection, b"x" * size)
        assert (answer.status, answer.getheader("Connection"), answer.getheader("Retry-After")) == (429, None, "1")
        kept = connection.sock
        assert kept is not None
    gateway.opens()
    thread.join()
    assert statuses == [200]
    assert gateway.post(connection, good()).status == 200
    assert connection.sock is kept


@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_a_large_body_reads_the_refusal_and_is_hung_up_on(gateway, chunked):
    connection = gateway.connect()
    body = iter([b"x" * 1_000_000] * 25) if chunked else b"x" * 25_000_000
    answer = gateway.post(connection, body)
    assert (answer.status, answer.getheader("Connection")) == (413, "close")
    assert gateway.post(gateway.connect(), good()).status == 200


def test_who_asks_before_sending_does_not_send(gateway):
    """curl does, with `Expect: 100-continue`, for what is larger than a megabyte."""
    thread, _ = gateway.occupy()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as wire:
        wire.sendall(
            b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert wire.recv(100).startswith(b"HTTP/1.1 429 ")
    gateway.opens()
    thread.join()


def test_memory_holds_as_many_bodies_as_there_are_places(gateway):
    def peak_mb():
        status = Path(f"/proc/{gateway.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    body, statuses = b"x" * 15_000_000, []

    def ask():
        statuses.append(gateway.post(gateway.connect(), body).status)

    gateway.get("/v1/info")
    before = peak_mb()
    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {422, 429}
    assert peak_mb() - before < 100, "20 bodies are 300 MB"


def test_sigterm_answers_what_is_under_way_and_takes_no_more(gateway):
    thread, statuses = gateway.occupy()
    gateway.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while True:
        try:
            gateway.get("/health/live")
        except OSError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert gateway.process.poll() is None
    gateway.opens()
    thread.join()
    assert statuses == [200]
    out, err = gateway.process.communicate(timeout=20)
    assert (gateway.process.returncode, out, err) == (0, b"", b"")
    assert gateway.line == f"the API is at http://127.0.0.1:{gateway.port} (Ctrl-C ends it)\n"


def test_answers_are_sent_at_once():
    """Else the second small piece of an answer waits for the client to confirm the first: 40 ms."""
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as ours:
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_busy_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SimclrError, match=f"port {port} is busy or not allowed .*--port") as caught:
            serve_api(None, port=port)
    assert "\n" not in str(caught.value)
