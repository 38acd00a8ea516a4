"""The gateway in front of the real Triton: the same vectors, bad pictures, and a server that dies and comes back."""

import os
import signal
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient

from export.repository import write_repository
from serve.api import create_api
from serve.encoder import OnnxEncoder, open_encoder
from serve.gateway import canary
from serve.triton_server import TritonServer
from tests.bad_images import accepted, good, refused
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.triton


def test_bad_pictures_and_a_server_that_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(canary, "FRESH_S", 0.0)
    graph, manifest = write_toy_encoder(tmp_path / "source")
    write_repository(tmp_path / "repo", graph=graph, manifest=manifest, head=None, target="cpu")
    with (
        TritonServer(tmp_path / "repo", http_port=0, grpc_port=0, metrics_port=0) as server,
        TestClient(create_api(open_encoder(server.url))) as http,
    ):
        bad, unusual = list(refused().values()), list(accepted().values())
        pictures = [*bad, *unusual, *map(good, range(8))]
        answer = http.post("/v1/embed", files=[("images", (str(number), data)) for number, data in enumerate(pictures)])
        results = answer.json()["results"]
        assert [list(result) for result in results] == [["error"]] * len(bad) + [["embedding"]] * (len(unusual) + 8)
        found = np.array([result["embedding"] for result in results[len(bad) :]], np.float32)
        np.testing.assert_allclose(found, OnnxEncoder(graph).embed(pictures[len(bad) :]), atol=1e-5)
        assert http.get("/health/ready").status_code == 200

        os.kill(server.pid, signal.SIGKILL)
        refusal = http.post("/v1/embed", content=good(), headers={"content-type": "image/png"})
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
        assert "no Triton server answers" in refusal.json()["detail"]
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200

        server.stop()
        server.start()
        deadline = time.monotonic() + 10
        while http.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline
        assert http.post("/v1/embed", content=good(), headers={"content-type": "image/png"}).status_code == 200
