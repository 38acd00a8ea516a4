"""The number by which readers learn that something was committed, without asking SQLite each time."""

import threading
import time

import pytest

from serve.catalog import Catalog
from serve.errors import GalleryError
from serve.index import unit_vectors
from serve.samples import Sample
from tests.gallery_items import toy_facts

VECTOR = unit_vectors([[3, 4]], 2)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite", toy_facts(2))
    yield catalog
    catalog.close()


def add(catalog, name):
    catalog.add([Sample(name)], VECTOR, {})


def test_every_commit_is_told_at_once(tmp_path, catalog):
    other = Catalog(tmp_path / "catalog.sqlite")
    for turn in range(200):
        before = catalog.version()
        assert catalog.version() == before
        add((catalog, other)[turn % 2], str(turn))
        assert catalog.version() != before
        assert catalog.last_change().seq == turn + 1
    other.close()


def test_sqlite_is_rarely_asked_while_nothing_happens(catalog, monkeypatch):
    add(catalog, "one")
    catalog.version()
    asked = []
    hold = catalog._file._hold_note
    monkeypatch.setattr(catalog._file, "_hold_note", lambda: asked.append(1) or hold())
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        catalog.version()
    assert len(asked) < 15


def test_a_note_that_is_lost_or_replaced_only_delays(tmp_path, catalog):
    other, note = Catalog(tmp_path / "catalog.sqlite"), tmp_path / "catalog.sqlite-acknowledged"
    add(other, "first")
    for damage in (note.unlink, lambda: (note.unlink(), note.write_text("0 0".ljust(64)))):
        before = catalog.version()
        damage()
        add(other, str(damage))
        time.sleep(0.06)
        assert catalog.version() != before
        before = catalog.version()
        add(other, f"after {damage}")  # at once again: the new note is held
        assert catalog.version() != before
    other.close()


def test_of_a_closed_gallery_there_is_none(catalog):
    add(catalog, "one")
    catalog.version()
    catalog.close()
    catalog.close()
    with pytest.raises(GalleryError, match="has been closed"):
        catalog.version()


def test_many_threads(tmp_path, catalog):
    """Whoever has seen a commit told never reads an older state afterwards."""
    other, stop, failures = Catalog(tmp_path / "catalog.sqlite"), threading.Event(), []
    done = [0]

    def watch():
        seen, seq = -1, 0
        while not stop.is_set():
            acknowledged, version = done[0], catalog.version()
            if version != seen:
                seen, seq = version, catalog.last_change().seq
            if seq < acknowledged:
                failures.append((seq, acknowledged))

    threads = [threading.Thread(target=watch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(150):
        add((catalog, other)[turn % 2], str(turn))
        done[0] = turn + 1
    stop.set()
    for thread in threads:
        thread.join()
    other.close()
    assert failures == []
