import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest

from serve.catalog import Catalog, Change, Facts, natural_key
from serve.errors import GalleryError
from serve.filters import Where, parse_where
from serve.sources import Sample

DIM = 4
FACTS = Facts(encoder_id="e" * 16, encoder_name="toy", embedding_dim=DIM, manifest="{}")


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite", FACTS)
    yield catalog
    catalog.close()


def add(catalog, *names, **known):
    vectors = np.random.default_rng(len(catalog)).standard_normal((len(names), DIM)).astype(np.float32)
    return catalog.add([Sample(name, **known) for name in names], vectors, {}), vectors


def test_what_was_added_is_there_after_reopening(tmp_path, catalog):
    sample = Sample("a.jpg", label="cat", identity="7", camera="1", time=12.5)
    vector = np.array([[0.1, -0.2, 0.3, 0.4]], np.float32)
    (item_id,) = catalog.add([sample], vector, {"a.jpg": {"box": [1, 2], "note": "ü"}})
    catalog.close()
    again = Catalog(tmp_path / "catalog.sqlite")
    item = again.lookup([item_id])[item_id]
    assert (item.source, item.label, item.identity, item.camera, item.time) == ("a.jpg", "cat", "7", "1", 12.5)
    assert item.extra == {"box": [1, 2], "note": "ü"}
    np.testing.assert_array_equal(again.vector(item_id), vector[0])
    assert again.facts == FACTS


def test_acknowledged_means_on_disk(catalog):
    assert catalog._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert catalog._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_ids_are_never_used_again(tmp_path, catalog):
    ids, _ = add(catalog, "a", "b")
    catalog.remove(ids)
    catalog.close()
    again = Catalog(tmp_path / "catalog.sqlite", FACTS)
    new_ids, _ = add(again, "a")
    assert min(new_ids) > max(ids)


def test_a_source_is_there_once(catalog):
    first, _ = add(catalog, "a")
    second, _ = add(catalog, "a", "b", "b")
    assert (len(first), len(second), len(catalog)) == (1, 1, 2)
    assert catalog.known_sources(["a", "x", "b"]) == ["a", "b"]


def test_unknown_ids_are_named_and_nothing_is_removed(catalog):
    ids, _ = add(catalog, "a", "b")
    with pytest.raises(GalleryError, match="no item with id 98, 99; nothing was removed"):
        catalog.remove([*ids, 99, 98])
    assert len(catalog) == 2


def test_changes_replay_what_came_after(catalog):
    first, _ = add(catalog, "a", "b", "c")
    mark = catalog.last_change()
    second, vectors = add(catalog, "d", "e")
    catalog.remove([first[0], second[1]])
    last = catalog.last_change()
    ((ids, found),) = catalog.vectors(mark.seq, last.seq)
    assert ids.tolist() == second[:1]
    np.testing.assert_array_equal(found, vectors[:1])
    assert catalog.removed(mark.seq, last.seq).tolist() == [first[0], second[1]]
    assert list(catalog.vectors(last.seq, last.seq)) == []


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_vectors_come_complete_in_blocks_of_any_size(catalog, rows):
    wanted, _ = add(catalog, *"abcde")
    wanted += add(catalog, *"fg")[0]
    blocks = list(catalog.vectors(0, catalog.last_change().seq, rows))
    assert [item_id for ids, _ in blocks for item_id in ids] == wanted


def test_stamps_tell_histories_apart(tmp_path, catalog):
    other = Catalog(tmp_path / "other.sqlite", FACTS)
    add(catalog, "a")
    add(other, "a")
    assert catalog.last_change().seq == other.last_change().seq == 1
    assert catalog.has_change(catalog.last_change())
    assert not catalog.has_change(other.last_change())
    assert not catalog.has_change(Change(0, ""))


def test_a_failed_transaction_leaves_nothing(catalog):
    with pytest.raises(GalleryError):
        catalog.add([Sample("a"), Sample("b", time="soon")], np.zeros((2, DIM), np.float32), {})
    assert len(catalog) == 0
    assert add(catalog, "a")[0]


def test_items_ids_and_distinct(catalog):
    for number in ("10", "2", "1"):
        add(catalog, f"{number}.jpg", camera=number)
    add(catalog, "none.jpg")
    assert catalog.distinct("camera") == ["1", "2", "10"]
    assert [item.source for item in catalog.items(parse_where("camera != 2"), limit=2, offset=1)] == ["1.jpg", "none.jpg"]
    assert catalog.ids(parse_where("camera in (1, 2)")).tolist() == [2, 3]
    assert catalog.ids(parse_where("camera = 5")).tolist() == []
    assert len(catalog.ids(Where())) == 4
    with pytest.raises(GalleryError, match="wanted one of label"):
        catalog.distinct("vector")


def test_natural_order():
    assert sorted(["c10", "c2", "b", "c02", "10", "9", "c2x"], key=natural_key) == ["9", "10", "b", "c02", "c2", "c2x", "c10"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), (b"", "not a gallery's"), (b"junk" * 2000, "not a database"), ("foreign", "not a gallery's")],
)
def test_what_is_no_catalog_is_refused_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "catalog.sqlite"
    if content == "foreign":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE albums (id INTEGER)")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(GalleryError, match=complaint) as caught:
        Catalog(path)
    assert "\n" not in str(caught.value)
    if content == "foreign":
        with pytest.raises(GalleryError, match=complaint):
            Catalog(path, FACTS)


def test_a_newer_schema_is_refused(tmp_path, catalog):
    catalog._db.execute("PRAGMA user_version = 9")
    with pytest.raises(GalleryError, match="has schema 9, this simclr-serve reads 1"):
        Catalog(tmp_path / "catalog.sqlite")


def test_closed_says_so(catalog):
    catalog.close()
    catalog.close()
    with pytest.raises(GalleryError, match="closed"):
        len(catalog)


def test_many_threads_add_at_once(catalog):
    def work(name):
        for i in range(10):
            add(catalog, f"{name}/{i}", "everyone's")

    threads = [threading.Thread(target=work, args=[str(n)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog) == 41
    assert len(set(catalog.ids(Where()).tolist())) == 41


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from serve.catalog import Catalog
from serve.errors import GalleryError
from serve.sources import Sample

catalog = Catalog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    for i in range(10_000):
        catalog.add([Sample(f"{i}-{j}" + "x" * 200) for j in range(10)], np.ones((10, 4), np.float32), {})
        print(i, flush=True)
except GalleryError as error:
    print(error)
    assert len(catalog) == 10 * i
"""


def test_a_full_disk_keeps_what_was_acknowledged_and_nothing_by_halves(tmp_path, catalog):
    catalog.close()
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "catalog.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *acknowledged, message = done.stdout.splitlines()
    assert "is the disk full" in message
    assert len(acknowledged) > 3
    again = Catalog(tmp_path / "catalog.sqlite")
    assert len(again) == 10 * len(acknowledged)
    assert again.problems() == []


def test_vectors_of_the_wrong_size_are_reported_and_left_out(catalog):
    ids, _ = add(catalog, "a", "b")
    catalog._db.execute("UPDATE items SET vector = x'00' WHERE id = ?", [ids[0]])
    assert catalog.problems() == ["item 1: vector of 1 bytes, wanted 16"]
    assert [found.tolist() for found, _ in catalog.vectors(0, 9)] == [ids[1:]]
