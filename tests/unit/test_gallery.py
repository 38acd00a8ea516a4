import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import serve.index
from serve.contract import Manifest
from serve.errors import EncoderMismatch, GalleryError
from serve.gallery import Gallery
from serve.preprocess import ImageError
from serve.sources import Sample


@pytest.fixture
def gallery(tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        yield gallery


def vectors_of(count, seed=0, dim=16):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def samples_of(count, prefix="s"):
    return [
        Sample(f"{prefix}{i}", label=f"l{i % 3}", identity=str(i % 5), camera=str(i % 2), time=float(i)) for i in range(count)
    ]


def test_pictures_go_in_and_are_found(gallery, pictures):
    samples = pictures(12)
    done = []
    report = gallery.add(samples, batch_size=5, on_batch=done.append)
    assert (len(report.ids), report.unreadable, report.already_present) == (12, (), 0)
    assert sum(done) == 12
    for item_id, sample in zip(report.ids, samples, strict=True):
        hit, *others = gallery.search(sample.source, k=3)
        assert (hit.id, hit.source, hit.label, hit.identity, hit.camera, hit.time) == (item_id, *vars(sample).values())
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert hit.score <= 1
        assert [h.score for h in (hit, *others)] == sorted((h.score for h in (hit, *others)), reverse=True)
        assert gallery.search(gallery.vector(item_id), k=1)[0].id == item_id
    with Image.open(samples[0].source) as image:
        assert gallery.search(image, k=1)[0].id == report.ids[0]
    assert gallery.search(Path(samples[0].source).read_bytes(), k=1)[0].id == report.ids[0]
    assert gallery.verify() == []


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
        with pytest.raises(GalleryError, match="no item with id 5"):
            ask(ids[4])
    assert gallery.add(samples_of(10), vectors_of(10)).ids == (11, 12)
    assert gallery.verify() == []


def test_items_and_drop_downs(gallery):
    gallery.add(samples_of(11), vectors_of(11))
    assert [item.source for item in gallery.items("camera = 1", limit=2, offset=1)] == ["s3", "s5"]
    assert len(gallery.items()) == 11
    assert gallery.distinct("label") == ["l0", "l1", "l2"]
    assert gallery.distinct("source")[-2:] == ["s9", "s10"]


def test_info(gallery, tmp_path, toy_encoder):
    gallery.add(samples_of(5), vectors_of(5))
    info = gallery.info()
    assert (info.count, info.embedding_dim, info.encoder_id, info.encoder_name) == (5, 16, toy_encoder.encoder_id, "toy")
    assert info.bytes_on_disk > 5 * 16 * 4
    assert "5 changes not yet in index.faiss" in info.index
    gallery.save()
    assert "0 changes" in gallery.info().index
    folder = tmp_path / "gallery"
    assert Manifest.parse((folder / "gallery.json").read_text(), "gallery.json") == toy_encoder.manifest
    (folder / "gallery.json").write_text("spoilt")
    Gallery.open(folder, toy_encoder).close()
    assert json.loads((folder / "gallery.json").read_text())["encoder_id"] == toy_encoder.encoder_id


def test_vectors_of_two_encoders_are_refused_with_the_repair(gallery, tmp_path, toy_encoder, other_encoder):
    for create in (False, True):
        with pytest.raises(EncoderMismatch) as caught:
            Gallery.open(tmp_path / "gallery", other_encoder, create=create)
        message = str(caught.value)
        assert toy_encoder.encoder_id in message
        assert other_encoder.encoder_id in message
        assert "simclr gallery add NEW --images" in message
        assert "\n" not in message


def test_without_an_encoder_vectors_still_work(gallery, tmp_path, pictures):
    (sample,) = pictures(1)
    gallery.add([sample])
    with Gallery.open(tmp_path / "gallery") as bare:
        assert bare.search(bare.vector(1), 1)[0].source == sample.source
        bare.add([Sample("given")], vectors_of(1))
        for action in (lambda: bare.search(sample.source), lambda: bare.add([Sample("x")])):
            with pytest.raises(GalleryError, match="opened without an encoder"):
                action()


def test_two_processes_see_each_others_changes(gallery, tmp_path):
    """Two Gallery objects share nothing but the files, as two processes do."""
    with Gallery.open(tmp_path / "gallery") as other:
        gallery.add(samples_of(3), vectors_of(3))
        assert len(other.search(vectors_of(1)[0])) == 3
        other.remove([2])
        assert [hit.id for hit in gallery.search(gallery.vector(1), where="camera = 0")] == [1, 3]


@pytest.mark.parametrize(
    ("prepare", "create", "complaint"),
    [
        (lambda path: None, False, "no such gallery; make one: simclr gallery add"),
        (lambda path: path.write_text("x"), False, "no such gallery"),
        (lambda path: path.write_text("x"), True, "is a file"),
        (lambda path: path.mkdir(), False, "this is no gallery"),
        (lambda path: (path.mkdir(), (path / "cat.jpg").touch()), True, "holds cat.jpg and no catalog"),
        (
            lambda path: (path.mkdir(), (path / "catalog.sqlite").touch(), (path / "gallery.json").touch()),
            True,
            "holds gallery.json",
        ),
        (lambda path: (path.mkdir(), (path / "catalog.sqlite").write_text("x" * 5000)), True, "file is not a database"),
    ],
)
def test_what_is_no_gallery_is_refused_in_one_line(tmp_path, toy_encoder, prepare, create, complaint):
    prepare(tmp_path / "g")
    with pytest.raises(GalleryError, match=complaint) as caught:
        Gallery.open(tmp_path / "g", toy_encoder, create=create)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_address_are_refused(toy_encoder):
    with pytest.raises(GalleryError, match="galleries are folders"):
        Gallery.open("milvus://host:19530/c", toy_encoder, create=True)


def test_a_new_gallery_needs_an_encoder(tmp_path):
    with pytest.raises(GalleryError, match="needs the encoder"):
        Gallery.open(tmp_path / "g", create=True)
    assert not (tmp_path / "g").exists()


def test_a_creation_that_broke_off_is_finished(tmp_path, toy_encoder):
    (tmp_path / "g" / "lost+found").mkdir(parents=True)
    (tmp_path / "g" / "catalog.sqlite").touch()
    with Gallery.open(tmp_path / "g", toy_encoder, create=True) as gallery:
        assert len(gallery) == 0


def test_a_gallery_may_be_moved(gallery, tmp_path, toy_encoder):
    gallery.add(samples_of(3), vectors_of(3))
    gallery.close()
    shutil.move(tmp_path / "gallery", tmp_path / "elsewhere")
    with Gallery.open(tmp_path / "elsewhere", toy_encoder, create=True) as moved:
        assert len(moved) == 3
        assert "0 changes" in moved.info().index


def test_added_and_saved_then_removed_and_not_saved(gallery, tmp_path):
    gallery.add(samples_of(40), vectors_of(40))
    gallery.save()
    query = gallery.vector(7)
    gallery.remove([7])
    gallery.close()  # one change in forty is not worth rewriting the file
    with Gallery.open(tmp_path / "gallery") as again:
        assert "1 changes" in again.info().index
        assert 7 not in [hit.id for hit in again.search(query, 40)]
        assert again.verify() == []
        again.rebuild()
        assert "0 changes" in again.info().index


def test_the_index_of_another_gallery_is_not_believed(gallery, tmp_path, toy_encoder, caplog):
    gallery.add(samples_of(5), vectors_of(5))
    gallery.close()
    with Gallery.open(tmp_path / "other", toy_encoder, create=True) as other:
        other.add(samples_of(5), vectors_of(5, seed=1))
    shutil.copy(tmp_path / "other" / "index.faiss", tmp_path / "gallery" / "index.faiss")
    with Gallery.open(tmp_path / "gallery") as again:
        assert "another gallery" in caplog.text
        assert again.verify() == []
        assert again.search(vectors_of(5)[2], 1)[0].source == "s2"


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
    assert gallery.verify() == []


KILLED = """
import sys, numpy as np
from serve.gallery import Gallery
from serve.sources import Sample

gallery = Gallery.open(sys.argv[1])
rng = np.random.default_rng()
while True:
    source = str(rng.integers(2**62))
    vector = rng.standard_normal((1, 16)).astype(np.float32)
    (item_id,) = gallery.add([Sample(source)], vector).ids
    print(item_id, source, flush=True)
    if item_id % 7 == 0:
        gallery.save()
    if item_id % 5 == 0:
        gallery.remove([item_id - 1])
        print(item_id - 1, "removed", flush=True)
"""


def test_kill_minus_9_loses_nothing_acknowledged(gallery, tmp_path):
    gallery.close()
    folder, expected = str(tmp_path / "gallery"), {}
    for cycle in range(4):
        process = subprocess.Popen([sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True)
        lines = [process.stdout.readline() for _ in range(40 + 13 * cycle)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        expected |= {int(line.split()[0]): line.split()[1] for line in lines if line.endswith("\n")}
        with Gallery.open(folder) as again:
            there = {item.id: item.source for item in again.items()}
            for item_id, source in expected.items():
                if source == "removed":
                    assert item_id not in there
                else:  # every fifth may have been removed just before the word of it got out
                    assert there.get(item_id) == source or (item_id not in there and item_id % 5 == 4)
            assert again.verify() == []
            assert again.search(again.vector(max(there)), 1)[0].id == max(there)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_on_saving(gallery, tmp_path, monkeypatch, caplog):
    gallery.add(samples_of(5), vectors_of(5))
    with monkeypatch.context() as patch:
        patch.setattr(serve.index, "_write", full)
        with pytest.raises(GalleryError, match="No space left on device") as caught:
            gallery.save()
        assert "\n" not in str(caught.value)
        gallery.close()  # tries, warns, and loses nothing
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "gallery").glob(".index*"))
    with Gallery.open(tmp_path / "gallery") as again:
        assert len(again) == 5
        assert again.verify() == []


FULL_DISK = """
import resource, sys
import numpy as np
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.sources import Sample

gallery = Gallery.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
rng = np.random.default_rng(0)
try:
    gallery.add([Sample(str(i) + "x" * 500) for i in range(5000)], rng.standard_normal((5000, 16)).astype(np.float32),
                batch_size=50, on_batch=lambda done: print(done, flush=True))
except GalleryError as error:
    print(error)
    print(len(gallery.search(np.ones(16), 5000)), "still found")
    gallery.close()
"""


def test_a_full_disk_while_adding(gallery, tmp_path):
    gallery.close()
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "gallery")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *acknowledged, message, found = done.stdout.splitlines()
    count = sum(map(int, acknowledged))
    assert "is the disk full" in message
    assert found == f"{count} still found"
    with Gallery.open(tmp_path / "gallery") as again:
        assert len(again) == count > 100
        assert again.verify() == []
        assert again.add([Sample("more")], vectors_of(1)).ids
