"""The client, blocking and asynchronous by the same tests, against the real API on a port; and what it makes of strangers."""

import asyncio
import io
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from serve.api import create_api
from serve.client import AsyncClient, Client
from serve.errors import ContractError, EncoderMismatch, EncoderUnavailable, GalleryError, SimclrError, SourceError
from serve.gallery import Gallery
from serve.gateway.keys import Keyring, add_key
from serve.gateway.limits import Limits
from serve.http_client.calls import Calls
from serve.http_client.uploads import groups
from serve.identity.identify import identify
from serve.preprocess import ImageError
from serve.samples import Sample
from tests.bad_images import encoded, good
from tests.gated_encoder import GatedEncoder
from tests.thresholds import calibration
from tests.toy_encoder import DIM, toy_head

ROOT = Path(__file__).parents[2]
LIMITS = Limits(max_pictures=3, max_bytes=60_000)


class Awaited:
    """An AsyncClient that is used like a Client."""

    def __init__(self, *args, **options):
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*args, **options)

    def __getattr__(self, name):
        return lambda *args, **options: self._runner.run(getattr(self._client, name)(*args, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["blocking", "async"])
def kind(request):
    return request.param


@contextmanager
def served(app):
    """The address of an ASGI app on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def saying(status, body=b"", headers=(), before_s=0.0):
    """An ASGI app that gives everybody the same answer."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await asyncio.sleep(before_s)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    return app


@pytest.fixture(scope="module")
def pictures_host():
    with served(saying(200, good(5), [(b"content-type", b"image/png")])) as url:
        yield url


@pytest.fixture(scope="module")
def gallery(encoder, tmp_path_factory):
    """Twelve pictures; who adds one takes it out again."""
    samples = [
        Sample(f"{number}.png", label=("cat", "dog")[number % 2], identity=f"p{number % 3}", time=float(number))
        for number in range(12)
    ]
    with Gallery.open(tmp_path_factory.mktemp("gallery"), encoder, create=True) as found:
        found.add(samples, encoder.embed([good(number) for number in range(12)]))
        yield found


@pytest.fixture(scope="module")
def chosen(encoder):
    return calibration(encoder_id=encoder.encoder_id, threshold=0.9999, identities=1)


@pytest.fixture(scope="module")
def api(encoder, gallery, pictures_host, chosen):
    """The address of the API with all that it can have, and small limits."""
    hosts = [pictures_host.removeprefix("http://")]
    options = {"heads": {"toy": toy_head(encoder.encoder_id)}, "url_hosts": hosts, "limits": LIMITS, "calibration": chosen}
    with served(create_api(encoder, gallery=gallery, **options)) as url:
        yield url


@pytest.fixture
def client(kind, api):
    with kind(api, timeout_s=20) as found:
        yield found


def test_pictures_of_every_kind(client, encoder, tmp_path):
    (tmp_path / "a.png").write_bytes(good(0))
    grey = Image.open(io.BytesIO(good(3))).convert("L")
    found = client.embed([str(tmp_path / "a.png"), tmp_path / "a.png", good(1), Image.open(io.BytesIO(good(2))), grey])
    assert (found.shape, found.dtype) == ((5, DIM), np.float32)
    np.testing.assert_allclose(found, encoder.embed([good(0), good(0), good(1), good(2), grey]), atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_as_many_as_one_likes(client, encoder, count):
    found = client.embed([good(number) for number in range(count)])
    assert found.shape == (count, DIM)
    np.testing.assert_allclose(found, encoder.embed([good(number) for number in range(count)]), atol=1e-6)


def test_a_bad_picture_costs_no_other_its_answer(client, encoder, tmp_path):
    too_large = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)))
    assert len(too_large) > LIMITS.max_bytes
    first, *bad, last = client.embed_each([good(0), b"junk", too_large, tmp_path / "none.png", good(1)])
    np.testing.assert_allclose([first, last], encoder.embed([good(0), good(1)]), atol=1e-6)
    for error, match in zip(bad, ("not a readable picture", "at most 60,000 bytes", "none.png: cannot be read"), strict=True):
        assert isinstance(error, ImageError)
        assert match in str(error)
    for alone in ([b"junk"], [good(0), b"junk", good(1)]):
        with pytest.raises(ImageError, match="not a readable picture"):
            client.embed(alone)


def test_classify(client, encoder):
    head = toy_head(encoder.encoder_id)
    wanted = head.probabilities(encoder.embed([good(0), good(1)]))
    first, bad, second = client.classify([good(0), b"junk", good(1)])
    assert isinstance(bad, ImageError)
    for found, row in zip((first, second), wanted, strict=True):
        assert found.label == head.classes[int(row.argmax())]
        np.testing.assert_allclose([found.probabilities[name] for name in head.classes], row, atol=1e-6)


def test_search(client, gallery, pictures_host, tmp_path):
    (tmp_path / "a.png").write_bytes(good(5))
    wanted = gallery.search(gallery.vector(6), 4)
    queries = 6, np.int64(6), gallery.vector(6), good(5), tmp_path / "a.png", f"{pictures_host}/5.png"
    for query in queries:
        found = client.search(query, 4)
        assert [vars(hit) | {"score": 0} for hit in found] == [vars(hit) | {"score": 0} for hit in wanted]
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in wanted], atol=1e-6)
    for query in (6, good(5)):
        cats = client.search(query, 3, "label = cat", offset=1)
        assert [hit.id for hit in cats] == [hit.id for hit in gallery.search(gallery.vector(6), 3, "label = cat", offset=1)]
        near = client.search(query, 12, threshold=wanted[2].score - 1e-6)
        assert [hit.id for hit in near] == [hit.id for hit in wanted[:3]]


def test_identify(client, gallery, encoder, chosen, pictures_host, tmp_path):
    (tmp_path / "a.png").write_bytes(good(5))
    vector = gallery.vector(6)
    same_decision(client.identify(6, 2), identify(gallery, vector[None], chosen, exclude_ids=[6], k=2))
    for probe in (vector, vector[None], good(5), [good(5)], tmp_path / "a.png", f"{pictures_host}/5.png"):
        same_decision(client.identify(probe), identify(gallery, vector[None], chosen))
    vectors = encoder.embed([good(5), good(8), good(30)])
    for probe in ([tmp_path / "a.png", good(8), good(30)], vectors):
        found = client.identify(probe, where="label = cat")
        same_decision(found, identify(gallery, vectors, chosen, where="label = cat"))
        assert "1 identities, now there are 3" in found.warning


def same_decision(found, wanted):
    assert (found.verdict, found.identity, found.threshold) == (wanted.verdict, wanted.identity, wanted.threshold)
    assert [hit.id for hit in found.candidates] == [hit.id for hit in wanted.candidates]
    assert (found.score, found.probability) == pytest.approx((wanted.score, wanted.probability), abs=1e-5)


def test_items(client, gallery, encoder):
    page = client.items("label = dog", limit=2, offset=1)
    assert (page.items, page.total) == (gallery.items("label = dog", 2, 1), 6)
    added = client.add(good(20), "new.png", label="cow", time=1.5, extra={"seen": [True, None, "é"]})
    assert added == client.item(added.id) == gallery.item(added.id)
    assert (added.source, added.label, added.camera, added.extra) == ("new.png", "cow", None, {"seen": [True, None, "é"]})
    np.testing.assert_allclose(client.vector(added.id), encoder.embed([good(20)])[0], atol=1e-6)
    changed = client.relabel(added.id, label=None, camera="2", extra={"seen": None, "more": 1})
    assert (changed.label, changed.camera, changed.time, changed.extra) == (None, "2", 1.5, {"more": 1})
    assert client.replace(added.id, good(21)) == changed
    np.testing.assert_allclose(client.vector(added.id), encoder.embed([good(21)])[0], atol=1e-6)
    client.remove(added.id)
    named = client.add(good(22))
    assert named.source.startswith("sha256:")
    client.remove(named.id)
    assert client.items().total == len(gallery) == 12


def test_info_and_ready(client, encoder):
    info = client.info()
    assert (info.manifest, info.limits) == (encoder.manifest, LIMITS)
    assert info.classes == ["cat", "dog", "é cow"]
    assert client.ready() is True


def test_the_example_of_the_documentation_runs(api, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gateway.md").read_text(), re.DOTALL)
    for number, name in enumerate(("cat.jpg", "dog.jpg")):
        (tmp_path / name).write_bytes(good(number))
    code = example.replace("http://127.0.0.1:7861", api)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (GalleryError, "no item 99", lambda client: client.item(99)),
        (GalleryError, "no item 99", lambda client: client.remove(99)),
        (GalleryError, "no item 99", lambda client: client.search(99)),
        (GalleryError, "no item 99", lambda client: client.identify(99)),
        (GalleryError, "k: ", lambda client: client.identify(1, 0)),
        (GalleryError, "no direction", lambda client: client.identify(np.stack([np.ones(DIM), -np.ones(DIM)]))),
        (GalleryError, "Too many files", lambda client: client.identify([good()] * 4)),
        (ImageError, "not a readable picture", lambda client: client.identify([good(), b"junk"])),
        (ImageError, "none.png", lambda client: client.identify(["none.png"])),
        (GalleryError, "colour", lambda client: client.items("colour = red")),
        (GalleryError, "k: ", lambda client: client.search(1, 0)),
        (GalleryError, "k: ", lambda client: client.search(good(), 0)),
        (GalleryError, "vector", lambda client: client.search(np.ones(3))),
        (GalleryError, "3.png is in the gallery already", lambda client: client.add(good(), "3.png")),
        (ImageError, "not a readable picture", lambda client: client.add(b"junk")),
        (ImageError, "not a readable picture", lambda client: client.search(b"junk")),
        (ImageError, "none.png", lambda client: client.replace(1, "none.png")),
        (SimclrError, "may not ask", lambda client: client.search("http://somewhere.else/1.png")),
    ],
)
def test_refusals_are_the_errors_of_this_project(client, error, match, call):
    with pytest.raises(error, match=match) as caught:
        call(client)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_a_host_that_fails(kind, encoder, gallery):
    with (
        served(saying(404)) as host,
        served(create_api(encoder, gallery=gallery, url_hosts=[host.removeprefix("http://")])) as url,
        kind(url) as client,
        pytest.raises(SourceError, match="answered 404"),
    ):
        client.search(f"{host}/1.png")


def test_keys(kind, encoder, tmp_path):
    secret = add_key(tmp_path / "keys", "me", "read")
    with served(create_api(encoder, keys=Keyring(tmp_path / "keys"))) as url:
        with kind(url, secret) as client:
            assert len(client.embed([good()])) == 1
        for key, match in ((None, "no key was given"), ("wrong", "not known")):
            with kind(url, key) as client:
                assert client.ready()
                with pytest.raises(SimclrError, match=match):
                    client.embed([good()])


def test_a_server_without_head_and_gallery(kind, encoder):
    with served(create_api(encoder)) as url, kind(url) as client:
        for call in (lambda: client.classify([good()]), lambda: client.item(1)):
            with pytest.raises(ContractError, match="404 Not Found, as without a head or a gallery"):
                call()


@pytest.mark.parametrize(
    ("app", "error", "match"),
    [
        (saying(200, b"<html>"), ContractError, "no JSON"),
        (saying(200, b'{"manifest": {}}'), ContractError, "no right manifest"),
        (saying(404, b"<html>"), ContractError, "404 Not Found"),
        (saying(302, b"", [(b"location", b"/login")]), ContractError, "302 Found"),
        (saying(502, b"<html>"), EncoderUnavailable, "502 Bad Gateway"),
        (saying(503, b"", [(b"retry-after", b"60")]), EncoderUnavailable, "503 Service Unavailable"),
        (saying(200, before_s=5), EncoderUnavailable, "no answer within 0.5 s"),
    ],
)
def test_strangers(kind, app, error, match):
    began = time.monotonic()
    with served(app) as url, kind(url, timeout_s=0.5) as client, pytest.raises(error, match=match):
        client.info()
    assert time.monotonic() - began < 4


def test_nobody_there(kind):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with kind(url) as client:
        assert client.ready() is False
        with pytest.raises(EncoderUnavailable, match="simclr api"):
            client.embed([good()])


def test_who_is_refused_comes_back(kind, tmp_path):
    gated = GatedEncoder(tmp_path)
    with served(create_api(gated, limits=Limits(at_once=1, waiting=0))) as url, kind(url) as client, Client(url) as first:
        one = threading.Thread(target=first.embed, args=([good(0)],))
        one.start()
        while not gated.batches:
            time.sleep(0.002)
        threading.Timer(0.3, gated.let, [2]).start()
        assert client.embed([good(1)]).shape == (1, DIM)
        one.join()


# Without a server: what would be sent, and when.


def talk(steps, *answers):
    """The requests that follow these answers, until there is a result or an error."""
    return [next(steps), *map(steps.send, answers)]


def busy(status, retry_after):
    return httpx.Response(status, headers={"retry-after": retry_after}, json={"title": "busy", "detail": "come back"})


def test_retry_after_is_kept_within_the_deadline():
    first, second, third = talk(Calls("http://a", 10).info(), busy(429, "2"), busy(503, "Wed, 21 Oct 2026 07:28:00 GMT"))
    assert [request.after_s for request in (first, second, third)] == [0, 2, 1]
    assert first.timeout_s == pytest.approx(10, abs=0.1)
    assert second.timeout_s == pytest.approx(8, abs=0.1)
    with pytest.raises(EncoderUnavailable, match="come back"):
        talk(Calls("http://a", 10).info(), busy(429, "11"))


def test_what_must_not_be_done_twice_is_not():
    for steps in (Calls("http://a", 10).add(b"x"), Calls("http://a", 10).remove(1)):
        assert len(talk(steps, busy(429, "1"))) == 2
        with pytest.raises(EncoderUnavailable, match="come back"):
            steps.send(busy(503, "1"))
    for steps in (
        Calls("http://a", 10).replace(1, b"x"),
        Calls("http://a", 10).relabel(1, label=None),
        Calls("http://a", 10).search(1),
        Calls("http://a", 10).identify([b"x"]),
    ):
        assert len(talk(steps, busy(503, "1"))) == 2


def test_vectors_of_two_encoders_are_not_mixed(encoder):
    limits = {"max_pictures": 1}
    info = httpx.Response(200, json={"manifest": encoder.manifest.model_dump(mode="json"), "classes": [], "limits": limits})
    answers = [httpx.Response(200, json={"encoder_id": one, "results": [{"embedding": [1.0]}]}) for one in ("a", "b")]
    with pytest.raises(EncoderMismatch, match="another encoder"):
        talk(Calls("http://a", 10).embed([b"x", b"y"]), info, *answers)


def test_a_result_for_each_picture(encoder):
    answer = httpx.Response(200, json={"encoder_id": "a", "results": []})
    with pytest.raises(ContractError, match="0 results for 1 pictures"):
        talk(Calls("http://a", 10).embed([b"x"]), answer)


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_all_pictures_within_the_limits(seed):
    rng = np.random.default_rng(seed)
    pictures = [bytes(int(size)) for size in rng.integers(0, 3000, 40)]
    limits = Limits(max_pictures=int(rng.integers(1, 9)), max_bytes=5000)
    found = list(groups(pictures, limits))
    assert [one for group in found for one in group] == pictures
    for group in found:
        body = httpx.Request(
            "POST", "http://a", files=[("images", (str(n), one, "application/octet-stream")) for n, one in enumerate(group)]
        )
        assert len(group) <= limits.max_pictures
        assert len(group) == 1 or len(body.read()) <= limits.max_bytes


def test_the_client_imports_no_server():
    blocked = ("faiss", "onnxruntime", "gradio", "torch", "fastapi", "uvicorn", "tritonclient", "pyarrow", "aiohttp")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import serve.client"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
