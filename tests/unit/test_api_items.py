"""The API over a gallery's items: every route and every refusal; what was answered with success is there after reopening."""

import asyncio
import hashlib
import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

import serve.storage.catalog_file
from serve.api import create_api
from serve.encoder import OnnxEncoder
from serve.errors import EncoderMismatch
from serve.gallery import Gallery
from serve.gateway.limits import Limits
from serve.samples import Sample
from tests.asgi_client import PNG, ask, client, form, problem
from tests.bad_images import good
from tests.toy_encoder import DIM, write_toy_encoder

COUNT = 6


@pytest.fixture
def gallery(tmp_path, encoder):
    with Gallery.open(tmp_path / "gallery", encoder, create=True) as opened:
        samples = [Sample(f"{i}.png", label=["cat", "dog"][i % 2], camera=str(i), time=i / 2) for i in range(COUNT)]
        opened.add(samples, encoder.embed([good(i) for i in range(COUNT)]), extra={"2.png": {"seen": True, "by": "me"}})
        yield opened


@pytest.fixture
def api(encoder, gallery):
    return create_api(encoder, gallery=gallery)


def post(number, **params):
    return lambda http: http.post("/v1/items", content=good(number), headers=PNG, params=params)


def patch(item_id, **body):
    return lambda http: http.patch(f"/v1/items/{item_id}", json=body)


def get(path, **params):
    return lambda http: http.get(path, params=params)


def search(**body):
    return lambda http: http.post("/v1/search", json=body)


def reopened(gallery):
    return Gallery.open(gallery.folder, gallery.encoder)


def test_list(api, gallery):
    everything, some, filtered, none = ask(
        api,
        get("/v1/items"),
        get("/v1/items", limit=2, offset=3),
        get("/v1/items", where="label = dog and time > 1", limit=1),
        get("/v1/items", where="label = cow"),
    )
    assert everything.json() == {"items": [vars(item) for item in gallery.items()], "total": COUNT}
    assert [item["id"] for item in some.json()["items"]] == [4, 5]
    assert (filtered.json()["items"][0]["source"], filtered.json()["total"]) == ("3.png", 2)
    assert none.json() == {"items": [], "total": 0}


def test_one_item_and_its_vector(api, gallery, encoder):
    item, vector = ask(api, get("/v1/items/3"), get("/v1/items/3/vector"))
    assert item.json() == {
        "id": 3, "source": "2.png", "label": "cat", "identity": None, "camera": "2", "time": 1.0,
        "extra": {"seen": True, "by": "me"},
    }  # fmt: skip
    assert vector.json()["encoder_id"] == encoder.encoder_id
    np.testing.assert_array_equal(np.array(vector.json()["embedding"], np.float32), gallery.vector(3))


def test_what_is_added_is_there_after_reopening(api, gallery, encoder):
    known = {"source": "new é.png", "label": "cow", "identity": "7", "camera": "c", "time": "2.5", "extra": '{"a": [1, null]}'}
    answer, again = ask(api, post(9, **known), post(9, source="new é.png"))
    assert answer.status_code == 201
    item = answer.json()
    assert answer.headers["location"] == f"/v1/items/{item['id']}"
    assert item == {"id": COUNT + 1, **known, "time": 2.5, "extra": {"a": [1, None]}}
    assert f"PUT /v1/items/{item['id']}/image" in problem(again, 409)
    with reopened(gallery) as later:
        assert vars(later.item(item["id"])) == item
        np.testing.assert_allclose(later.vector(item["id"]), encoder.embed([good(9)])[0], atol=1e-6)


def test_a_picture_without_a_name_goes_by_its_digest(api):
    one, same, as_form = ask(api, post(9), post(9), lambda http: http.post("/v1/items?label=x", files=form(good(10))))
    assert one.json()["source"] == f"sha256:{hashlib.sha256(good(9)).hexdigest()}"
    assert "is in the gallery already" in problem(same, 409)
    assert (as_form.status_code, as_form.json()["label"]) == (201, "x")


@pytest.mark.parametrize(
    ("said", "now"),
    [
        ({"label": "cow", "time": None}, {"label": "cow", "time": None}),
        ({"identity": "7", "camera": None}, {"identity": "7", "camera": None}),
        ({"time": 3}, {"time": 3.0}),
        ({"extra": {"seen": None, "new": {"deep": None}}}, {"extra": {"by": "me", "new": {"deep": None}}}),
        ({"extra": None}, {"extra": {}}),
        ({}, {}),
    ],
)
def test_relabel(api, gallery, said, now):
    before = vars(gallery.item(3))
    answer = ask(api, patch(3, **said))
    assert answer.json() == {**before, **now}
    with reopened(gallery) as later:
        assert vars(later.item(3)) == answer.json()


def test_another_picture(api, gallery, encoder):
    answer, found = ask(
        api,
        lambda http: http.put("/v1/items/2/image", content=good(20), headers=PNG),
        lambda http: http.post("/v1/search/image?k=1", content=good(20), headers=PNG),
    )
    assert answer.json() == vars(gallery.item(2))
    assert [hit["id"] for hit in found.json()["hits"]] == [2]
    with reopened(gallery) as later:
        np.testing.assert_allclose(later.vector(2), encoder.embed([good(20)])[0], atol=1e-6)


def test_remove(api, gallery):
    answer, gone, twice, added = ask(
        api,
        lambda http: http.delete(f"/v1/items/{COUNT}"),
        get(f"/v1/items/{COUNT}"),
        lambda http: http.delete(f"/v1/items/{COUNT}"),
        post(9),
    )
    assert (answer.status_code, answer.content) == (204, b"")
    assert problem(gone, 404) == problem(twice, 404) == f"there is no item {COUNT}; was it removed?"
    assert added.json()["id"] == COUNT + 1, "ids are never used again"
    with reopened(gallery) as later:
        assert COUNT not in later.ids()


NAN = '{"time": NaN}'
JSON, TEXT = {"content-type": "application/json"}, {"content-type": "text/plain"}


@pytest.mark.parametrize(
    ("status", "match", "call"),
    [
        (404, "no item 99", get("/v1/items/99")),
        (404, "no item 99", get("/v1/items/99/vector")),
        (404, "no item 99", patch(99, label="x")),
        (404, "no item 99", lambda http: http.put("/v1/items/99/image", content=good(), headers=PNG)),
        (422, "item_id", get("/v1/items/0")),
        (422, "item_id", get(f"/v1/items/{2**63}")),
        (422, "item_id", get("/v1/items/one")),
        (422, "item_id", lambda http: http.delete("/v1/items/-1")),
        (400, "filter", get("/v1/items", where="colour = red")),
        (400, "filter", get("/v1/items", where="label = '\0'")),
        (422, "limit", get("/v1/items", limit=0)),
        (422, "limit: Input should be less than or equal to 1000", get("/v1/items", limit=10**30)),
        (422, "offset", get("/v1/items", offset=2**63)),
        (422, "offset", get("/v1/items", offset=-1)),
        (422, "not a readable picture", lambda http: http.post("/v1/items", content=b"junk", headers=PNG)),
        (422, "empty file", lambda http: http.post("/v1/items", content=b"", headers=PNG)),
        (415, "missing", lambda http: http.post("/v1/items", content=good())),
        (400, "Too many files", lambda http: http.post("/v1/items", files=form(good(), good()))),
        (422, "time", post(9, time="nan")),
        (422, "time", post(9, time="tomorrow")),
        (422, "source", post(9, source="")),
        (422, "source", post(9, source="a\0b")),
        (422, "label", post(9, label="x" * 1001)),
        (422, "extra: wanted a JSON object", post(9, extra="[1]")),
        (422, "extra: wanted a JSON object", post(9, extra='{"a": NaN}')),
        (422, "extra: wanted a JSON object", post(9, extra='{"a": 1e999}')),
        (422, "extra: wanted a JSON object", post(9, extra="{")),
        (422, "colour", post(9, colour="red")),
        (422, "label", patch(3, label=5)),
        (422, "time", patch(3, time="5")),
        (422, "time", patch(3, time=True)),
        (422, "extra", patch(3, extra=[1])),
        (422, "colour", patch(3, **{"colour\n": "red"})),
        (422, "id", patch(3, id=5)),
        (422, "time", lambda http: http.patch("/v1/items/3", content=NAN, headers=JSON)),
        (400, "JSON", lambda http: http.patch("/v1/items/3", content=b"{", headers=JSON)),
        (400, "JSON", lambda http: http.patch("/v1/items/3", content=b"", headers=JSON)),
        (400, "JSON", lambda http: http.patch("/v1/items/3", content=b'{"label": "\xff"}', headers=JSON)),
        (400, "JSON", lambda http: http.patch("/v1/items/3", content=b'{"label": "\\ud800"}', headers=JSON)),
        (400, "JSON", lambda http: http.patch("/v1/items/3", content=b"[" * 5000, headers=JSON)),
        (415, "text/plain, wanted application/json", lambda http: http.patch("/v1/items/3", content=b"{}", headers=TEXT)),
        (413, "at most 1,048,576", patch(3, label="x" * 2**20)),
    ],
)  # fmt: skip
def test_refusals_change_nothing(api, gallery, status, match, call):
    before = gallery.items()
    assert match in problem(ask(api, call), status)
    assert gallery.items() == before


def test_an_infinite_number_in_extra_is_no_json(api, gallery):
    answer = ask(api, lambda http: http.patch("/v1/items/3", content=b'{"extra": {"a": 1e999}}', headers=JSON))
    assert "extra" in problem(answer, 422)


def test_another_writer_that_does_not_end_is_a_503_and_readers_go_on(api, gallery, monkeypatch):
    monkeypatch.setattr(serve.storage.catalog_file, "_WAIT_S", 0.05)
    gallery.close()
    with (
        Gallery.open(gallery.folder, gallery.encoder) as fresh,
        sqlite3.connect(gallery.folder / "catalog.sqlite", isolation_level=None) as other,
    ):
        api = create_api(fresh.encoder, gallery=fresh)
        other.execute("BEGIN IMMEDIATE")
        busy, read, *rest = ask(api, post(9), get("/v1/items/3"), patch(3, label="x"), lambda http: http.delete("/v1/items/3"))
        other.execute("ROLLBACK")
        done = ask(api, post(9))
    for answer in (busy, *rest):
        assert "another process has been writing" in problem(answer, 503)
        assert answer.headers["retry-after"] == "1"
    assert read.status_code == 200
    assert done.status_code == 201


def test_a_gallery_that_cannot_be_read_is_a_503_and_not_a_404(api, gallery):
    gallery.close()
    for answer in ask(api, get("/v1/items/3"), get("/v1/items"), post(9), lambda http: http.post("/v1/search", json={"id": 3})):
        assert "has been closed" in problem(answer, 503)
    assert "simclr_gallery_items NaN" in ask(api, get("/metrics")).text


def test_a_damaged_item_is_a_500_and_not_a_404(api, gallery):
    with closing(sqlite3.connect(gallery.folder / "catalog.sqlite", isolation_level=None)) as disk:
        disk.execute("UPDATE items SET extra = '{' WHERE id = 2")
        disk.execute("UPDATE vectors SET vector = x'00' WHERE id = 3")
        disk.execute("DELETE FROM vectors WHERE id = 4")
    item, relabelled, whole, *vectors = ask(
        api,
        get("/v1/items/2"),
        patch(2, label="x"),
        get("/v1/items/3"),
        *[get(f"/v1/items/{item_id}/vector") for item_id in (3, 4)],
        *[search(id=item_id) for item_id in (3, 4)],
    )
    for answer in (item, relabelled):
        assert "item 2: changed on the disk" in problem(answer, 500)
    assert whole.json()["source"] == "2.png"
    for answer in vectors:
        assert "its vector is damaged or missing; update or remove it" in problem(answer, 500)
    repaired, removed, gone = ask(
        api,
        lambda http: http.put("/v1/items/3/image", content=good(), headers=PNG),
        lambda http: http.delete("/v1/items/2"),
        get("/v1/items/2"),
    )
    assert (repaired.status_code, removed.status_code, gone.status_code) == (200, 204, 404)


def test_what_another_process_adds_is_seen(api, gallery, encoder):
    with reopened(gallery) as other:
        (item_id,) = other.add([Sample("theirs.png")], encoder.embed([good(30)])).ids
        item, found = ask(
            api, get(f"/v1/items/{item_id}"), lambda http: http.post("/v1/search/image?k=1", content=good(30), headers=PNG)
        )
    assert item.json()["source"] == "theirs.png"
    assert found.json()["hits"][0]["id"] == item_id


def test_writes_wait_in_line_without_holding_up_readers(encoder, gallery):
    """One that is given up before its turn never begins."""
    entered, go, writes = threading.Event(), threading.Event(), []
    add = gallery.add

    def slow(*args, **kwargs):
        writes.append(args)
        entered.set()
        go.wait(20)
        return add(*args, **kwargs)

    gallery.add = slow

    async def run():
        async with client(create_api(encoder, gallery=gallery, limits=Limits(answer_s=0.4))) as http:
            late = await asyncio.gather(post(9)(http), post(10)(http))
            assert (await get("/v1/items/3")(http)).status_code == 200
            go.set()
            return late

    for answer in asyncio.run(run()):
        assert "A write may still be done" in problem(answer, 503)
    assert len(writes) == 1


def test_a_wrong_method_is_told_the_right_ones(api):
    items, item, image = ask(
        api,
        lambda http: http.delete("/v1/items"),
        lambda http: http.post("/v1/items/3"),
        lambda http: http.get("/v1/items/3/image"),
    )
    allowed = [(problem(answer, 405), answer.headers["allow"]) for answer in (items, item, image)]
    assert [methods for _, methods in allowed] == ["GET, POST", "DELETE, GET, PATCH", "PUT"]


def test_no_gallery_no_routes(encoder):
    for answer in ask(create_api(encoder), get("/v1/items"), lambda http: http.post("/v1/search", json={"id": 1})):
        problem(answer, 404)


def test_a_gallery_of_another_encoder(gallery, tmp_path):
    other = OnnxEncoder(write_toy_encoder(tmp_path / "other", seed=1)[0])
    with pytest.raises(EncoderMismatch, match=f"{gallery.info().encoder_id}.*{other.encoder_id}"):
        create_api(other, gallery=gallery)
    assert gallery.info().embedding_dim == DIM
