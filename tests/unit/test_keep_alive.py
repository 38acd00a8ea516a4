"""Connections that are kept, and deadlines that hold, against servers that are slow, rude or gone."""

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serve.triton.keep_alive import KeepAlive

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Say: so\r\n\r\nhi"


def soon(seconds=5.0):
    return time.monotonic() + seconds


@pytest.fixture
def scripted():
    """A server that treats its connections as its functions say, one after the other; each gets the connection."""
    listeners = []

    def serve(*scripts):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run():
            for script in scripts:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the test is over
                    return
                with connection:
                    connection.settimeout(5)
                    try:
                        script(connection)
                    except OSError:  # the client has had enough
                        continue

        threading.Thread(target=run, daemon=True).start()
        return KeepAlive(f"127.0.0.1:{listener.getsockname()[1]}")

    yield serve
    for listener in listeners:
        listener.close()


def answer(connection, data=ANSWER):
    connection.recv(65536)
    connection.sendall(data)


def drip(connection, data=ANSWER):
    connection.recv(65536)
    for byte in data:
        time.sleep(0.1)
        connection.sendall(bytes([byte]))


@pytest.fixture
def echo():
    """A real HTTP server that sends bodies back, and counts its connections."""
    connections = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            connections.append(self.client_address)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Path", self.path)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield KeepAlive(f"127.0.0.1:{server.server_port}"), connections
    server.shutdown()
    server.server_close()


def test_what_is_sent_comes_back_over_one_connection(echo):
    server, connections = echo
    for body in (b"", b"a", os.urandom(5_000_000)):
        found = server.ask("POST", "/there", soon(), body, {"X-More": "1"})
        assert (found.status, found.headers["X-Path"], found.body) == (200, "/there", body)
    assert len(connections) == 1


def test_threads_share_no_connection_at_the_same_time(echo):
    server, connections = echo
    bodies = [os.urandom(100_000) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda body: server.ask("POST", "/", soon(), body).body, bodies))
    assert found == bodies
    assert len(connections) <= 8


def test_threads_that_end_leave_nothing_behind(echo):
    server, _ = echo

    def once():
        for _ in range(20):
            thread = threading.Thread(target=server.ask, args=("POST", "/", soon()))
            thread.start()
            thread.join()
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts what Linux shows in /proc")
    once()
    assert once() == once()


@pytest.mark.parametrize("script", [drip, lambda connection: time.sleep(3)], ids=["drips", "silent"])
def test_the_deadline_holds_for_the_whole_request(scripted, script):
    server = scripted(script)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        server.ask("GET", "/", soon(0.5))
    assert 0.4 < time.monotonic() - started < 2


def test_a_server_that_does_not_read_costs_the_deadline(scripted):
    server = scripted(lambda connection: time.sleep(3))
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        server.ask("POST", "/", soon(0.5), bytes(50_000_000))
    assert time.monotonic() - started < 2


def test_an_instant_that_is_past_is_not_waited_for(scripted):
    with pytest.raises(TimeoutError):
        scripted(answer).ask("GET", "/", soon(-1))


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        KeepAlive(f"127.0.0.1:{port}").ask("GET", "/", soon())


def test_a_connection_that_the_server_has_closed_is_not_used_again(scripted):
    server = scripted(answer, answer)
    assert server.ask("GET", "/", soon()).body == b"hi"
    time.sleep(0.1)
    assert server.ask("GET", "/", soon()).body == b"hi"


def test_a_connection_with_words_that_nobody_asked_for_is_not_used_again(scripted):
    """A client that took them for the next answer would be one answer behind for ever."""

    def twice(connection):
        answer(connection)
        time.sleep(0.1)
        connection.sendall(ANSWER.replace(b"hi", b"no"))
        time.sleep(1)

    server = scripted(twice, answer)
    assert server.ask("GET", "/", soon()).body == b"hi"
    time.sleep(0.2)
    assert server.ask("GET", "/", soon()).body == b"hi"


NO_ANSWERS = {
    "nothing": b"",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "half a head": ANSWER[:20],
    "half a body": ANSWER[:-1],
    "no length": ANSWER.replace(b"Content-Length: 2\r\n", b""),
    "half a chunk": ANSWER.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").replace(b"hi", b"9\r\nhi"),
}


@pytest.mark.parametrize("data", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_may_not_be_the_whole_answer_is_none(scripted, data):
    with pytest.raises((HTTPException, OSError)):
        scripted(lambda connection: answer(connection, data)).ask("GET", "/", soon())


def test_a_server_that_says_goodbye_is_believed(scripted):
    goodbye = ANSWER.replace(b"X-Say: so", b"Connection: close")
    server = scripted(lambda connection: (answer(connection, goodbye), time.sleep(0.5)), answer)
    assert [server.ask("GET", "/", soon()).body for _ in range(2)] == [b"hi"] * 2
