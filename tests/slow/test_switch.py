"""A new version replaces the old one under load, and goes back, on the real server: no request fails, no answer is mixed."""

import threading
import time

import numpy as np
import pytest
import tritonclient.grpc

from export.repository import write_repository
from export.versions import roll_back
from serve.encoder import open_encoder
from serve.errors import EncoderMismatch, EncoderUnavailable
from serve.gallery import Gallery
from serve.samples import Sample
from serve.triton.client import TritonEncoder
from serve.triton.model_control import KEY_VARIABLE, changed_on
from serve.triton_server import TritonServer
from tests.bad_images import good
from tests.toy_encoder import HEIGHT, WIDTH, toy_head, write_toy_encoder

pytestmark = pytest.mark.triton
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
PIXELS = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "test")


def publish(folder, seed, changed=lambda _: None):
    """Another encoder, and a head of its own that no other encoder has."""
    graph, manifest = write_toy_encoder(folder / f"source{seed}", seed=seed)
    head = toy_head(manifest.encoder_id, (f"a{seed}", f"b{seed}"))
    write_repository(folder / "repo", graph=graph, manifest=manifest, head=head, target="cpu", changed=changed)
    return head


class Load:
    """Clients that never stop; everything that they were told."""

    def __init__(self, server):
        self.address = f"127.0.0.1:{server.ports['grpc']}"
        self.answers, self.failures, self._stop = [], [], threading.Event()
        requests = [("toy_embed", "bytes"), ("toy_classify", "bytes"), ("toy_encoder", "image")] * 2
        self._threads = [threading.Thread(target=self._ask, args=request) for request in requests]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, model, name):
        client = tritonclient.grpc.InferenceServerClient(self.address)
        array = PIXELS if name == "image" else np.array([[good()]], dtype=np.object_)
        tensor = tritonclient.grpc.InferInput(name, array.shape, "UINT8" if name == "image" else "BYTES")
        tensor.set_data_from_numpy(array)
        while not self._stop.is_set():
            try:
                answer = client.infer(model, [tensor], client_timeout=10)
            except Exception as error:
                self.failures.append(f"{model}: {error}")
                continue
            found = {key: answer.as_numpy(key) for key in ("embedding", "probabilities") if answer.as_numpy(key) is not None}
            self.answers.append((model, int(answer.get_response().model_version), found))


def test_no_request_fails_and_no_answer_is_mixed(tmp_path):
    heads = {1: publish(tmp_path, 0)}
    repository = tmp_path / "repo"
    vectors = {1: (open_encoder(repository).embed([good()]), open_encoder(repository).embed([PIXELS[0]]))}
    with TritonServer(repository, **ANY_PORTS) as server, Load(server) as load:
        began = TritonEncoder(f"{server.url}/toy")
        kept = began.embed_bytes([good()])
        time.sleep(0.7)
        heads[2] = publish(tmp_path, 1, changed_on(server.http_url))
        vectors[2] = (open_encoder(repository).embed([good()]), open_encoder(repository).embed([PIXELS[0]]))
        np.testing.assert_allclose(kept, vectors[1][0], atol=1e-6)
        for ask in (
            lambda: began.embed_bytes([good()]),
            lambda: began.embed([PIXELS[0]]),
            lambda: began.classify_bytes([good()]),
        ):
            with pytest.raises(EncoderMismatch, match=f"{began.encoder_id}.*simclr gallery reembed"):
                ask()
        np.testing.assert_allclose(TritonEncoder(server.url).embed_bytes([good()]), vectors[2][0], atol=1e-6)
        time.sleep(0.7)
        switched = len(load.answers)
        time.sleep(0.3)
        assert {version for _, version, _ in load.answers[switched:]} == {2}
        assert roll_back(repository, "toy", changed_on(server.http_url)) == 1
        time.sleep(0.7)
        back = len(load.answers)
        time.sleep(0.3)
        assert {version for _, version, _ in load.answers[back:]} == {1}
        np.testing.assert_allclose(began.embed_bytes([good()]), vectors[1][0], atol=1e-6)
    assert load.failures == []
    assert {(model, version) for model, version, _ in load.answers} == {
        (model, version) for model in ("toy_embed", "toy_classify", "toy_encoder") for version in (1, 2)
    }
    for model, version, found in load.answers:
        np.testing.assert_allclose(found["embedding"], vectors[version][model == "toy_encoder"], atol=1e-6)
        if model == "toy_classify":
            np.testing.assert_allclose(found["probabilities"], heads[version].probabilities(vectors[version][0]), atol=1e-6)


def test_a_gallery_of_the_old_encoder_is_refused_after_the_switch(tmp_path):
    publish(tmp_path, 0)
    (tmp_path / "a.png").write_bytes(good())
    with TritonServer(tmp_path / "repo", **ANY_PORTS) as server:
        with Gallery.open(str(tmp_path / "gallery"), open_encoder(server.url), create=True) as gallery:
            gallery.add([Sample(str(tmp_path / "a.png"))])
        publish(tmp_path, 1, changed_on(server.http_url))
        with pytest.raises(EncoderMismatch, match=r"simclr gallery reembed"):
            Gallery.open(str(tmp_path / "gallery"), open_encoder(server.url))


def test_without_the_key_nothing_is_begun(tmp_path, monkeypatch):
    publish(tmp_path, 0)
    with TritonServer(tmp_path / "repo", **ANY_PORTS) as server:
        monkeypatch.setenv(KEY_VARIABLE, "wrong")
        with pytest.raises(EncoderUnavailable, match=f"set {KEY_VARIABLE}"):
            changed_on(server.http_url)
    with pytest.raises(EncoderUnavailable, match="wanted http://host:8000"):
        changed_on(server.http_url)
