"""Starting a server: every reason why it cannot be done, and a fake tritonserver on PATH; the real one is in tests/slow."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import serve.triton.runtime as runtime
import serve.triton_server as triton
from serve.errors import TritonStartError
from serve.triton.supervisor import RESTARTS, supervise
from serve.triton_server import TritonServer

ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "repo" / "toy_encoder").mkdir(parents=True)
    (tmp_path / "repo" / "toy_encoder" / "config.pbtxt").write_text("")
    return tmp_path / "repo"


@pytest.fixture
def fake_tritonserver(tmp_path, monkeypatch):
    """Puts a Python script named tritonserver first on PATH, and scratch folders under tmp_path."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def write(script):
        (tmp_path / "tritonserver").write_text(f"#!{sys.executable}\n{script}")
        (tmp_path / "tritonserver").chmod(0o755)

    return write


SERVES = """
import http.server, signal, sys
from pathlib import Path
{extra}
port = next(int(word.split("=")[1]) for word in sys.argv if word.startswith("--http-port"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def scratch(tmp_path):
    return list(tmp_path.glob("simclr-triton-*"))


def gone(pid, within_s=5.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "make", [lambda folder: None, lambda folder: folder.mkdir(), lambda folder: (folder / "cats").mkdir(parents=True)]
)
def test_an_empty_or_foreign_repository(tmp_path, make):
    make(tmp_path / "repo")
    with pytest.raises(TritonStartError, match=r"repo: no Triton models.*simclr export"):
        TritonServer(tmp_path / "repo", **ANY_PORTS).start()


@pytest.mark.parametrize("kind", ["http", "grpc", "metrics"])
def test_a_busy_port_is_named_with_its_flag(repository, kind):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(TritonStartError, match=f"port {port} cannot be used.*--{kind}-port"):
            TritonServer(repository, **(ANY_PORTS | {f"{kind}_port": port})).start()


def test_no_runtime_at_all(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        TritonStartError, match=r"nowhere: no Triton runtime there.*make triton-runtime.*tritonserver on its PATH"
    ):
        TritonServer(repository, **ANY_PORTS).start()
    assert not scratch(tmp_path)


def found(**changes):
    return {"pytriton": "/p", "numpy": "1.26.4", "onnxruntime": "/o", "pillow": "/i", "python": "3.11"} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pytriton": None}, "lacks pytriton;"),
        ({"onnxruntime": None, "pillow": None}, "lacks onnxruntime, pillow;"),
        ({"numpy": "2.1.0"}, r"has numpy 2.1.0, wanted numpy<2 .*empty.*pip install 'numpy<2'"),
        ({"python": "3.99"}, r"runs Python 3.99, Triton has stubs for"),
    ],
)
def test_a_runtime_that_lacks_something(tmp_path, monkeypatch, changes, reason):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(runtime, "_probe", lambda python: found(**changes))
    with pytest.raises(TritonStartError, match=reason):
        runtime.find_runtime(tmp_path)


def test_another_platform(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(TritonStartError, match=r"for Linux x86_64, this is .* arm64; use a container"):
        runtime.find_runtime(tmp_path)


def test_an_interrupted_installation_leaves_nothing(tmp_path, monkeypatch):
    def run(command, **options):
        if "venv" in command:
            Path(command[-1], "bin").mkdir()
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        runtime.install_runtime(tmp_path / "triton")
    assert not list(tmp_path.iterdir())


def test_a_failed_installation_says_at_which_step(tmp_path, monkeypatch):
    def run(command, **options):
        if "pip" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(TritonStartError, match=r"triton: installing .* failed at `-m pip install .* numpy<2"):
        runtime.install_runtime(tmp_path / "triton")
    assert not list(tmp_path.iterdir())


def test_a_tritonserver_on_path_is_used_and_stopped(repository, fake_tritonserver, tmp_path):
    fake_tritonserver(SERVES.format(extra=f"Path({str(tmp_path / 'arguments')!r}).write_text(' '.join(sys.argv[1:]))"))
    with TritonServer(repository, **ANY_PORTS) as server:
        pid = server.pid
        arguments = (tmp_path / "arguments").read_text()
        assert f"--grpc-port={server.ports['grpc']}" in arguments
        assert server.url == f"grpc://127.0.0.1:{server.ports['grpc']}"
        for kind in ("http", "grpc", "metrics"):
            assert f"--{kind}-address=127.0.0.1" in arguments
    assert gone(pid)
    assert not scratch(tmp_path)
    server.stop()


def test_a_server_that_ignores_sigterm_is_killed(repository, fake_tritonserver, monkeypatch):
    monkeypatch.setattr(triton, "STOP_TIMEOUT_S", 0.3)
    fake_tritonserver(SERVES.format(extra="signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    with TritonServer(repository, **ANY_PORTS) as server:
        pid = server.pid
    assert gone(pid)


def test_a_server_that_never_gets_ready_is_given_up_and_ended(repository, fake_tritonserver, tmp_path, monkeypatch):
    monkeypatch.setattr(triton, "START_TIMEOUT_S", 0.5)
    fake_tritonserver("import time; print('thinking', flush=True); time.sleep(60)")
    with pytest.raises(TritonStartError, match=r"not ready after 0\.5 s"):
        TritonServer(repository, **ANY_PORTS).start()
    assert not scratch(tmp_path)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "did not start: it wrote nothing"),
        ("I a\nerror: something new", "did not start: I a / error: something new"),
        ("group x of model x has kind KIND_GPU but no GPUs are available", "export again with --target cpu"),
        (
            "E x] \"failed to load 'toy_head' version 1: Internal: bad\\nAt: y\"",
            r"model toy_head does not load \(Internal: bad\)",
        ),
        ("E x] \"Poll failed for model directory 'cats': no config\"", r"folder cats is not a model \(no config\)"),
    ],
)
def test_the_servers_reason_is_quoted_in_one_line(repository, fake_tritonserver, log, reason):
    fake_tritonserver(f"print({log!r}); raise SystemExit(1)")
    with pytest.raises(TritonStartError, match=reason) as caught:
        TritonServer(repository, **ANY_PORTS).start()
    assert "\n" not in str(caught.value)


def test_a_server_that_ends_by_itself_is_noticed(repository, fake_tritonserver):
    fake_tritonserver(SERVES.format(extra="import os, threading; threading.Timer(1, lambda: os._exit(7)).start()"))
    with (
        TritonServer(repository, **ANY_PORTS) as server,
        pytest.raises(TritonStartError, match=r"ended by itself \(exit status 7\)"),
    ):
        server.wait()


@pytest.mark.parametrize("number", [2, 9, 15])
def test_the_server_does_not_outlive_us(repository, fake_tritonserver, tmp_path, number):
    fake_tritonserver(SERVES.format(extra=f"import os; Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"))
    program = (
        "from pathlib import Path; from serve.triton_server import *; from serve.triton.supervisor import serve; "
        f"serve(TritonServer(Path({str(repository)!r}), http_port=0, grpc_port=0, metrics_port=0))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert "Triton serves" in process.stdout.readline()
        process.send_signal(number)
        code = process.wait(10)
    finally:
        process.kill()
        process.stdout.close()
    assert gone(int((tmp_path / "pid").read_text()))
    if number != 9:
        assert code == 0
        assert not scratch(tmp_path)


def test_a_server_that_dies_while_it_is_restarted_has_failed_once_more(tmp_path, capsys):
    class Dying:
        repository = tmp_path
        starts = 0

        def ended_within(self, _):
            return "it ended by itself"

        def stop(self, *, drain):
            assert not drain

        def start(self):
            self.starts += 1
            raise TritonStartError("the Triton server did not start: killed")

    server = Dying()
    with pytest.raises(TritonStartError, match=rf"failed {RESTARTS + 1} times in 10 minutes, at last: .*did not start: killed"):
        supervise(server)
    assert server.starts == RESTARTS
    assert "ready again" not in capsys.readouterr().err
