import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

import serve.catalog
import serve.storage.catalog_file
import serve.storage.catalog_schema
from serve.catalog import Catalog, Change
from serve.errors import DamagedItem, GalleryError
from serve.filters import EVERYTHING, parse_where
from serve.item import Item, natural_key
from serve.samples import Sample
from serve.storage.catalog_schema import COLUMNS, page_bytes
from tests.gallery_items import toy_facts

DIM = 4
FACTS = toy_facts(DIM)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite", FACTS)
    yield catalog
    catalog.close()


def add(catalog, *names, **known):
    vectors = np.random.default_rng(len(catalog)).standard_normal((len(names), DIM)).astype(np.float32)
    return catalog.add([Sample(name, **known) for name in names], vectors, {}), vectors


def tamper(path, statement, *parameters):
    """What another program, or a failing disk, may do."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(statement, parameters)


def catalog_value(path, query):
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchone()[0]


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
    for session in (catalog._file.reading, catalog._file.writing):
        with session() as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


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
    add(catalog, "f")
    assert [i for block, _ in catalog.vectors(0, last.seq) for i in block] == [*first[1:], *second[:1]]


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
    assert len(catalog.ids(EVERYTHING)) == 4
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
    tamper(tmp_path / "catalog.sqlite", "PRAGMA user_version = 9")
    with pytest.raises(GalleryError, match="has schema 9, this simclr-serve reads 2"):
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
    assert len(set(catalog.ids(EVERYTHING).tolist())) == 41


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from serve.catalog import Catalog
from serve.errors import GalleryError
from serve.samples import Sample
from tests.gallery_items import toy_facts

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
    tamper(catalog._path, "UPDATE vectors SET vector = x'00' WHERE id = ?", ids[0])
    assert catalog.problems() == ["vector of item 1: changed on the disk (checksum)", "item 1: vector of 1 bytes, wanted 16"]
    assert [found.tolist() for found, _ in catalog.vectors(0, 9)] == [ids[1:]]
    with pytest.raises(DamagedItem, match="item 1: its vector is damaged"):
        catalog.vector(1)


SCHEMA_1 = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE changes (seq INTEGER PRIMARY KEY, stamp TEXT NOT NULL) STRICT;
CREATE TABLE items (id INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER NOT NULL, source TEXT NOT NULL UNIQUE, label TEXT,
 identity TEXT, camera TEXT, time REAL, extra TEXT NOT NULL, vector BLOB NOT NULL) STRICT;
CREATE TABLE removed (id INTEGER PRIMARY KEY, seq INTEGER NOT NULL) STRICT;
CREATE INDEX removed_seq ON removed (seq);
CREATE INDEX items_seq ON items (seq);
CREATE INDEX items_label ON items (label);
CREATE INDEX items_camera ON items (camera);
CREATE INDEX items_time ON items (time);
CREATE INDEX items_identity ON items (identity, camera);
PRAGMA application_id = 334872;
PRAGMA user_version = 1;
INSERT INTO facts VALUES ('encoder_id', 'eeeeeeeeeeeeeeee'), ('encoder_name', 'toy'), ('embedding_dim', '4');
INSERT INTO facts VALUES ('manifest', '{}'), ('encoder_spec', 'grpc://somewhere');
INSERT INTO changes VALUES (1, 'one'), (2, 'two'), (3, 'three');
INSERT INTO items VALUES (1, 1, 'a.jpg', 'cat', '7', '1', 12.5, '{"note": "\\u00fc"}', x'0000803f000000400000404000008040');
INSERT INTO items VALUES (3, 2, 'ü.jpg', NULL, NULL, NULL, NULL, '{}', x'00000000000000000000000000000040');
INSERT INTO items VALUES (4, 2, 'd.jpg', NULL, NULL, NULL, 3, '{}', x'00000000000000000000000000000000');
INSERT INTO removed VALUES (2, 2), (4, 3);
DELETE FROM items WHERE id = 4;
"""


@pytest.fixture
def old_catalog(tmp_path):
    path = tmp_path / "old.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA_1)
    return path


def test_a_catalog_of_schema_1_is_brought_up_to_date(old_catalog):
    for _ in range(2):  # the second time there is nothing left to do
        catalog = Catalog(old_catalog)
        assert (catalog.facts, catalog.encoder_spec) == (FACTS, "grpc://somewhere")
        first, second = catalog.items(EVERYTHING)
        assert first == Item(1, "a.jpg", "cat", "7", "1", 12.5, {"note": "ü"})
        assert second == Item(3, "ü.jpg", None, None, None, None, {})
        assert (catalog.last_change(), catalog.has_change(Change(2, "two"))) == (Change(3, "three"), True)
        ((ids, vectors),) = catalog.vectors(1, 3)
        assert (ids.tolist(), vectors.tolist()) == ([3], [[0, 0, 0, 2]])
        assert catalog.vector(1).tolist() == [1, 2, 3, 4]
        assert catalog.removed(2, 3).tolist() == [4]
        assert catalog.problems() == []
        catalog.close()
    assert add(Catalog(old_catalog), "new")[0] == [5]


def test_an_update_of_the_schema_that_breaks_off_leaves_the_old_one(old_catalog, monkeypatch):
    before = old_catalog.read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(serve.storage.catalog_schema._FROM_1, "removed", "SELECT 1 / 0 FROM nowhere")
        with pytest.raises(GalleryError, match="no such table: nowhere"):
            Catalog(old_catalog)
    assert old_catalog.read_bytes() == before
    assert len(Catalog(old_catalog)) == 2


@pytest.mark.parametrize(
    ("table", "columns"), [(table, columns) for table, columns in COLUMNS.items() if table != "facts"], ids=lambda name: name
)
def test_a_value_that_changed_on_the_disk_is_found_in_any_column(tmp_path, catalog, table, columns):
    for name in "abc":
        add(catalog, name, label="l", identity="i", camera="c", time=1.5)
    catalog.remove([3])
    catalog.close()
    path = tmp_path / "catalog.sqlite"
    first = f"WHERE rowid = (SELECT min(rowid) FROM {table})"  # noqa: S608
    for column in (*columns, "checksum"):
        shutil.copy(path, tmp_path / "damaged.sqlite")
        value = catalog_value(path, f"SELECT {column} FROM {table} {first}")  # noqa: S608
        other = value + 77 if isinstance(value, int | float) else value[:-1] + (b"~" if isinstance(value, bytes) else "~")
        tamper(tmp_path / "damaged.sqlite", f"UPDATE {table} SET {column} = ? {first}", other)  # noqa: S608
        found = Catalog(tmp_path / "damaged.sqlite").problems()
        assert any("(checksum)" in problem for problem in found), column


def test_facts_that_changed_on_the_disk_are_not_believed(tmp_path, catalog):
    tamper(tmp_path / "catalog.sqlite", "UPDATE facts SET value = 'f' WHERE key = 'encoder_id'")
    with pytest.raises(GalleryError, match="encoder_id was changed on the disk") as caught:
        Catalog(tmp_path / "catalog.sqlite")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("DELETE FROM vectors WHERE id = 1", "item 1: has no vector"),
        ("DELETE FROM items WHERE id = 1", "vector of item 1: there is no such item"),
        ("DELETE FROM changes WHERE seq = 1", "catalog: 1 of 2 transactions are missing from its history"),
        ("INSERT INTO removed VALUES (1, 2, 0)", "item 1: is there, and noted as removed"),
    ],
)
def test_tables_that_do_not_fit_together_are_found(tmp_path, catalog, damage, complaint):
    add(catalog, "a", "b", "c")
    catalog.remove([2])
    tamper(tmp_path / "catalog.sqlite", damage)
    assert complaint in catalog.problems()


def test_text_that_is_no_longer_text_is_found(tmp_path, catalog):
    add(catalog, "a")
    tamper(tmp_path / "catalog.sqlite", "UPDATE items SET source = CAST(x'ff61' AS TEXT)")
    assert "item 1: changed on the disk (checksum)" in catalog.problems()


def test_a_copy_without_its_newest_transactions_is_not_taken_for_whole(tmp_path, catalog, caplog):
    """SQLite opens it without a word: the last transactions are in the -wal file."""
    add(catalog, "a")
    catalog.close()
    catalog = Catalog(tmp_path / "catalog.sqlite")
    add(catalog, "b")
    (tmp_path / "copy").mkdir()
    for name in ("catalog.sqlite", "catalog.sqlite-acknowledged"):
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    assert caplog.messages == []
    copy = Catalog(tmp_path / "copy" / "catalog.sqlite")
    assert len(copy) == 1
    for said in (caplog.text, *copy.problems()):
        assert "lacks transaction 2, which was acknowledged; its last is 1" in said
    assert catalog.problems() == []


@pytest.mark.parametrize("note", ["", "nonsense", "7", "\udcff"])
def test_a_note_that_cannot_be_read_says_nothing(tmp_path, catalog, note):
    add(catalog, "a")
    (tmp_path / "catalog.sqlite-acknowledged").write_bytes(note.encode(errors="surrogateescape"))
    assert Catalog(tmp_path / "catalog.sqlite").problems() == []


def test_update_replaces_the_vector_in_the_feed(catalog):
    ids, _ = add(catalog, "a", "b", label="cat")
    mark = catalog.last_change()
    new = np.arange(4, dtype=np.float32)
    catalog.update(ids[0], new)
    catalog.update(ids[1], -new, "c")
    ((found, vectors),) = catalog.vectors(mark.seq, catalog.last_change().seq)
    assert found.tolist() == ids
    np.testing.assert_array_equal(vectors, [new, -new])
    np.testing.assert_array_equal(catalog.vector(ids[0]), new)
    ((found, vectors),) = catalog.vectors(0, mark.seq)  # whoever reads up to an earlier state does not miss the items
    assert found.tolist() == ids
    np.testing.assert_array_equal(vectors, [new, -new])
    assert [(item.source, item.label) for item in catalog.items(EVERYTHING)] == [("a", "cat"), ("c", "cat")]
    assert catalog.problems() == []


@pytest.mark.parametrize(
    ("item_id", "source", "complaint"),
    [(9, None, "no item with id 9; nothing was changed"), (1, "b", "b is item 2; nothing was changed"), (1, "\udcff", "UTF-8")],
)
def test_an_update_that_cannot_be_changes_nothing(catalog, item_id, source, complaint):
    _, vectors = add(catalog, "a", "b")
    mark = catalog.last_change()
    with pytest.raises(GalleryError, match=complaint):
        catalog.update(item_id, np.ones(4, np.float32), source)
    assert catalog.last_change() == mark
    np.testing.assert_array_equal(catalog.vector(1), vectors[0])


def test_relabel(catalog):
    catalog.add([Sample("a", "cat", "7", "1", 5.0), Sample("b")], np.ones((2, 4), np.float32), {"a": {"box": [1], "x": None}})
    catalog.relabel([1, 2], label="dog", time=8, extra={"seen": True, "box": None})
    catalog.relabel([1], identity=None)
    assert catalog.items(EVERYTHING) == [
        Item(1, "a", "dog", None, "1", 8.0, {"x": None, "seen": True}),
        Item(2, "b", "dog", None, None, 8.0, {"seen": True}),
    ]
    assert catalog.last_change().seq == 3
    assert list(catalog.vectors(1, 3)) == []
    assert catalog.ids(parse_where("label = dog and time = 8")).tolist() == [1, 2]
    assert catalog.ids(parse_where("label = cat")).tolist() == []
    assert catalog.problems() == []


@pytest.mark.parametrize(
    ("ids", "known", "complaint"),
    [
        ([1, 5, 4], {"label": "x"}, "no item with id 4, 5; nothing was changed"),
        ([1], {"label": "\udcff"}, "wanted text in UTF-8"),
        ([1], {"time": float("nan")}, "time is nan"),
        ([1], {"time": "soon"}, "soon"),
        ([2, 1], {"extra": {"x": float("inf")}}, "JSON"),
    ],
)
def test_what_cannot_be_stored_changes_nothing(catalog, ids, known, complaint):
    add(catalog, "a", "b")
    before = catalog.items(EVERYTHING), catalog.last_change()
    with pytest.raises(GalleryError, match=complaint) as caught:
        catalog.relabel(ids, **known)
    assert "\n" not in str(caught.value)
    assert (catalog.items(EVERYTHING), catalog.last_change()) == before


def test_many_items_are_relabelled_in_one_transaction(catalog):
    ids, _ = add(catalog, *map(str, range(25)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve.catalog, "_BLOCK_ROWS", 10)
        catalog.relabel(ids, camera="3")
    assert catalog.count(parse_where("camera = 3")) == 25
    assert catalog.last_change().seq == 2


def test_the_ids_of_a_filter_are_remembered_until_anyone_changes_anything(tmp_path, catalog):
    other = Catalog(tmp_path / "catalog.sqlite")  # shares nothing but the file, as another process does
    add(catalog, "a", "b", label="cat")
    where = parse_where("label = cat")
    first = catalog.ids(where)
    assert catalog.ids(parse_where("label=cat")) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 7
    for change, wanted in (
        (lambda: other.relabel([1], label="dog"), [2]),
        (lambda: add(other, "c", label="cat"), [2, 3]),
        (lambda: other.remove([2]), [3]),
    ):
        change()
        assert catalog.ids(where).tolist() == wanted
        assert catalog.count(where) == len(wanted)


def test_lookup_with_a_filter(catalog):
    add(catalog, "a", "b", label="cat")
    add(catalog, "c", label="dog")
    assert sorted(catalog.lookup([1, 3, 9])) == [1, 3]
    assert sorted(catalog.lookup([1, 3, 9], parse_where("label = cat"))) == [1]


def test_readers_see_one_state_and_wait_for_nobody(tmp_path, catalog):
    ids, vectors = add(catalog, *"abcde")
    feed = catalog.vectors(0, 9, rows=2)
    seen = [next(feed)]
    with catalog._file.writing() as db:
        db.execute("DELETE FROM vectors")
        assert len(catalog) == 5  # while the other is at it
        assert Catalog(tmp_path / "catalog.sqlite").vector(1) is not None
    seen += feed
    assert [i for block, _ in seen for i in block] == ids
    np.testing.assert_array_equal(np.concatenate([block for _, block in seen]), vectors)
    with pytest.raises(DamagedItem, match="item 1: its vector is damaged or missing"):
        catalog.vector(1)


def test_another_process_that_writes_for_too_long(tmp_path, catalog, monkeypatch):
    monkeypatch.setattr(serve.storage.catalog_file, "_WAIT_S", 0.05)
    impatient = Catalog(tmp_path / "catalog.sqlite")
    with catalog._file.writing(), pytest.raises(GalleryError, match="another process has been writing"):
        add(impatient, "a")
    assert add(impatient, "a")[0] == [1]


def test_processes_that_make_the_same_catalog_at_once(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from serve.catalog import Catalog; from serve.storage.catalog_schema import Facts\n"
        "print(Catalog(Path(sys.argv[1]), Facts('e', 'toy', 4, '{}')).facts.encoder_name)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "new.sqlite")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["toy\n"] * 4


def test_repair_derives_sqlites_own_indexes_anew(tmp_path, catalog):
    add(catalog, "a", "b", label="cat")
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db:  # an index that lacks what its table has
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = sql || ' WHERE id > 9' WHERE name = 'items_label'")
        db.commit()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db:
        db.execute("REINDEX items_label")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, ' WHERE id > 9', '') WHERE name = 'items_label'")
        db.commit()
    catalog = Catalog(tmp_path / "catalog.sqlite")
    assert catalog.count(parse_where("label = cat")) == 0
    assert any("missing from index items_label" in problem for problem in catalog.problems())
    catalog.repair()
    assert catalog.problems() == []
    assert catalog.count(parse_where("label = cat")) == 2


@pytest.mark.parametrize("dim", [16, 128, 256, 512, 1024, 2048])
def test_the_page_size_is_near_the_best_that_can_be_measured(dim):
    def size(page):
        with closing(sqlite3.connect(":memory:")) as db:
            db.execute(f"PRAGMA page_size = {page}")
            db.execute("CREATE TABLE vectors (id INTEGER PRIMARY KEY, seq INTEGER, vector BLOB, checksum INTEGER)")
            rows = ((i, i, bytes(4 * dim), 2**32 - 1) for i in range(400))
            db.executemany("INSERT INTO vectors VALUES (?, ?, ?, ?)", rows)
            return page * db.execute("PRAGMA page_count").fetchone()[0]

    assert size(page_bytes(dim)) <= 1.1 * min(map(size, (4096, 8192, 16384)))


def test_the_wal_stays_small_and_a_slow_reader_is_not_waited_for_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(serve.storage.catalog_file, "_WAL_BYTES", 200_000)
    monkeypatch.setattr(serve.storage.catalog_file, "_WAL_WAIT_S", 0.01)
    catalog, wal = Catalog(tmp_path / "catalog.sqlite", FACTS), tmp_path / "catalog.sqlite-wal"
    add(catalog, "first")
    reader = catalog.vectors(0, 9)
    next(reader)
    limits = set()
    for i in range(40):
        add(catalog, str(i))
        limits.add(catalog._file._wal_limit)
    assert wal.stat().st_size > 500_000  # nobody may take from the reader what it reads
    assert 2 < len(limits) < 20
    reader.close()
    for i in range(40, 80):
        add(catalog, str(i))
        assert catalog._file._wal_limit > wal.stat().st_size
    assert catalog._file._wal_limit == 200_000
    assert len(catalog) == 81
    assert catalog.problems() == []
