import sqlite3

import numpy as np
import pytest

from serve.errors import GalleryError, SourceError
from serve.gallery import Gallery
from serve.identity import audit
from serve.identity.identities import enrol, forget, merge, named, rename, split
from serve.samples import Sample
from serve.storage.catalog_file import CatalogFile

DIM = 16


@pytest.fixture
def plain_sqlite(monkeypatch):
    """Debian builds SQLite so that it wipes what it frees; most others do not."""
    connect = CatalogFile.connect

    def connect_plainly(file):
        db = connect(file)
        db.execute("PRAGMA secure_delete = OFF")
        return db

    monkeypatch.setattr(CatalogFile, "connect", connect_plainly)


@pytest.fixture
def gallery(plain_sqlite, tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        yield gallery


def fill(gallery, names, seed=0):
    samples = [Sample(f"/somewhere/{name}-{i}.jpg", identity=name, camera=str(i % 2)) for i, name in enumerate(names)]
    return gallery.add(samples, np.random.default_rng(seed).standard_normal((len(names), DIM)).astype(np.float32)).ids


def names_of(gallery):
    return [item.identity for item in gallery.items()]


def actions(gallery, name):
    return [line["action"] for line in audit.lines_about(gallery.folder, name)]


def test_who_it_is(tmp_path):
    samples = [Sample("1", label="anna"), Sample("2", label="x", identity="berta", camera="7", time=3.0)]
    assert named(samples) == [Sample("1", identity="anna"), samples[1]]
    assert named(samples, "cora", "1", 0.0) == [
        Sample("1", label="anna", identity="cora", camera="1", time=0.0),
        Sample("2", label="x", identity="cora", camera="1", time=0.0),
    ]
    with pytest.raises(SourceError, match=r"who\.jpg: nobody says who it is"):
        named([Sample("who.jpg")])
    for name in ("-1", " "):
        with pytest.raises(GalleryError, match="cannot be anybody's name"):
            named(samples, name)


def test_enrolling_adds_and_names_what_is_there(gallery, pictures, tmp_path):
    samples = [Sample(sample.source) for sample in pictures(4)]
    gallery.add(samples[:2])
    report = enrol(gallery, named(samples[1:], "anna"))
    assert (len(report.ids), report.already_present) == (2, 1)
    assert names_of(gallery) == [None, "anna", "anna", "anna"]
    with pytest.raises(GalleryError, match="is enrolled as anna, not berta; nothing was changed"):
        enrol(gallery, named(samples, "berta"))
    assert names_of(gallery) == [None, "anna", "anna", "anna"]


def test_rename_merge_and_split(gallery):
    ids = fill(gallery, ["a", "a", "b", "c"])
    assert rename(gallery, "a", "anna") == 2
    assert merge(gallery, ["anna", "b", "b", "c"], "anna") == 2
    assert names_of(gallery) == ["anna"] * 4
    assert split(gallery, "anna", ids[2:], "cora") == 2
    assert names_of(gallery) == ["anna", "anna", "cora", "cora"]
    assert actions(gallery, "anna") == ["rename", "merge", "split"]
    assert [line["items"] for line in audit.lines_about(gallery.folder, "cora")] == [2]
    assert gallery.verify() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda g: rename(g, "a", "b"), "b is taken; nothing was changed; to make one of two: simclr reid merge"),
        (lambda g: rename(g, "x", "y"), "nobody is called x"),
        (lambda g: rename(g, "a", "-1"), "cannot be anybody's name"),
        (lambda g: rename(g, "a", "0000"), "cannot be anybody's name"),
        (lambda g: merge(g, ["a", "x"], "a"), "nobody is called x"),
        (lambda g: merge(g, ["a"], "a"), "nothing to merge"),
        (lambda g: split(g, "a", [1], "b"), "b is taken"),
        (lambda g: split(g, "a", [3], "new"), "item 3 is not a's"),
        (lambda g: split(g, "a", [1, 2], "new"), "got 2 of 2 items of a"),
        (lambda g: split(g, "a", [], "new"), "got 0 of 2 items of a"),
        (lambda g: forget(g, "x"), "nobody is called x"),
    ],
)
def test_what_cannot_be_done_changes_nothing(gallery, change, complaint):
    fill(gallery, ["a", "a", "b"])
    with pytest.raises(GalleryError, match=complaint):
        change(gallery)
    assert names_of(gallery) == ["a", "a", "b"]
    assert not (gallery.folder / "audit.jsonl").exists()


def traces(folder, secrets):
    """Which secrets stand in which files, byte for byte."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        (name, str(path.relative_to(folder))) for name, one in secrets.items() for path, data in files.items() if one in data
    }


@pytest.fixture
def secrets(gallery):
    """A gallery in which an identity left traces everywhere, and what to look for."""
    fill(gallery, [f"other{i % 7}" for i in range(300)])
    old = np.random.default_rng(5).standard_normal((3, DIM)).astype(np.float32)
    samples = [Sample(f"/home/quux/{i}.jpg", label="lbl-quux", identity="first-quux", camera="cam-quux") for i in range(3)]
    ids = gallery.add(samples, old, extra={samples[0].source: {"note": "note-quux"}}).ids
    gallery.save()  # into the index as it is on disk
    rename(gallery, "first-quux", "second-quux")
    before = gallery.vector(ids[1])
    gallery.update(ids[1], np.ones(DIM))  # its first vector is no longer anybody's
    fill(gallery, ["late"], seed=9)
    texts = ("/home/quux", "lbl-quux", "first-quux", "second-quux", "cam-quux", "note-quux")
    vectors = {"vector": gallery.vector(ids[0]), "former vector": before, "new vector": gallery.vector(ids[1])}
    return {text: text.encode() for text in texts} | {name: vector.tobytes() for name, vector in vectors.items()}


def test_forgetting_leaves_no_byte_in_any_file(gallery, secrets):
    found = traces(gallery.folder, secrets)
    assert {name for name, _ in found} == set(secrets)
    assert {file for _, file in found} >= {"catalog.sqlite-wal", "index/base-000001/rows.vectors"}
    assert forget(gallery, "second-quux") == 3
    assert traces(gallery.folder, secrets) == set()
    assert (gallery.folder / "catalog.sqlite-wal").stat().st_size == 0
    assert len(gallery) == 301
    assert gallery.verify() == []
    assert gallery.search(gallery.vector(17), 1)[0].id == 17
    assert actions(gallery, "second-quux") == ["rename", "forget begun", "forgotten"]
    gallery.close()
    assert traces(gallery.folder, secrets) == set()


def test_removing_alone_does_leave_them(gallery, secrets):
    """Why `forget` is more than `remove` and `rebuild`."""
    gallery.remove(gallery.ids("identity = second-quux"))
    gallery.rebuild()
    gallery.close()
    assert {name for name, _ in traces(gallery.folder, secrets)} >= {"vector", "second-quux"}


def test_a_reader_that_stays_is_named_and_the_same_call_goes_on(gallery, secrets, monkeypatch):
    monkeypatch.setattr("serve.storage.catalog_file._WAIT_S", 0.2)
    reader = sqlite3.connect(gallery.folder / "catalog.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM items").fetchone()
    with pytest.raises(GalleryError, match="another process reads it"):
        forget(gallery, "second-quux")
    assert gallery.ids("identity = second-quux").tolist() == []
    assert traces(gallery.folder, secrets) != set()
    assert actions(gallery, "second-quux") == ["rename", "forget begun"]
    reader.close()
    assert forget(gallery, "second-quux") == 3
    assert traces(gallery.folder, secrets) == set()
    with pytest.raises(GalleryError, match="nobody is called second-quux"):
        forget(gallery, "second-quux")


def test_the_last_identity_can_be_forgotten(gallery):
    fill(gallery, ["a", "a"])
    gallery.save()
    assert forget(gallery, "a") == 2
    assert len(gallery) == 0
    assert gallery.search(np.ones(DIM), 3) == []
    assert gallery.verify() == []


def test_another_process_that_has_it_open_goes_on(gallery, toy_encoder, secrets):
    with Gallery.open(gallery.folder, toy_encoder) as other:
        assert len(other.search(np.ones(DIM), 400)) == 304
        forget(gallery, "second-quux")
        assert len(other.search(np.ones(DIM), 400)) == 301
    assert traces(gallery.folder, secrets) == set()
