"""Two real servers behind one address: one fails in many ways; no request is lost and no vector is wrong."""

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.repository import write_repository
from serve.encoder import open_encoder
from serve.errors import EncoderMismatch, SimclrError
from serve.triton.client import TritonEncoder
from serve.triton.model_control import ModelControl
from serve.triton_server import TritonServer
from tests.bad_images import good
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.triton
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


def write(folder, seed=0):
    graph, manifest = write_toy_encoder(folder / f"source{seed}", seed=seed)
    write_repository(folder / f"repo{seed}", graph=graph, manifest=manifest, head=None, target="cpu")
    return folder / f"repo{seed}"


@pytest.fixture
def pair(tmp_path):
    repository = write(tmp_path)
    with TritonServer(repository, **ANY_PORTS) as first, TritonServer(repository, **ANY_PORTS) as second:
        yield first, second


def both(pair, scheme="grpc"):
    hosts = [server.url if scheme == "grpc" else server.http_url for server in pair]
    return f"{scheme}://" + ",".join(host.partition("://")[2] for host in hosts) + "/toy"


def killed(server):
    os.kill(server.pid, signal.SIGKILL)


def stopped(server):
    """As on SIGTERM: the ensembles go first."""
    server.stop()


def unloaded(server):
    """It answers, and is not ready."""
    for model in ("toy_embed", "toy_encoder"):
        ModelControl(server.http_url, server.key).unload(model)


def maimed(server):
    """Its encoder's stub is dead; it says of itself that it is ready."""
    lines = subprocess.run(["ps", "-wweo", "pid,pgid,args"], check=True, capture_output=True, text=True).stdout.splitlines()[1:]
    for pid, group, command in (line.split(maxsplit=2) for line in lines):
        if int(group) == server.pid and "toy_encoder/1/" in command:
            os.kill(int(pid), signal.SIGKILL)


class Load:
    """Eight clients that ask without end; what became of every request, and how long it took."""

    def __init__(self, encoder, repository):
        self.answered_s, self.lost = [], []
        self._encoder, self._stop, self._pool = encoder, threading.Event(), ThreadPoolExecutor(8)
        pictures = [good(number) for number in range(8)]
        self._pairs = list(zip(pictures, open_encoder(repository).embed(pictures), strict=True))

    def __enter__(self):
        self._clients = [self._pool.submit(self._ask, *pair) for pair in self._pairs]
        return self

    def __exit__(self, *_):
        self._stop.set()
        for client in self._clients:
            client.result(30)
        self._pool.shutdown()

    def _ask(self, picture, wanted):
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                (vector,) = self._encoder.embed_bytes([picture])
                np.testing.assert_allclose(vector, wanted, atol=1e-6)
            except (SimclrError, AssertionError) as error:
                self.lost.append(error)
            self.answered_s.append(time.monotonic() - begun)


@pytest.mark.parametrize(
    ("fault", "scheme"), [(killed, "http"), *((fault, "grpc") for fault in (killed, stopped, unloaded, maimed))]
)
def test_one_of_two_fails_under_load_and_no_request_is_lost(pair, fault, scheme):
    with Load(TritonEncoder(both(pair, scheme), timeout_s=10), pair[0].repository) as load:
        time.sleep(1)
        before = len(load.answered_s)
        fault(pair[0])
        time.sleep(2)
    p50, p99, most = (1e3 * np.quantile(load.answered_s, share) for share in (0.5, 0.99, 1))
    print(f"{fault.__name__} ({scheme}): {len(load.answered_s)} requests, p50 {p50:.1f}, p99 {p99:.1f}, longest {most:.1f} ms")
    assert load.lost == []
    assert 50 < before < len(load.answered_s) - 50
    assert p99 < 1000


def test_a_server_that_hangs_costs_one_request_its_share_of_the_deadline(pair):
    encoder = TritonEncoder(both(pair), timeout_s=4)
    os.kill(pair[0].pid, signal.SIGSTOP)
    times_s, started = [], time.monotonic()
    try:
        while time.monotonic() - started < 6:  # it is probed meanwhile, more than once
            begun = time.monotonic()
            assert encoder.embed_bytes([good()]).shape == (1, 8)
            times_s.append(time.monotonic() - begun)
            time.sleep(0.02)
    finally:
        os.kill(pair[0].pid, signal.SIGCONT)
    assert [round(took_s) for took_s in times_s if took_s > 1] == [2]
    assert gets_work(encoder, 0)


def gets_work(encoder, number, within_s=15.0):
    """Whether one of the servers is asked again."""
    endpoint, deadline = encoder._servers.all[number], time.monotonic() + within_s
    turn = endpoint.turn
    while time.monotonic() < deadline and endpoint.turn == turn:
        encoder.embed_bytes([good()])
        time.sleep(0.05)
    return endpoint.turn > turn and not endpoint.rests


def test_a_server_that_comes_back_gets_work_again_unless_it_is_another_encoder(tmp_path):
    repository = write(tmp_path)
    wanted = open_encoder(repository).embed([good()])
    with TritonServer(repository, **ANY_PORTS) as stays:
        with TritonServer(repository, **ANY_PORTS) as leaves:
            encoder = TritonEncoder(both((stays, leaves)))
        address = {f"{kind}_port": port for kind, port in leaves.ports.items()}
        for _ in range(4):
            np.testing.assert_allclose(encoder.embed_bytes([good()]), wanted, atol=1e-6)
        with TritonServer(repository, **address):
            assert gets_work(encoder, 1)
        with TritonServer(write(tmp_path, seed=1), **address):
            with pytest.raises(EncoderMismatch, match="this client began with"):
                TritonEncoder(both((stays, leaves)))
            for _ in range(60):  # it answers every probe, with the wrong name
                np.testing.assert_allclose(encoder.embed_bytes([good()]), wanted, atol=1e-6)
                time.sleep(0.05)
            stays.stop()
            with pytest.raises(EncoderMismatch, match="this client began with"):
                encoder.embed_bytes([good()])
