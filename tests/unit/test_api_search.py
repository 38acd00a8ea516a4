"""Search over HTTP: by item, vector, picture and URL; what cannot be asked is said."""

import json

import numpy as np
import pytest

from serve.api import create_api
from serve.gallery import Gallery
from serve.gateway.limits import MAX_HITS, MAX_OFFSET
from serve.samples import Sample
from tests.asgi_client import PNG, ask, form, problem
from tests.bad_images import good
from tests.toy_encoder import DIM

COUNT = 12
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, encoder):
    with Gallery.open(tmp_path_factory.mktemp("gallery"), encoder, create=True) as opened:
        samples = [Sample(f"{i}.png", label=["cat", "dog"][i % 2], time=float(i)) for i in range(COUNT)]
        opened.add(samples, encoder.embed([good(i) for i in range(COUNT)]))
        yield opened


@pytest.fixture(scope="module")
def api(encoder, gallery):
    return create_api(encoder, gallery=gallery)


def search(**body):
    return lambda http: http.post("/v1/search", json=body)


def image(number, **params):
    return lambda http: http.post("/v1/search/image", content=good(number), headers=PNG, params=params)


def raw(body, headers=JSON):
    return lambda http: http.post("/v1/search", content=body, headers=headers)


def hits(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"]


def same(found, wanted):
    assert [{**hit, "score": 0} for hit in found] == [{**vars(hit), "score": 0} for hit in wanted]
    np.testing.assert_allclose([hit["score"] for hit in found], [hit.score for hit in wanted], atol=1e-6)


def test_four_ways_to_ask_for_the_same(api, gallery, encoder):
    vector = gallery.vector(3)
    wanted = gallery.search(vector, 10)
    answers = ask(
        api,
        search(id=3),
        search(vector=vector.tolist()),
        search(vector=(7 * vector).tolist(), id=None),
        image(2),
        lambda http: http.post("/v1/search/image", files=form(good(2))),
    )
    assert wanted[0].id == 3
    for answer in answers:
        same(hits(answer), wanted)
        assert answer.json()["encoder_id"] == encoder.encoder_id


@pytest.mark.parametrize("ask_by", [lambda **page: search(id=3, **page), lambda **page: image(2, **page)])
def test_which_hits(api, gallery, ask_by):
    vector = gallery.vector(3)
    few, dogs, later, near, none = ask(
        api,
        ask_by(k=2),
        ask_by(k=3, where="label = dog and time > 2"),
        ask_by(k=4, offset=5),
        ask_by(k=100, threshold=gallery.search(vector, 5)[4].score - 1e-6),
        ask_by(where="label = cow"),
    )
    same(hits(few), gallery.search(vector, 2))
    same(hits(dogs), gallery.search(vector, 3, "label = dog and time > 2"))
    same(hits(later), gallery.search(vector, 9)[5:])
    same(hits(near), gallery.search(vector, 5))
    assert hits(none) == []


@pytest.mark.parametrize(
    ("status", "match", "call"),
    [
        (422, "got nothing to search with", search()),
        (422, "got nothing to search with", search(id=None)),
        (422, "got id and vector", search(id=3, vector=[1.0] * DIM)),
        (404, "no item 99", search(id=99)),
        (422, "id", search(id=0)),
        (422, "id", search(id=2**63)),
        (422, "id", search(id="3")),
        (422, f"(N, {DIM})", search(vector=[1.0] * (DIM - 1))),
        (422, f"(N, {DIM})", search(vector=[])),
        (422, "zero", search(vector=[0.0] * DIM)),
        (422, "infinite", search(vector=[1e300] * DIM)),
        (422, "vector.1", search(vector=[1.0, "x"])),
        (422, "vector.0", raw(b'{"vector": [NaN]}')),
        (422, "vector.0", raw(b'{"vector": [1e999]}')),
        (422, f"k: Input should be less than or equal to {MAX_HITS}", search(id=3, k=MAX_HITS + 1)),
        (422, f"offset: Input should be less than or equal to {MAX_OFFSET}", search(id=3, offset=10**30)),
        (422, "k", search(id=3, k=0)),
        (422, "k", search(id=3, k=True)),
        (422, "threshold", search(id=3, threshold=1.5)),
        (422, "threshold", raw(b'{"id": 3, "threshold": NaN}')),
        (400, "filter", search(id=3, where="colour = red")),
        (400, "filter", search(id=3, where="label = '\0'")),
        (422, "colour", search(id=3, colour="red")),
        (400, "JSON", raw(b"")),
        (400, "JSON", raw(b'{"id": 3')),
        (400, "JSON", raw(b'{"where": "\xff"}')),
        (422, "", raw(b"[]")),
        (422, "", raw(b"null")),
        (415, "missing", raw(b'{"id": 3}', {})),
        (415, "text/json", raw(b'{"id": 3}', {"content-type": "text/json"})),
        (413, "1,048,576", raw(json.dumps({"vector": [0.1] * 300_000}).encode())),
        (403, "may not ask pictures.example; who runs it can allow that: --url-hosts", search(url="https://pictures.example/a.png")),
        (422, "https://host/path", search(url="file:///etc/passwd")),
        (422, "https://host/path", search(url="")),
        (422, "url", search(url="https://a/" + "x" * 2000)),
        (422, "k", image(2, k=0)),
        (422, "offset", image(2, offset=MAX_OFFSET + 1)),
        (422, "threshold", image(2, threshold="nan")),
        (422, "colour", image(2, colour="red")),
        (400, "filter", image(2, where="nonsense")),
        (422, "not a readable picture", lambda http: http.post("/v1/search/image", content=b"junk", headers=PNG)),
        (422, "empty file", lambda http: http.post("/v1/search/image", content=b"", headers=PNG)),
        (415, "application/json, wanted image/", lambda http: http.post("/v1/search/image", json={"id": 3})),
        (400, "Too many files", lambda http: http.post("/v1/search/image", files=form(good(), good()))),
        (405, "Not Allowed", lambda http: http.get("/v1/search")),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(api, status, match, call):
    assert match in problem(ask(api, call), status)


def test_an_empty_gallery(encoder, tmp_path):
    with Gallery.open(tmp_path / "empty", encoder, create=True) as empty:
        answers = ask(create_api(encoder, gallery=empty), image(1), image(1, threshold=0.5), search(vector=[1.0] * DIM))
    assert [hits(answer) for answer in answers] == [[], [], []]


def test_search_and_gallery_are_measured(encoder, gallery):
    *_, page = ask(create_api(encoder, gallery=gallery), image(1), search(id=3), lambda http: http.get("/metrics"))
    found = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    assert found['simclr_stage_seconds_count{stage="search"}'] == "2.0"
    assert found["simclr_gallery_items"] == f"{COUNT}.0"
    assert found["simclr_recall_at_10"] == "NaN", "nothing has been measured yet"
