"""Who is it, over HTTP: known, unknown and undecided; several pictures of one probe; what cannot be asked is said."""

import numpy as np
import pytest

import serve.gateway.reid
from serve.api import create_api
from serve.errors import EncoderMismatch
from serve.gallery import Gallery
from serve.gateway.keys import Keyring, add_key
from serve.gateway.limits import MAX_HITS, Limits
from serve.identity.identify import identify
from serve.samples import Sample
from tests.asgi_client import PNG, ask, form, problem
from tests.bad_images import good
from tests.thresholds import calibration
from tests.toy_encoder import DIM

COUNT, PEOPLE = 12, 4


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, encoder):
    """Four people of three pictures each."""
    with Gallery.open(tmp_path_factory.mktemp("gallery"), encoder, create=True) as opened:
        samples = [Sample(f"{i}.png", identity=f"p{i % PEOPLE}", camera=str(i % 3)) for i in range(COUNT)]
        opened.add(samples, encoder.embed([good(i) for i in range(COUNT)]))
        yield opened


@pytest.fixture(scope="module")
def chosen(encoder):
    """Who is exactly as enrolled is known, nobody else."""
    return calibration(encoder_id=encoder.encoder_id, threshold=0.9999, identities=PEOPLE)


@pytest.fixture(scope="module")
def api(encoder, gallery, chosen):
    return create_api(encoder, gallery=gallery, calibration=chosen, limits=Limits(max_pictures=4))


def who(**body):
    return lambda http: http.post("/v1/reid/identify", json=body)


def image(*numbers, **params):
    return lambda http: http.post("/v1/reid/identify/image", files=form(*map(good, numbers)), params=params)


def told(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


def same(found, decision):
    """An answer is what `identify` decides."""
    assert (found["verdict"], found["identity"], found["threshold"]) == (
        decision.verdict,
        decision.identity,
        decision.threshold,
    )
    assert found["score"] == pytest.approx(decision.score, abs=1e-6)
    assert found["probability"] == pytest.approx(decision.probability, abs=1e-5)
    assert [{**hit, "score": 0} for hit in found["candidates"]] == [{**vars(hit), "score": 0} for hit in decision.candidates]


def test_four_ways_to_ask_for_the_same(api, encoder, gallery, chosen):
    vector = gallery.vector(6)
    decision = identify(gallery, vector[None], chosen)
    answers = ask(
        api,
        who(vector=vector.tolist()),
        who(vectors=[(3 * vector).tolist()], id=None),
        image(5),
        lambda http: http.post("/v1/reid/identify/image", content=good(5), headers=PNG),
    )
    assert (decision.verdict, decision.identity) == ("known", "p1")
    for answer in answers:
        same(told(answer), decision)
        assert (answer.json()["encoder_id"], answer.json()["warning"]) == (encoder.encoder_id, None)


def test_a_stranger_is_unknown_and_ranked(api):
    found = told(ask(api, image(77)))
    assert (found["verdict"], found["identity"]) == ("unknown", None)
    assert found["score"] == found["candidates"][0]["score"] < found["threshold"]
    assert sorted(hit["identity"] for hit in found["candidates"]) == ["p0", "p1", "p2", "p3"]


def test_without_a_calibration_nothing_is_decided(encoder, gallery):
    found = told(ask(create_api(encoder, gallery=gallery), image(5)))
    nothing = ("identity", "probability", "threshold", "warning")
    assert (found["verdict"], *(found[name] for name in nothing)) == ("undecided", None, None, None, None)
    assert found["candidates"][0]["identity"] == "p1"


def test_several_pictures_are_one_probe(api, encoder, gallery, chosen):
    vectors = encoder.embed([good(5), good(9), good(77)])
    pictures, sent = ask(api, image(5, 9, 77, k=3), who(vectors=vectors.tolist(), k=3))
    for answer in (pictures, sent):
        same(told(answer), identify(gallery, vectors, chosen, k=3))


def test_an_item_does_not_find_itself(api, gallery, chosen):
    found = told(ask(api, who(id=6)))
    same(found, identify(gallery, gallery.vector(6)[None], chosen, exclude_ids=[6]))
    assert found["verdict"] == "unknown"
    assert 6 not in [hit["id"] for hit in found["candidates"]]


@pytest.mark.parametrize("ask_by", [lambda **among: who(id=6, **among), lambda **among: image(5, **among)])
def test_whom_to_look_among(api, ask_by):
    two, camera, nobody = ask(api, ask_by(k=2), ask_by(where="camera = 0"), ask_by(where="identity = p9"))
    assert len(told(two)["candidates"]) == 2
    assert {hit["camera"] for hit in told(camera)["candidates"]} == {"0"}
    found = told(nobody)
    assert (found["verdict"], found["score"], found["probability"], found["candidates"]) == ("unknown", None, None, [])


@pytest.mark.parametrize(
    ("status", "match", "call"),
    [
        (422, "got nothing to search with, wanted exactly one of id, vector, url, vectors", who()),
        (422, "got id and vectors", who(id=3, vectors=[[1.0] * DIM])),
        (404, "no item 99", who(id=99)),
        (422, "id", who(id=True)),
        (422, f"(N, {DIM})", who(vector=[1.0])),
        (422, f"(N, {DIM})", who(vectors=[[1.0] * DIM, [1.0]])),
        (422, "vectors", who(vectors=[])),
        (422, "zero", who(vectors=[[0.0] * DIM])),
        (422, "no direction", who(vectors=[[1.0] * DIM, [-1.0] * DIM])),
        (422, "vectors.0.0", who(vectors=[["x"]])),
        (422, f"k: Input should be less than or equal to {MAX_HITS}", who(id=3, k=MAX_HITS + 1)),
        (422, "k", who(id=3, k=0)),
        (400, "filter", who(id=3, where="colour = red")),
        (422, "threshold", who(id=3, threshold=0.5)),
        (400, "JSON", lambda http: http.post("/v1/reid/identify", content=b"{", headers={"content-type": "application/json"})),
        (415, "image/png", lambda http: http.post("/v1/reid/identify", content=good(), headers=PNG)),
        (403, "may not ask pictures.example", who(url="https://pictures.example/a.png")),
        (422, "k", image(1, k=0)),
        (422, "offset", image(1, offset=1)),
        (400, "filter", image(1, where="nonsense")),
        (400, "Too many files", image(1, 2, 3, 4, 5)),
        (400, "no file named images", lambda http: http.post("/v1/reid/identify/image", files={"other": good()})),
        (422, "not a readable picture", lambda http: http.post("/v1/reid/identify/image", files=form(good(), b"junk"))),
        (415, "application/json", lambda http: http.post("/v1/reid/identify/image", json={"id": 3})),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(api, status, match, call):
    assert match in problem(ask(api, call), status)


def test_the_scope_to_read_is_enough(encoder, gallery, tmp_path):
    secret = add_key(tmp_path / "keys", "me", "read")
    api = create_api(encoder, gallery=gallery, keys=Keyring(tmp_path / "keys"))
    headers = {"authorization": f"Bearer {secret}"}
    answers = ask(
        api,
        lambda http: http.post("/v1/reid/identify", json={"id": 3}, headers=headers),
        lambda http: http.post("/v1/reid/identify/image", content=good(), headers=PNG | headers),
        who(id=3),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 401]


def test_an_empty_gallery(encoder, chosen, tmp_path):
    with Gallery.open(tmp_path / "empty", encoder, create=True) as empty:
        found = told(ask(create_api(encoder, gallery=empty, calibration=chosen), image(1)))
    assert (found["verdict"], found["score"], found["candidates"], found["warning"]) == ("unknown", None, [], None)


def test_no_gallery_no_routes(encoder, chosen):
    problem(ask(create_api(encoder, calibration=chosen), who(id=1)), 404)


def test_a_calibration_of_another_encoder(encoder, gallery):
    with pytest.raises(EncoderMismatch, match=f"0123456789abcdef.*{encoder.encoder_id}"):
        create_api(encoder, gallery=gallery, calibration=calibration())


def test_a_gallery_that_has_outgrown_its_threshold_is_looked_at_now_and_then(encoder, tmp_path, monkeypatch):
    chosen = calibration(encoder_id=encoder.encoder_id, identities=2)
    with Gallery.open(tmp_path / "gallery", encoder, create=True) as gallery:
        gallery.add([Sample(f"{i}", identity=str(i)) for i in range(2)], np.eye(DIM, dtype=np.float32)[:2])
        api = create_api(encoder, gallery=gallery, calibration=chosen)
        assert told(ask(api, who(id=1)))["warning"] is None
        gallery.add([Sample(f"{i}", identity=str(i)) for i in range(2, 5)], np.eye(DIM, dtype=np.float32)[2:5])
        assert told(ask(create_api(encoder, gallery=gallery), who(id=1)))["warning"] is None
        monkeypatch.setattr(serve.gateway.reid, "_LOOK_AGAIN_S", 1e-9)
        assert "2 identities, now there are 5: expect an FPIR of about" in told(ask(api, who(id=1)))["warning"]
