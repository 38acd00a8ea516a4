"""The web page and the API on one port: each gets what is its own."""

import time

import httpx
import pytest

from app import build_app, serve_app
from serve.api import create_api
from serve.gallery import Gallery
from serve.ports import free_port
from tests.asgi_client import PNG
from tests.bad_images import good


@pytest.fixture
def served(tmp_path, toy_encoder, pictures):
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        gallery.add(pictures(5))
        blocks = build_app(gallery, toy_encoder, heads={}, encoder_spec="model_repository")
        url = serve_app(blocks, api=create_api(toy_encoder, gallery=gallery), port=free_port(), wait=False)
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
            yield http
        blocks.close()


def test_the_page_and_the_api_share_a_port(served):
    assert "<gradio-app" in served.get("/").text
    assert served.get("/config").json()["title"] == "simclr-serve"
    assert served.get("/health/live").json() == {"status": "live"}
    assert served.get("/health/ready").json() == {"status": "ready"}
    assert "/v1/items" in served.get("/openapi.json").json()["paths"]
    assert served.get("/v1/items", params={"limit": 1}).json()["total"] == 5
    added = served.post("/v1/items", content=good(), headers=PNG)
    assert added.status_code == 201
    hits = served.post("/v1/search", json={"id": added.json()["id"], "k": 1}).json()["hits"]
    assert hits[0]["id"] == added.json()["id"]
    assert served.get("/v1/nothing").headers["content-type"] == "application/problem+json"


def test_the_page_is_neither_counted_nor_limited_and_recall_is_measured(served):
    for _ in range(3):
        served.get("/")
    page = served.get("/metrics").text
    assert [line for line in page.splitlines() if line.startswith("simclr_requests_total")] == []
    deadline = time.monotonic() + 20
    while "simclr_recall_at_10 1.0" not in served.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["/", "/config", "/v1/items", "/health/live"])
def test_a_name_that_is_not_this_machines_is_turned_away(served, path):
    """Who lets the name of a site lead here (DNS rebinding) must not have its page read or change the gallery."""
    port = served.base_url.port
    assert served.get(path, headers={"Host": f"evil.example:{port}"}).status_code == 400
    for name in ("localhost", "127.0.0.1"):
        assert served.get(path, headers={"Host": f"{name}:{port}"}).status_code == 200
