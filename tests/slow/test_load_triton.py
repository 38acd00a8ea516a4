"""The load generator on the real server: every road, what Triton counted, and a server that dies meanwhile."""

import json
import os
import signal
import threading
import urllib.request

import pytest

import cli
from export.repository import write_repository
from serve.loadtest.bench import bench_serve
from serve.loadtest.config import LoadConfig
from serve.triton_server import TritonServer
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.triton
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    graph, manifest = write_toy_encoder(tmp_path_factory.mktemp("source"))
    folder = tmp_path_factory.mktemp("served") / "repo"
    write_repository(folder, graph=graph, manifest=manifest, head=None, target="cpu")
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(repository, **ANY_PORTS) as running:
        yield running


def counted(server, model):
    """Pictures and executions, by Triton's own statistics rather than its metrics."""
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/stats", timeout=5) as response:
        found = json.load(response)["model_stats"][0]
    return found["inference_count"], found["execution_count"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("send", ["pixels", "bytes"])
@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_every_road_is_answered_and_its_batches_are_tritons(server, scheme, send, batch):
    url = (server.url if scheme == "grpc" else server.http_url) + "/toy"
    before = counted(server, "toy_encoder")
    options = {"clients": 4, "batch": batch, "send": send, "seconds": 1, "warmup_s": 0, "timeout_s": 10}
    report = bench_serve(LoadConfig(url=url, metrics_url=server.metrics_url, **options))
    pictures, executions = (now - then for now, then in zip(counted(server, "toy_encoder"), before, strict=True))
    assert report.answered == report.requests > 4
    assert report.errors == dict.fromkeys(report.errors, 0)
    assert pictures == batch * (report.requests + 1), "and the one beforehand"
    found = report.triton["toy_encoder"]
    assert report.requests - 5 <= found.requests <= report.requests, "those after the first reading"
    assert found.mean_batch == pytest.approx(pictures / executions, rel=0.25)
    assert ("toy_embed" in report.triton) is (send == "bytes")
    assert 0 < found.compute_ms < report.latency_ms["max"]
    assert report.encoder_id is not None


def test_an_open_loop_through_the_command_line(server, capsys, tmp_path):
    words = ["--rate", "60", "--seconds", "3", "--warmup-s", "1", "--metrics-url", server.metrics_url]
    cli.main(["bench", "serve", f"{server.url}/toy", *words, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "open loop, 60 requests/s, pixels, batch 1, 3 s after 1 s of warm-up" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert 130 < report["requests"] == report["answered"] < 230
    assert report["requests_per_s"] == pytest.approx(60, rel=0.3)
    assert (tmp_path / "load.png").stat().st_size > 10_000


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_is_killed_meanwhile_is_counted_as_no_connection(repository, scheme):
    with TritonServer(repository, **ANY_PORTS) as server:
        url = (server.url if scheme == "grpc" else server.http_url) + "/toy"
        threading.Timer(3, os.kill, (server.pid, signal.SIGKILL)).start()
        report = bench_serve(LoadConfig(url=url, rate=50, seconds=6, warmup_s=0, timeout_s=5))
    assert report.answered > 50
    assert report.errors["no_connection"] > 50
    assert report.answered + sum(report.errors.values()) == report.requests
    assert report.per_interval["no_connection"][-1] > 0 == report.per_interval["answered"][-1]
    assert report.triton is None


def test_what_the_server_refuses_is_one_line(server, capsys):
    for words, reason in (
        (["--batch", "33"], "batch-size must be <= 32"),
        (["--images", "nowhere"], "nowhere: no such file or folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "serve", f"{server.url}/toy", *words])
        assert stop.value.code == 1
        err = capsys.readouterr().err
        assert reason in err
        assert len(err.splitlines()) == 1
