"""What a gallery does, wherever it is kept."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.contract import Manifest
from serve.errors import EncoderMismatch, GalleryError, NoSuchItem
from serve.gallery import Gallery
from serve.preprocess import ImageError
from serve.samples import Sample
from tests.gallery_items import samples_of, vectors_of


@pytest.fixture
def gallery(address, toy_encoder):
    with Gallery.open(address, toy_encoder, create=True) as gallery:
        yield gallery


def test_pictures_go_in_and_are_found(gallery, pictures):
    samples = pictures(12)
    done = []
    report = gallery.add(samples, batch_size=5, on_batch=done.append)
    assert (len(report.ids), report.unreadable, report.already_present) == (12, (), 0)
    assert sum(done) == 12
    for item_id, sample in zip(report.ids, samples, strict=True):
        hit, *others = gallery.search(sample.source, k=3)
        assert (hit.id, hit.source, hit.label) == (item_id, sample.source, sample.label)
        assert (hit.identity, hit.camera, hit.time) == (sample.identity, sample.camera, sample.time)
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert hit.score <= 1
        assert [h.score for h in (hit, *others)] == sorted((h.score for h in (hit, *others)), reverse=True)
        assert gallery.search(gallery.vector(item_id), k=1)[0].id == item_id
    with Image.open(samples[0].source) as image:
        assert gallery.search(image, k=1)[0].id == report.ids[0]
    assert gallery.search(Path(samples[0].source).read_bytes(), k=1)[0].id == report.ids[0]
    assert sound(gallery)


def test_unreadable_pictures_are_returned_and_the_rest_goes_in(gallery, pictures, tmp_path):
    samples = pictures(3)
    broken = tmp_path / "pictures" / "broken.png"
    broken.write_bytes(b"no picture")
    odd = Sample(str(tmp_path / "n\udcffm.png"))
    report = gallery.add([samples[0], Sample(str(broken)), samples[1], Sample("missing.png"), odd, samples[2]])
    assert len(report.ids) == len(gallery) == 3
    assert sorted(bad.source for bad in report.unreadable) == sorted(
        [str(broken), "missing.png", str(tmp_path / r"n\udcffm.png")]
    )


def test_adding_again_skips_what_is_in_without_decoding_it(gallery, pictures, monkeypatch):
    samples = pictures(6)
    gallery.add(samples[:4])
    embedded = []
    monkeypatch.setattr(gallery.encoder, "embed", lambda images: embedded.append(len(images)) or vectors_of(len(images)))
    done = []
    report = gallery.add([*samples, samples[5]], on_batch=done.append)
    assert (len(report.ids), report.already_present, embedded, sum(done)) == (2, 5, [2], 7)
    assert gallery.add(samples).already_present == 6


def test_ctrl_c_keeps_the_batches_that_were_done(gallery, pictures):
    samples = pictures(6)

    def stop(done):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gallery.add(samples, batch_size=2, on_batch=stop)
    assert len(gallery) == 2
    assert gallery.add(samples, batch_size=2).already_present == 2
    assert len(gallery) == 6


def test_given_vectors_are_normalised_and_extra_facts_kept(gallery):
    report = gallery.add(samples_of(3), vectors_of(3) * 50, extra={"s1": {"box": [1, 2, 3, 4]}})
    np.testing.assert_allclose(np.linalg.norm(gallery.vector(report.ids[1])), 1, rtol=1e-6)
    assert gallery.item(report.ids[1]).extra == {"box": [1, 2, 3, 4]}
    assert gallery.item(report.ids[0]).extra == {}
    assert len(gallery.search(vectors_of(1)[0] * 1e6)) == 3


@pytest.mark.parametrize(
    ("vectors", "complaint"),
    [
        (vectors_of(2), "got 2 vectors for 3 samples"),
        (vectors_of(3, dim=4), r"wanted numbers of shape \(N, 16\)"),
        (np.zeros((3, 16), np.float32), "row 0 is zero"),
        (np.full((3, 16), np.nan, np.float32), "not a number"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_nothing_goes_in(gallery, vectors, complaint):
    with pytest.raises(GalleryError, match=complaint):
        gallery.add(samples_of(3), vectors)
    assert len(gallery) == 0


def sound(gallery):
    """Folders can be verified."""
    return "://" in gallery.address or gallery.verify() == []


CLAUSES = {
    "label = l1": lambda s: s.label == "l1",
    "label != l0": lambda s: s.label != "l0",
    "camera = 1": lambda s: s.camera == "1",
    "identity in (0, 3)": lambda s: s.identity in ("0", "3"),
    "time >= 20": lambda s: s.time >= 20,
    "time < 41.5": lambda s: s.time < 41.5,
    "source != s7": lambda s: s.source != "s7",
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clauses=st.lists(st.sampled_from(sorted(CLAUSES)), max_size=3),
    k=st.integers(1, 70),
    seed=st.integers(0, 1000),
    excluded=st.lists(st.integers(1, 60), max_size=20),
)
def test_filtered_search_is_brute_force_over_the_allowed(gallery, clauses, k, seed, excluded):
    samples, vectors = samples_of(60), vectors_of(60)
    if not len(gallery):
        gallery.add(samples, vectors)
    query = vectors_of(1, seed)[0]
    cosine = {i + 1: v @ query / np.linalg.norm(v) / np.linalg.norm(query) for i, v in enumerate(vectors)}
    passing = [i for i in cosine if i not in excluded and all(CLAUSES[clause](samples[i - 1]) for clause in clauses)]
    wanted = sorted(passing, key=lambda i: -cosine[i])[:k]
    hits = gallery.search(query, k, " and ".join(clauses), excluded)
    assert [hit.id for hit in hits] == wanted
    np.testing.assert_allclose([hit.score for hit in hits], [cosine[i] for i in wanted], atol=1e-5)
    assert [hit.source for hit in hits] == [samples[i - 1].source for i in wanted]


@pytest.mark.parametrize(
    ("query", "k", "complaint"),
    [
        (vectors_of(1)[0], 0, "k is 0, wanted 1 or more"),
        (vectors_of(1, dim=5)[0], 3, r"query: got float32\(1, 5\), wanted"),
        (vectors_of(2), 3, "query: got"),
        (np.full(16, np.nan), 3, "not a number"),
        (np.zeros(16), 3, "zero"),
    ],
)
def test_a_query_that_cannot_be_is_refused_in_one_line(gallery, query, k, complaint):
    with pytest.raises(GalleryError, match=complaint) as caught:
        gallery.search(query, k)
    assert "\n" not in str(caught.value)


def test_a_query_picture_that_cannot_be_read(gallery):
    with pytest.raises(ImageError, match="not a readable picture"):
        gallery.search(b"no picture")


def test_remove(gallery):
    ids = gallery.add(samples_of(10), vectors_of(10)).ids
    query = gallery.vector(ids[4])
    with pytest.raises(GalleryError, match="no item with id 77; nothing was removed"):
        gallery.remove([ids[4], 77])
    assert gallery.search(query, 1)[0].id == ids[4]
    gallery.remove(np.array([ids[4], ids[5]]))
    assert len(gallery) == 8
    assert not {ids[4], ids[5]} & {hit.id for hit in gallery.search(query, 20)}
    for ask in (gallery.item, gallery.vector):
        for gone in (ids[4], 50**30):
            with pytest.raises(NoSuchItem, match=f"no item with id {gone}"):
                ask(gone)
    assert gallery.add(samples_of(10), vectors_of(10)).ids == (11, 12)
    assert sound(gallery)


def test_update_by_picture_and_by_vector(gallery, pictures):
    samples = pictures(4)
    ids = gallery.add(samples[:3]).ids
    gallery.update(ids[0], samples[3].source, source=samples[3].source)
    gallery.update(np.int64(ids[1]), vectors_of(1)[0] * 7)
    assert [item.source for item in gallery.items()] == [samples[3].source, samples[1].source, samples[2].source]
    assert gallery.search(samples[3].source, 1)[0].id == ids[0]
    assert gallery.search(vectors_of(1)[0], 1)[0].id == ids[1]
    assert gallery.search(samples[0].source, 1)[0].score < 0.999
    assert len(gallery.search(vectors_of(1)[0], 10)) == 3
    assert sound(gallery)


@pytest.mark.parametrize(
    ("item_id", "vector", "complaint"),
    [
        (9, np.ones(16), "no item with id 9"),
        (1, np.zeros(16), "the new vector: row 0 is zero"),
        (1, np.ones(5), "new vector: got"),
    ],
)
def test_an_update_that_cannot_be_is_refused(gallery, item_id, vector, complaint):
    gallery.add(samples_of(2), vectors_of(2))
    before = gallery.vector(1)
    with pytest.raises(GalleryError, match=complaint):
        gallery.update(item_id, vector)
    np.testing.assert_array_equal(gallery.vector(1), before)


def test_what_is_relabelled_is_found_by_its_new_label(gallery):
    ids = gallery.add(samples_of(9), vectors_of(9)).ids
    query = vectors_of(1)[0]
    assert len(gallery.search(query, 9, "label = l0")) == 3
    gallery.relabel(np.array(ids[:2]), label="new", camera=None, extra={"by": "hand"})
    assert {hit.id for hit in gallery.search(query, 9, "label = new")} == set(ids[:2])
    assert gallery.item(ids[0]).extra == {"by": "hand"}
    assert gallery.count("camera is unknown") == 2
    with pytest.raises(GalleryError, match="no item with id 77; nothing was changed"):
        gallery.relabel([1, 77], label="x")
    assert gallery.item(1).label == "new"


@pytest.fixture
def crowd(gallery):
    """60 items of which many are alike: pages must not repeat or leave out any of them."""
    vectors = np.repeat(vectors_of(12), 5, axis=0)
    gallery.add(samples_of(60), vectors)
    gallery.remove([7, 8, 30])
    return gallery


def ranking(gallery, query, where=None):
    """Slow and obvious: all cosines, sorted by score and id."""
    query = query / np.linalg.norm(query)
    scores = {int(i): float(gallery.vector(i) @ query) for i in gallery.ids(where)}
    return sorted(scores.items(), key=lambda found: (-round(found[1], 5), found[0]))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 57, 100])
@pytest.mark.parametrize("where", [None, "camera = 1"])
def test_pages_show_everything_once_and_in_order(crowd, size, where):
    query = vectors_of(1, seed=3)[0]
    wanted = ranking(crowd, query, where)
    pages = [crowd.search(query, size, where, offset=offset) for offset in range(0, 60, size)]
    assert [hit.id for page in pages for hit in page] == [item_id for item_id, _ in wanted]
    assert all(len(page) == size for page in pages[: len(wanted) // size])
    assert crowd.search(query, 5, where, offset=1000) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    threshold=st.floats(-1, 1),
    where=st.sampled_from([None, "camera = 1", "label = nobody"]),
    limit=st.none() | st.integers(1, 80),
    excluded=st.lists(st.integers(1, 60), max_size=5),
)
def test_within_is_all_above_the_threshold(crowd, threshold, where, limit, excluded):
    query = vectors_of(1, seed=4)[0]
    wanted = [(i, score) for i, score in ranking(crowd, query, where) if i not in excluded]
    assume(all(abs(score - threshold) > 1e-5 for _, score in wanted))
    hits = crowd.within(query, threshold, where, limit, excluded)
    assert [hit.id for hit in hits] == [i for i, score in wanted if score > threshold][:limit]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in wanted[: len(hits)]], atol=1e-5)


def test_within_asks_for_more_until_the_threshold_is_passed(gallery):
    gallery.add(samples_of(700), vectors_of(700))
    query = vectors_of(1, seed=5)[0]
    assert [hit.id for hit in gallery.within(query, -1)] == [hit.id for hit in gallery.search(query, 700)]
    half = gallery.search(query, 350)
    assert gallery.within(query, half[-1].score) == half


def test_many_queries_at_once_are_one_after_the_other(crowd):
    queries = vectors_of(9, seed=6)
    for k, where in ((3, None), (4, "camera = 1"), (80, None), (2, "label = nobody")):
        scores, ids = crowd.search_many(queries, k, where)
        assert scores.shape == ids.shape == (9, k)
        for query, row_scores, row_ids in zip(queries, scores, ids, strict=True):
            hits = crowd.search(query, k, where)
            n = len(hits)
            np.testing.assert_allclose(row_scores[:n], [hit.score for hit in hits], atol=1e-6)
            assert (row_ids[n:] == -1).all()
            assert (row_scores[n:] == -np.inf).all()
            assert len(set(row_ids[:n].tolist())) == n


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda g: g.search(np.ones(16), offset=-1), "offset is -1"),
        (lambda g: g.within(np.ones(16), 1.5), "threshold is 1.5, wanted -1 to 1"),
        (lambda g: g.within(np.ones(16), float("nan")), "threshold is nan"),
        (lambda g: g.within(np.ones(16), 0.5, limit=0), "k is 0"),
        (lambda g: g.within(np.ones(16), 0.5, offset=-2), "offset is -2"),
        (lambda g: g.search_many(np.ones((2, 16)), 0), "k is 0"),
        (lambda g: g.search_many(np.ones(16)), "queries: got"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_one_line(gallery, ask, complaint):
    with pytest.raises(GalleryError, match=complaint) as caught:
        ask(gallery)
    assert "\n" not in str(caught.value)


def test_a_hit_that_is_removed_or_relabelled_meanwhile_gives_its_place_away(gallery, monkeypatch):
    gallery.add(samples_of(6), vectors_of(6))
    query, nearest = vectors_of(1)[0], gallery._store.nearest
    best = [hit.id for hit in gallery.search(query, 6)]
    for meanwhile in (lambda: gallery.remove([best[0]]), lambda: gallery.relabel([best[1]], label="other")):
        done = []

        def nearest_and_then(*asked, meanwhile=meanwhile, done=done):
            found = nearest(*asked)
            if not done:
                done.append(meanwhile())
            return found

        monkeypatch.setattr(gallery._store, "nearest", nearest_and_then)
        where = "label in (l0, l1, l2)"
        assert [hit.id for hit in gallery.search(query, 2, where)] == [hit.id for hit in gallery.search(query, 6, where)][:2]


def test_items_and_drop_downs(gallery):
    gallery.add(samples_of(11), vectors_of(11))
    assert [item.source for item in gallery.items("camera = 1", limit=2, offset=1)] == ["s3", "s5"]
    assert len(gallery.items()) == 11
    assert gallery.distinct("label") == ["l0", "l1", "l2"]
    assert gallery.distinct("source")[-2:] == ["s9", "s10"]


def test_info(gallery, toy_encoder):
    gallery.add(samples_of(5), vectors_of(5))
    gallery.encoder_spec = "grpc://host:8001/toy"
    info = gallery.info()
    assert (info.count, info.embedding_dim, info.encoder_id, info.encoder_name) == (5, 16, toy_encoder.encoder_id, "toy")
    assert info.bytes_on_disk > 5 * 16 * 4
    with Gallery.open(gallery.address) as again:
        assert again.encoder_spec == "grpc://host:8001/toy"
        assert Manifest.parse(again.manifest, "manifest") == toy_encoder.manifest


def test_vectors_of_two_encoders_are_refused_with_the_repair(gallery, toy_encoder, other_encoder):
    repair = "gallery add NEW" if "://" in gallery.address else f"gallery reembed {gallery.address}"
    for create in (False, True):
        with pytest.raises(EncoderMismatch) as caught:
            Gallery.open(gallery.address, other_encoder, create=create)
        message = str(caught.value)
        assert toy_encoder.encoder_id in message
        assert other_encoder.encoder_id in message
        assert f"simclr {repair} --" in message
        assert "\n" not in message


def test_a_gallery_is_made_only_when_asked_and_for_an_encoder(address, toy_encoder):
    with pytest.raises(GalleryError, match="no such gallery; make one: simclr gallery add"):
        Gallery.open(address, toy_encoder)
    with pytest.raises(GalleryError, match="needs the encoder"):
        Gallery.open(address, create=True)
    with pytest.raises(GalleryError, match="no such gallery"):
        Gallery.open(address)


def test_ids_are_not_used_again_by_the_next_session_either(gallery, toy_encoder):
    gallery.add(samples_of(5), vectors_of(5))
    gallery.remove([4, 5])
    gallery.close()
    with Gallery.open(gallery.address) as again:
        assert again.next_id == 6
        assert again.add(samples_of(6), vectors_of(6)).ids == (6, 7, 8)
        with pytest.raises(GalleryError, match="id 5 has been used"):
            again.add([Sample("new")], vectors_of(1), ids={"new": 5})
        with pytest.raises(GalleryError, match="id 3 has been used"):
            again.add([Sample("new")], vectors_of(1), ids={"new": 3})
        with pytest.raises(GalleryError, match="got ids from 0 on, or one twice; wanted unused ones from 1 on"):
            again.add([Sample("new")], vectors_of(1), ids={"new": 0})
        assert again.add([Sample("new")], vectors_of(1), ids={"new": 20}).ids == (20,)
        assert again.add([Sample("newer")], vectors_of(1)).ids == (21,)


def test_rows_are_items_with_their_vectors(crowd):
    blocks = list(crowd.rows("camera = 1"))
    assert [item for items, _ in blocks for item in items] == crowd.items("camera = 1")
    for items, vectors in blocks:
        for item, vector in zip(items, vectors, strict=True):
            np.testing.assert_array_equal(vector, crowd.vector(item.id))


def test_without_an_encoder_vectors_still_work(gallery, pictures):
    (sample,) = pictures(1)
    gallery.add([sample])
    with Gallery.open(gallery.address) as bare:
        assert bare.search(bare.vector(1), 1)[0].source == sample.source
        bare.add([Sample("given")], vectors_of(1))
        for action in (lambda: bare.search(sample.source), lambda: bare.add([Sample("x")])):
            with pytest.raises(GalleryError, match="opened without an encoder"):
                action()


def test_two_handles_see_each_others_changes(gallery):
    """Two Gallery objects share nothing but the store, as two processes do."""
    with Gallery.open(gallery.address) as other:
        gallery.add(samples_of(3), vectors_of(3))
        assert len(other.search(vectors_of(1)[0])) == 3
        other.remove([2])
        assert [hit.id for hit in gallery.search(gallery.vector(1), where="camera = 0")] == [1, 3]


def test_threads_search_while_others_add_and_remove(gallery):
    gallery.add(samples_of(20, "first"), vectors_of(20))
    query = gallery.vector(1)
    stop, failures = threading.Event(), []

    def search():
        while not stop.is_set():
            try:
                hits = gallery.search(query, 10, where="camera in (0, 1)")
                assert len(hits) == 10
                assert hits[0].id == 1
                gallery.distinct("label")
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=search) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(15):
            ids = gallery.add(samples_of(20, f"{turn}/"), vectors_of(20, seed=turn + 1), batch_size=7).ids
            gallery.remove(ids[::2])
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert failures == []
    assert len(gallery) == 20 + 15 * 10
    assert sound(gallery)
