"""`simclr bench serve` on a small gateway: what it prints and writes, Ctrl-C, and everything that it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import cli
from serve.ports import free_port
from tests.bad_images import good

ROOT = Path(__file__).parents[2]
METRICS = """# TYPE nv_inference_{name} counter
nv_inference_{name}{{model="toy_encoder",version="1"}} {value}
"""


@pytest.fixture(scope="module")
def gateway():
    """Its address, and its state: statuses to answer in turn (then 200), types it was sent, pages of metrics it gave."""
    state = {"statuses": [], "types": [], "pages": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            state["pages"] += 1
            values = dict.fromkeys(("request_success", "count", "queue_duration_us"), 100 * state["pages"])
            values["exec_count"] = 25 * state["pages"]
            self.answer(200, "".join(METRICS.format(name=name, value=value) for name, value in values.items()))

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            state["types"].append(self.headers["Content-Type"])
            status = state["statuses"].pop(0) if state["statuses"] else 200
            self.answer(status, '{"encoder_id": "x", "embeddings": [[1.0]]}' if status == 200 else '{"title": "busy"}')

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", state
    server.shutdown()
    server.server_close()


@pytest.fixture
def bench(capsys):
    """Runs `simclr bench serve`; returns exit code, stdout and stderr."""

    def run(*words):
        code = 0
        try:
            cli.main(["bench", "serve", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_closed_loop_through_the_gateway(bench, gateway, tmp_path):
    url, state = gateway
    state["statuses"][:] = [200] + [200, 429] * 10  # the first is the probe
    options = [
        "--clients",
        4,
        "--seconds",
        1,
        "--warmup-s",
        0,
        "--metrics-url",
        f"{url}/metrics",
        "--out",
        tmp_path / "new" / "out",
    ]
    code, out, err = bench(f"{url}/v1/embed", *options)
    assert code == 0
    assert "measuring" in err
    first, *rest = out.splitlines()
    assert first == f"{url}/v1/embed: closed loop, 4 clients, bytes, batch 1, 1 s after 0 s of warm-up"
    assert 'shed                  10 requests, the first: 429 {"title": "busy"}' in rest
    assert re.search(r"^toy_encoder +100 +4\.00 +0\.00", out, re.MULTILINE)
    report = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    assert report["errors"]["shed"] == 10
    assert report["answered"] == report["requests"] - 10 > 10
    assert report["images_per_s"] == pytest.approx(report["answered"], abs=4)
    assert report["triton"]["toy_encoder"]["mean_batch"] == 4
    assert set(state["types"]) == {"application/octet-stream"}
    with Image.open(tmp_path / "new" / "out" / "load.png") as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["load.png", "report.json"]


def test_an_open_loop_prints_json(bench, gateway, tmp_path):
    url, state = gateway
    (tmp_path / "a.png").write_bytes(good())
    state["types"].clear()
    options = ["--rate", 100, "--seconds", 1, "--warmup-s", 0.3, "--images", tmp_path, "--json", "--seed", 5]
    code, out, _ = bench(f"{url}/v1/embed", *options)
    report = json.loads(out)
    assert code == 0
    assert 60 < report["requests"] < 140
    assert report["requests"] == report["answered"]
    assert (report["asked"]["rate"], report["asked"]["seed"], report["sends"]) == (100, 5, "bytes")
    assert report["late_ms"]["max"] > 0
    assert report["unsent"] == 0
    assert report["encoder_id"] is None
    assert report["metrics_url"] == "http://127.0.0.1:8002/metrics"
    assert set(state["types"]) == {"application/octet-stream"}


@pytest.mark.parametrize("in_warm_up", [False, True])
def test_ctrl_c_still_reports_what_was_measured(gateway, tmp_path, in_warm_up):
    url, _ = gateway
    words = [f"{url}/v1/embed", "--rate", "50", "--seconds", "60", "--out", str(tmp_path)]
    words += ["--warmup-s", "60" if in_warm_up else "0"]
    command = [sys.executable, "-c", "import sys, cli; cli.main(sys.argv[1:])", "bench", "serve", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        progress = ""
        while not re.search(r"[1-9]\d* requests", progress):
            progress += process.stderr.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    last = err.strip().replace("\r", "\n").splitlines()[-1]
    if in_warm_up:
        assert (out, last) == ("", "simclr: stopped while it warmed up; nothing was measured")
        return
    assert re.fullmatch(r"simclr: stopped after \d\.\d of 60 s; the report is of these", last)
    assert "(stopped early)" in out.splitlines()[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stopped"]
    assert report["answered"] == report["requests"] > 10
    assert report["requests"] / report["seconds"] == pytest.approx(50, rel=0.6)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--clients", 2, "--rate", 5], "--clients (closed loop) and --rate (open loop) exclude each other"),
        (["--clients", 0], "--clients is 0, wanted at least 1"),
        (["--rate", 0], "--rate is 0.0, wanted at least 0.001"),
        (["--rate", "nan"], "--rate is nan"),
        (["--rate", "inf"], "--rate is inf"),
        (["--batch", -1], "--batch is -1"),
        (["--seconds", 0], "--seconds is 0.0, wanted at least 0.1"),
        (["--warmup-s", -1], "--warmup-s is -1.0"),
        (["--timeout-s", 0], "--timeout-s is 0.0"),
        (["--seed", -1], "--seed is -1"),
        (["--metrics-url", "localhost:8002"], "--metrics-url is 'localhost:8002', wanted http://"),
        (["--send", "pixels"], "the gateway takes one encoded picture a request"),
        (["--batch", 2], "the gateway takes one encoded picture a request"),
    ],
)
def test_options_that_make_no_sense(bench, words, complaint):
    code, out, err = bench("http://127.0.0.1:1/v1/embed", *words)
    assert (code, out) == (2, "")
    assert err.startswith("simclr: ")
    assert complaint in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1:{port}/v1/embed", "the first request failed (no connection: "),
        ("grpc://127.0.0.1:{port}/toy", "no Triton server answers"),
        ("http://127.0.0.1:{port}/toy", "no Triton server answers"),
        ("grpc://127.0.0.1:{port},127.0.0.1:1/toy", "measure one at a time"),
        ("grpc://127.0.0.1:{port}/a/b", "not the address of an encoder"),
    ],
)
def test_nobody_to_measure_is_one_line(bench, tmp_path, url, complaint):
    code, out, err = bench(url.format(port=free_port()), "--timeout-s", 2, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith("simclr: ")
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:8001/toy", "https://127.0.0.1:8000/toy", "127.0.0.1:8001", ""])
def test_addresses_that_are_none(bench, url):
    code, out, err = bench(url)
    assert (code, out) == (2, "")
    assert err == f"simclr: {url}: wanted grpc://host:8001/NAME, http://host:8000/NAME or http://host:port/v1/embed\n"


def test_a_server_that_refuses_the_first_request_is_not_measured(bench, gateway):
    url, state = gateway
    state["statuses"][:] = [422]
    code, out, err = bench(f"{url}/v1/embed")
    assert (code, out) == (1, "")
    assert 'the first request failed (bad request: 422 {"title": "busy"}); nothing was measured' in err


def test_metrics_that_were_asked_for_must_be_there(bench, gateway):
    url, _ = gateway
    code, _, err = bench(f"{url}/v1/embed", "--metrics-url", f"http://127.0.0.1:{free_port()}/metrics")
    assert code == 1
    assert "no metrics of a Triton server there; correct --metrics-url or leave it out" in err


def test_a_file_in_the_place_of_the_folder_is_told_before_the_measurement(bench, gateway, tmp_path):
    url, _ = gateway
    (tmp_path / "file").write_text("")
    began_s = time.monotonic()
    code, _, err = bench(f"{url}/v1/embed", "--seconds", 30, "--out", tmp_path / "file")
    assert code == 1
    assert "file" in err
    assert time.monotonic() - began_s < 10
