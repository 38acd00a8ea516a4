"""A server that may be left alone: closed where it can be changed, restarted when it fails, polite when it is stopped."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from export.repository import write_repository
from serve.encoder import open_encoder
from serve.errors import TritonStartError
from serve.preprocess import ImageError
from serve.triton import supervisor
from serve.triton.client import TritonEncoder
from serve.triton.model_control import KEY_VARIABLE
from serve.triton.supervisor import canary_fault, supervise
from serve.triton_server import TritonServer
from tests.bad_images import accepted, good, refused
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.triton
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
ADMINISTRATION = [
    "repository/index",
    "repository/models/toy_encoder/load",
    "repository/models/toy_encoder/unload",
    "systemsharedmemory/unregister",
    "cudasharedmemory/unregister",
    "trace/setting",
    "logging",
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    graph, manifest = write_toy_encoder(folder / "source")
    write_repository(folder / "repo", graph=graph, manifest=manifest, head=None, target="cpu")
    return folder / "repo"


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(repository, **ANY_PORTS) as running:
        yield running


def status(server, path, key=None):
    headers = {"simclr-key": key} if key else {}
    request = urllib.request.Request(f"{server.http_url}/v2/{path}", data=b"{}", headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ADMINISTRATION)
def test_what_changes_the_server_needs_the_key(server, path):
    assert status(server, path) == status(server, path, "wrong") == 403


def test_the_key_opens_it_and_asking_for_vectors_needs_none(server):
    assert status(server, "repository/index", server.key) == 200
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}")
    with pytest.raises(InferenceServerException, match="restricted"):
        client.get_model_repository_index()
    with pytest.raises(InferenceServerException, match="restricted"):
        client.unload_model("toy_encoder")
    assert client.get_model_repository_index({"triton-grpc-protocol-simclr-key": server.key}).models
    for url in (server.url, server.http_url):
        assert TritonEncoder(url).embed_bytes([good()]).shape == (1, 8)


def test_the_key_comes_from_the_environment(monkeypatch, repository):
    monkeypatch.setenv(KEY_VARIABLE, "operator's")
    assert TritonServer(repository).key == "operator's"
    monkeypatch.delenv(KEY_VARIABLE)
    assert TritonServer(repository).key != TritonServer(repository).key


def test_it_listens_on_this_machine_alone(server):
    ports = {f"{port:04X}" for port in server.ports.values()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = {line[1] for line in lines if line[3] == "0A" and line[1].rpartition(":")[2] in ports}
    assert {address.rpartition(":")[0][-8:] for address in listening} == {"0100007F"}
    assert len(listening) == 3


def test_bad_images_among_good_ones_hurt_nobody(server):
    """Each in a request of its own, all at once, so that they share batches; then many large ones, with memory in view."""
    bad, unusual = refused(), accepted()
    encoder = TritonEncoder(server.url, timeout_s=60)
    wanted = open_encoder(server.repository).embed([good(number) for number in range(40)])

    def ask(data):
        try:
            return encoder.embed_bytes([data])[0]
        except ImageError as error:
            return error

    names = [*bad, *unusual]
    pictures = [data for number, name in enumerate(names) for data in (good(number), (bad | unusual)[name])]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, pictures))
    np.testing.assert_allclose(np.stack(answers[::2]), wanted[: len(names)], atol=1e-6)
    for name, answer in zip(names, answers[1::2], strict=True):
        assert isinstance(answer, ImageError) == (name in bad), name
    before = memory_mb(server)
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(buffer, "PNG")
    with ThreadPoolExecutor(16) as pool:
        assert all(answer.shape == (8,) for answer in pool.map(ask, [buffer.getvalue()] * 32))
    workers = os.cpu_count() or 1
    assert memory_mb(server) - before < 75 * 3 * workers + 200, "32 pictures of 75 MB, never all of them at once"
    assert ask(good(3)) == pytest.approx(wanted[3], abs=1e-6)


def memory_mb(server):
    """The most that the server's processes have held in memory at once, each for itself."""
    peaks = [re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in processes(server)]
    return sum(int(peak[1]) for peak in peaks if peak) / 1024


def processes(server, name=""):
    """Ids of the server and its stubs whose command line holds `name`."""
    lines = subprocess.run(["ps", "-wweo", "pid,pgid,args"], check=True, capture_output=True, text=True).stdout.splitlines()[1:]
    fields = [line.split(maxsplit=2) for line in lines]
    return [int(pid) for pid, group, command in fields if int(group) == server.pid and name in command]


@pytest.fixture
def supervised(repository, monkeypatch):
    """A server of its own with a quick supervisor; what it raises is kept. The server is started by the supervising thread."""
    monkeypatch.setattr(supervisor, "CANARY_TIMEOUT_S", 5.0)
    server, up, raised = TritonServer(repository, **ANY_PORTS), threading.Event(), []

    def run():
        with server:
            up.set()
            try:
                supervise(server, period_s=0.3)
            except Exception as error:
                raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert up.wait(30)
    yield server, raised
    monkeypatch.setattr(supervisor, "RESTARTS", 0)
    for pid in processes(server):
        os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive()


def answers_again(server, within_s=30.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if canary_fault(server, "toy") is None:
            return True
        time.sleep(0.2)
    return False


def test_a_dead_stub_behind_a_healthy_server_is_noticed_and_replaced(supervised, capfd):
    server, raised = supervised
    for stub in ("toy_preprocess", "toy_encoder"):
        former = server.pid
        (victim,) = processes(server, f"{stub}/1/")
        os.kill(victim, signal.SIGKILL)
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=5) as response:
            assert response.status == 200, "the server itself sees nothing"
        deadline = time.monotonic() + 20
        while server.pid in (former, None) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.pid not in (former, None)
        assert answers_again(server)
    assert raised == []
    assert len(re.findall(r"restarted: .*is not healthy", capfd.readouterr().err)) == 2


def test_a_dead_server_is_started_again_but_not_for_ever(supervised, monkeypatch):
    server, raised = supervised
    os.kill(server.pid, signal.SIGKILL)
    assert answers_again(server)
    monkeypatch.setattr(supervisor, "RESTARTS", 1)
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not raised and time.monotonic() < deadline:
        time.sleep(0.1)
    assert isinstance(raised[0], TritonStartError)
    assert "failed 2 times" in str(raised[0])


def test_load_is_no_reason_to_restart(supervised):
    server, raised = supervised
    encoder, former, stop = TritonEncoder(server.url), server.pid, time.monotonic() + 4

    def hammer(number):
        while time.monotonic() < stop:
            encoder.embed_bytes([good(number)] * 32)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8)))
    assert server.pid == former
    assert raised == []


def test_sigterm_lets_it_finish_what_it_has_begun(repository):
    """A picture that takes a second to decode is under way when the operator stops the server."""
    program = "import sys; from cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "triton", "--repository", str(repository)]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"grpc://\S+", process.stdout.readline())[0]
        encoder = TritonEncoder(f"{url}/toy", timeout_s=30)
        buffer = io.BytesIO()
        Image.new("RGB", (7900, 7900)).save(buffer, "PNG")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(encoder.embed_bytes, [buffer.getvalue()])
            time.sleep(0.4)
            assert not answer.done()
            process.send_signal(signal.SIGTERM)
            assert answer.result(30).shape == (1, 8)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
