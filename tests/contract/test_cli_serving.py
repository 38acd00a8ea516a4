"""`simclr api`, `key`, `app` and `triton`: that they serve, and what they refuse."""

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from serve.classify import Head
from tests.command_line import ROOT
from tests.thresholds import calibration


def test_api(world):
    command = [sys.executable, ROOT / "cli.py", "api", "--encoder", "toy", "--head", "toy.npz", "--port", "0", "--at-once", "3"]
    with subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            url = re.fullmatch(r"the API is at (http://127.0.0.1:\d+) \(Ctrl-C ends it\)\n", running.stdout.readline())[1]
            picture = (world / "one" / "only.png").read_bytes()
            request = urllib.request.Request(f"{url}/v1/classify", picture, {"Content-Type": "image/png"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert json.load(answer)["results"][0]["label"] in ("cat", "dog", "é cow")
            with urllib.request.urlopen(f"{url}/v1/info", timeout=20) as answer:
                assert json.load(answer)["limits"]["at_once"] == 3
        finally:
            running.terminate()
        assert running.wait(20) == 0
        assert running.stderr.read() == ""


def test_api_of_a_gallery_behind_keys(simclr, world, tmp_path):
    code, secret, err = simclr("key", "me", "--scope", "admin", "--keys", tmp_path / "keys")
    assert code == 0
    assert secret.strip() not in err
    assert secret.strip() not in (tmp_path / "keys").read_text()
    command = [sys.executable, ROOT / "cli.py", "api", "--encoder", "toy", "--gallery", "gallery", "--keys", tmp_path / "keys"]
    command += ["--port", "0", "--host", "0.0.0.0", "--threshold-file", tmp_path / "threshold.json"]  # noqa: S104
    calibration(encoder_id=Head.load(world / "toy.npz").encoder_id).save(tmp_path / "threshold.json")
    with subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, text=True) as running:
        try:
            url = f"http://127.0.0.1:{running.stdout.readline().split(':')[-1].split()[0]}"
            asked = urllib.request.Request(f"{url}/v1/items", headers={"Authorization": f"Bearer {secret.strip()}"})
            with urllib.request.urlopen(asked, timeout=20) as answer:
                assert json.load(answer)["total"] == 10
            header = {"Authorization": f"Bearer {secret.strip()}", "Content-Type": "application/json"}
            asked = urllib.request.Request(f"{url}/v1/reid/identify", b'{"id": 1}', header)
            with urllib.request.urlopen(asked, timeout=20) as answer:
                assert json.load(answer)["threshold"] == 0.7
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/v1/items", timeout=20)
        finally:
            running.terminate()
        assert running.wait(20) == 0


@pytest.fixture
def busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_busy_port(refused, busy_port):
    got = refused("app", "--gallery", "gallery", "--encoder", "toy", "--port", busy_port)
    assert f"port {busy_port}" in got
    assert "--port" in got
    assert f"port {busy_port} is busy" in refused("api", "--encoder", "toy", "--port", busy_port)
    for kind in ("http", "grpc", "metrics"):
        ports = [f"--{other}-port={busy_port if other == kind else 0}" for other in ("http", "grpc", "metrics")]
        got = refused("triton", "--repository", "toy", *ports)
        assert f"port {busy_port} cannot be used" in got
        assert f"--{kind}-port" in got


@pytest.mark.parametrize("repository", ["empty", "missing", "pictures", "text.txt"])
def test_nothing_to_serve(refused, repository):
    assert "no Triton models" in refused("triton", "--repository", repository)
