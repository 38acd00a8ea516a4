"""What `pip install simclr-serve` without extras can do: search and serve, without torch.

SIMCLR_BASE_PYTHON names the interpreter of such an environment (`make test` makes one). The encoder it serves is drawn up here.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.repository import write_repository
from tests.toy_encoder import toy_head, write_toy_encoder

START_TIMEOUT_S = 90
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python():
    found = os.environ.get("SIMCLR_BASE_PYTHON")
    if not found:
        pytest.skip("SIMCLR_BASE_PYTHON names no environment with a base install (make test makes one)")
    assert Path(found).is_file(), f"SIMCLR_BASE_PYTHON is {found}, wanted a Python interpreter"
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model repository, a head and pictures, made where torch and onnx are."""
    root = tmp_path_factory.mktemp("world")
    graph, manifest = write_toy_encoder(root / "source")
    write_repository(root / "repository", graph=graph, manifest=manifest, head=None, target="cpu")
    toy_head(manifest.encoder_id).save(root / "head.npz")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / "pictures" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 12, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def environment(world):
    """Nothing of this checkout: neither its folder nor its environment. Gradio's own noise and telemetry stay off."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"HOME": str(world), "NO_PROXY": "127.0.0.1,localhost"}


@pytest.fixture(scope="module")
def simclr(python, world, environment):
    def run(*words):
        command = [python, "-m", "cli", *map(str, words)]
        return subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


def ok(done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gallery(simclr, world):
    assert "12 added" in ok(simclr("gallery", "add", "gallery", "--images", "pictures", "--encoder", "repository"))
    return world / "gallery"


def test_torch_and_all_that_trains_is_missing(python, world, environment):
    code = "import cli, importlib.metadata as m; print(cli.__file__, *{d.name.lower() for d in m.distributions()})"
    done = subprocess.run(
        [python, "-c", code], cwd=world, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    home, *installed = done.stdout.split()
    assert not Path(home).is_relative_to(ROOT) or ".venv" in home, "this must be an installed copy, not the checkout"
    assert "simclr-serve" in installed
    assert not set(installed) & {"torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard", "pytest"}
    for name in ("torch", "onnx"):
        failed = subprocess.run([python, "-c", f"import {name}"], cwd=world, env=environment, capture_output=True, check=False)
        assert failed.returncode != 0


def test_the_command_is_installed(python, world, environment):
    command = [Path(python).parent / "simclr", "--help"]
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "gallery add" in done.stdout
    assert done.stderr == ""


def test_search(simclr, gallery, world):
    info = json.loads(ok(simclr("gallery", "info", gallery, "--json")))
    assert (info["count"], info["encoder_name"]) == (12, "toy")
    done = simclr("search", "--gallery", gallery, "--image", "pictures/dog/5.png", "-k", 3, "--json")
    first, *_ = hits = json.loads(ok(done))
    assert done.stderr == "", "nothing but the answer is printed"
    assert len(hits) == 3
    assert (first["source"], first["label"]) == (str(world / "pictures" / "dog" / "5.png"), "dog")
    assert first["score"] == pytest.approx(1, abs=1e-5)
    assert ok(simclr("gallery", "verify", gallery)) == f"{gallery}: 12 items, all well\n"


def test_embed(simclr, world):
    assert ok(simclr("embed", "--encoder", "repository", "--images", "pictures", "--out", "out.parquet")) == (
        "out.parquet: 12 vectors\n"
    )
    assert (world / "out.parquet").stat().st_size > 0


def test_fit_head(simclr, gallery, world):
    done = simclr("fit-head", "--gallery", gallery, "--out", "new.npz", "--confusion", "new.png")
    assert ok(done).startswith("new.npz: 2 classes, 12 pictures, held-back accuracy ")
    (world / "new.npz").unlink()
    (world / "new.png").unlink()


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "--images", "pictures", "--run", "run"),
        ("evaluate", "--encoder", "repository", "--images", "pictures"),
        ("export", "--run", "run", "--repository", "new"),
        ("demo", "--out", "new"),
    ],
    ids=lambda words: words[0],
)
def test_what_trains_says_what_to_install(simclr, world, words):
    before = sorted(path.name for path in world.iterdir())
    done = simclr(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"simclr: this command needs \w+, which a serving install leaves out: pip install 'simclr-serve\[train\]'\n",
        done.stderr,
    )
    assert sorted(path.name for path in world.iterdir()) == before


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_app_serves_its_page_and_stops_on_sigterm(python, world, environment, gallery):
    port = free_port()
    words = ["app", "--gallery", str(gallery), "--encoder", "repository", "--head", "head.npz", "--port", str(port)]
    log = world / "app.log"
    with log.open("wb") as out:
        app = subprocess.Popen([python, "-m", "cli", *words], cwd=world, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while f"is at http://127.0.0.1:{port}/" not in log.read_text():
            assert app.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{port}/", timeout=10) as response:
            page = response.read().decode()
        assert "simclr-serve" in page
        app.send_signal(signal.SIGTERM)
        assert app.wait(20) in (0, 130)
    finally:
        app.kill()
        app.wait()
    assert "Traceback" not in log.read_text()
    done = subprocess.run(
        [python, "-m", "cli", "gallery", "verify", str(gallery)], cwd=world, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, "the gallery was closed properly"
