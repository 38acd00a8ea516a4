"""Two real servers behind one address: one is killed, stopped, replaced; no request is lost and no vector is wrong."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.repository import write_repository
from serve.encoder import open_encoder
from serve.errors import EncoderMismatch
from serve.triton_client import TritonEncoder
from serve.triton_runtime import runtime_folder
from serve.triton_server import TritonServer
from tests.bad_images import good
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.triton
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@pytest.fixture(scope="module", autouse=True)
def _runtime():
    if shutil.which("tritonserver") is None and not (runtime_folder() / "bin" / "python").is_file():
        pytest.skip(f"no tritonserver on PATH and no runtime in {runtime_folder()} (make triton-runtime)")


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


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_one_of_two_is_killed_under_load(pair, scheme, tmp_path):
    encoder = TritonEncoder(both(pair, scheme), timeout_s=10)
    pictures = [good(number) for number in range(8)]
    wanted = open_encoder(pair[0].repository).embed(pictures)
    started, times_s = time.monotonic(), []

    def ask(number):
        answers = 0
        while time.monotonic() - started < 3:
            begun = time.monotonic()
            np.testing.assert_allclose(encoder.embed_bytes([pictures[number]]), wanted[number : number + 1], atol=1e-6)
            times_s.append(time.monotonic() - begun)
            answers += 1
        return answers

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, number) for number in range(8)]
        time.sleep(1)
        os.kill(pair[0].pid, signal.SIGKILL)
        total = sum(answer.result() for answer in answers)
    print(f"{scheme}: {total} requests, p50 {1e3 * np.median(times_s):.1f} ms, p99 {1e3 * np.quantile(times_s, 0.99):.1f} ms")
    assert total > 100
    assert np.quantile(times_s, 0.99) < 1


def test_a_server_that_hangs_costs_its_share_of_the_deadline_and_no_answer(pair):
    encoder = TritonEncoder(both(pair), timeout_s=4)
    os.kill(pair[0].pid, signal.SIGSTOP)
    try:
        times_s = []
        for _ in range(6):
            begun = time.monotonic()
            assert encoder.embed_bytes([good()]).shape == (1, 8)
            times_s.append(time.monotonic() - begun)
    finally:
        os.kill(pair[0].pid, signal.SIGCONT)
    assert max(times_s) < 4
    assert sorted(times_s)[3] < 1, "it is asked seldom"


def test_a_server_that_comes_back_gets_work_again_unless_it_is_another_encoder(tmp_path):
    repository = write(tmp_path)
    ports = []
    with TritonServer(repository, **ANY_PORTS) as stays:
        with TritonServer(repository, **ANY_PORTS) as leaves:
            ports = leaves.ports
            encoder = TritonEncoder(both((stays, leaves)))
        address = {f"{kind}_port": port for kind, port in ports.items()}
        for _ in range(4):
            assert encoder.embed_bytes([good()]).shape == (1, 8)
        with TritonServer(repository, **address):
            time.sleep(5.2)
            before = encoder._servers.all[1].asked
            for _ in range(10):
                encoder.embed_bytes([good()])
            assert encoder._servers.all[1].asked > before
            assert encoder._servers.all[1].failures == 0
        with TritonServer(write(tmp_path, seed=1), **address):
            with pytest.raises(EncoderMismatch, match="this client began with"):
                TritonEncoder(both((stays, leaves)))
            wanted = open_encoder(repository).embed([good()])
            refused = 0
            for _ in range(4):  # one of two is asked
                try:
                    np.testing.assert_allclose(encoder.embed_bytes([good()]), wanted, atol=1e-6)
                except EncoderMismatch:
                    refused += 1
            assert refused > 0
