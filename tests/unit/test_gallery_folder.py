"""A gallery's files: nothing acknowledged is lost, damage is named, what is derived is derived anew."""

import errno
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

import serve.ann.build
from serve.contract import Manifest
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Sample
from tests.gallery_items import samples_of, vectors_of


def test_an_index_that_holds_what_the_catalog_lacks_never_shows_it(gallery, tmp_path):
    """Damage that a search must survive, and verify must name."""
    gallery.add(samples_of(5), vectors_of(5))
    with closing(sqlite3.connect(tmp_path / "gallery" / "catalog.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM items WHERE id = 3")
    assert [hit.id for hit in gallery.search(vectors_of(3)[2], 9)] != []
    assert 3 not in [hit.id for hit in gallery.search(vectors_of(3)[2], 9)]
    assert "vector of item 3: there is no such item" in gallery.verify()


def test_repair_derives_the_index_anew(gallery, tmp_path):
    gallery.add(samples_of(20), vectors_of(20))
    gallery._store.index._state = gallery._store.index._state.without(np.array([3]))
    assert gallery.verify() == ["item 3: missing from the index"]
    gallery.repair()
    assert gallery.verify() == []
    assert gallery.search(vectors_of(20)[2], 1)[0].id == 3


def test_what_is_told_and_copied_of_a_gallery(gallery, tmp_path, toy_encoder):
    gallery.add(samples_of(5), vectors_of(5))
    assert "5 changes not yet in index/" in gallery.info().index
    gallery.save()
    assert "0 changes" in gallery.info().index
    folder = tmp_path / "gallery"
    assert Manifest.parse((folder / "gallery.json").read_text(), "gallery.json") == toy_encoder.manifest
    (folder / "gallery.json").write_text("spoilt")
    Gallery.open(folder, toy_encoder).close()
    assert json.loads((folder / "gallery.json").read_text())["encoder_id"] == toy_encoder.encoder_id


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
    shutil.copytree(tmp_path / "other" / "index", tmp_path / "gallery" / "index", dirs_exist_ok=True)
    with Gallery.open(tmp_path / "gallery") as again:
        assert "another gallery" in caplog.text
        assert again.verify() == []
        assert again.search(vectors_of(5)[2], 1)[0].source == "s2"


KILLED = """
import sys, numpy as np
from serve.gallery import Gallery
from serve.samples import Sample

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
        patch.setattr(serve.ann.build, "write_header", full)
        with pytest.raises(GalleryError, match="No space left on device") as caught:
            gallery.save()
        assert "\n" not in str(caught.value)
        gallery.close()  # tries, warns, and loses nothing
    assert "No space left on device" in caplog.text
    assert [path.name for path in (tmp_path / "gallery" / "index").iterdir()] == ["lock"]
    with Gallery.open(tmp_path / "gallery") as again:
        assert len(again) == 5
        assert again.verify() == []


FULL_DISK = """
import resource, sys
import numpy as np
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Sample

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


def test_the_index_of_former_versions_is_removed(gallery, tmp_path):
    (tmp_path / "gallery" / "index.faiss").write_bytes(bytes(100))
    Gallery.open(tmp_path / "gallery").close()
    assert not (tmp_path / "gallery" / "index.faiss").exists()
