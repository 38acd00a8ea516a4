"""An index that grows while it is searched: bases written in the background, by several threads and processes."""

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import serve.ann.state
import serve.index
from serve.ann.base import folders
from serve.ann.choice import IndexLimits
from serve.catalog import Catalog
from serve.errors import GalleryError
from serve.index import Index
from serve.samples import Sample
from tests.gallery_items import clustered, toy_facts

DIM = 16
QUICK = IndexLimits(recall=0.9, latency_ms=1e-3)
"""Nothing is that quick, so an index is chosen as soon as there is one to choose."""


@pytest.fixture(autouse=True)
def few_rows_count_as_many(monkeypatch):
    for module in (serve.index, serve.ann.state):
        monkeypatch.setattr(module, "MANY_ROWS", 400)
    monkeypatch.setattr(serve.ann.state, "_TAIL_ROWS", 50)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path / "catalog.sqlite", toy_facts(DIM))
    yield catalog
    catalog.close()


def add(catalog, count, seed=0):
    return catalog.add([Sample(f"{seed}/{i}") for i in range(count)], clustered(count, seed), {})


def wait_for(index):
    while index._worker is not None and index._worker.is_alive():
        time.sleep(0.01)


def recall(index, catalog):
    """Of the ten nearest; that there are ten, and that they are scored right, is asserted."""
    blocks = [(ids, vectors) for ids, vectors in catalog.vectors(0, 2**62)]
    ids, vectors = np.concatenate([ids for ids, _ in blocks]), np.concatenate([vectors for _, vectors in blocks])
    queries = clustered(100, seed=12345)
    index.catch_up()
    scores, found = index.search(queries, 10)
    exact = queries @ vectors.T
    by_id = dict(zip(ids.tolist(), range(len(ids)), strict=True))
    for line, (line_scores, line_ids) in enumerate(zip(scores, found, strict=True)):
        np.testing.assert_allclose(line_scores, [exact[line, by_id[i]] for i in line_ids.tolist()], atol=1e-5)
    wanted = ids[np.argsort(-exact, axis=1)[:, :10]]
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted, strict=True)])


def test_a_base_is_written_in_the_background_and_others_replace_it(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    for turn in range(12):
        add(catalog, 100, seed=turn)
        index.catch_up()
        assert recall(index, catalog) == 1
        wait_for(index)
    assert index.unsaved <= 400
    assert len(index) == 1200
    assert len(folders(tmp_path / "index")) == 1
    assert index.problems() == []
    index.close()


def test_an_exact_base_that_is_too_slow_is_outgrown_and_one_is_chosen(tmp_path, catalog, caplog):
    add(catalog, 4000)
    index = Index(catalog, tmp_path / "index", QUICK)  # writes the rows, exact; the choice follows in the background
    wait_for(index)
    assert "IVF" in index.describe() or "HNSW" in index.describe()
    assert "chosen" in index.report()
    assert recall(index, catalog) >= 0.9
    (base,) = folders(tmp_path / "index")
    assert (base / "report.png").is_file()
    described = index.describe()
    index.close()
    with caplog.at_level(logging.INFO):
        again = Index(catalog, tmp_path / "index")
    assert again.limits == QUICK
    assert again.describe() == described
    assert again.problems() == []
    assert caplog.messages == []
    assert not again._state.due


def test_a_chosen_index_is_extended_then_chosen_anew(tmp_path, catalog):
    add(catalog, 4000)
    index = Index(catalog, tmp_path / "index", QUICK)
    wait_for(index)
    chosen = index._state.base.header.chosen_at
    ids = add(catalog, 300, seed=1)
    catalog.remove(ids[:100])
    index.catch_up()
    assert index._state.listed.ann is not None  # beside the base in its cells, not one by one
    index.save()
    header = index._state.base.header
    assert (header.count, header.chosen_at, index.unsaved) == (4200, chosen, 0)
    assert header.report.checked >= 0.9
    catalog.remove(list(range(1, 1001)))
    index.catch_up()
    wait_for(index)  # a quarter of the rows is dead: without them, and an index of its own
    assert index._state.base.header.count == index._state.base.header.chosen_at == 3200
    assert index.problems() == []
    assert recall(index, catalog) >= 0.9
    index.close()


def test_other_limits_stay(tmp_path, catalog):
    add(catalog, 4000)
    index = Index(catalog, tmp_path / "index")
    assert index.describe().startswith("exact")
    index.rebuild(QUICK)
    assert not index.describe().startswith("exact")
    index.close()
    again = Index(catalog, tmp_path / "index")
    again.rebuild()
    assert again.limits == QUICK
    again.rebuild(IndexLimits())
    assert again.describe().startswith("exact")


def test_a_failure_in_the_background_is_told_and_tried_again_later(tmp_path, catalog, monkeypatch, caplog):
    index = Index(catalog, tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(serve.index, "build", lambda *_, **__: 1 / 0)
        add(catalog, 500)
        index.catch_up()
        wait_for(index)
    assert "no new base was written: division by zero" in caplog.text
    add(catalog, 1, seed=1)
    index.catch_up()
    assert not index._worker.is_alive()  # not at once
    assert recall(index, catalog) == 1
    index._not_before = 0
    add(catalog, 1, seed=2)
    index.catch_up()
    wait_for(index)
    assert index.unsaved == 0
    index.close()


def test_closing_stops_what_is_being_written(tmp_path, catalog, monkeypatch):
    add(catalog, 4000)
    index = Index(catalog, tmp_path / "index", QUICK)
    started = time.monotonic()
    index.close()
    assert time.monotonic() - started < 20
    assert not index._worker.is_alive()
    assert [path.name for path in (tmp_path / "index").iterdir() if path.name.startswith(".")] == []
    assert Index(catalog, tmp_path / "index")._state.base is not None


class Threads:
    """Repeat some work in threads until told to stop; what they raise fails the test."""

    def __init__(self, *work):
        self.stop, self.failures = threading.Event(), []
        self.threads = [threading.Thread(target=self.repeat, args=[one]) for one in work]

    def repeat(self, work):
        try:
            while not self.stop.is_set():
                work()
        except BaseException as error:
            self.failures.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        assert self.failures == []


def test_searches_while_others_add_remove_update_and_compact(tmp_path, catalog):
    """What was there before a search and is there after it is found; at rest, all is as brute force says."""
    add(catalog, 4000)
    index = Index(catalog, tmp_path / "index", QUICK)
    wait_for(index)
    kept = np.arange(1, 101)
    vectors, drawn = index._state.lookup(kept)[1], np.random.default_rng(0)

    def search():
        first, count = int(drawn.integers(90)), int(drawn.choice([1, 7]))
        index.catch_up()
        allowed = kept if drawn.random() < 0.5 else None
        scores, ids = index.search(vectors[first : first + count], 5, allowed=allowed)
        assert ids[:, 0].tolist() == kept[first : first + count].tolist()
        np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
        assert (ids >= 0).all()

    def write():
        index.compact()
        index.save()

    with Threads(search, search, search, write):
        for turn in range(1, 25):
            ids = add(catalog, 60, seed=turn)
            index.catch_up()
            catalog.remove(ids[::2])
            catalog.update(ids[1], clustered(1, seed=1000 + turn)[0])
            index.catch_up()
    assert index.problems() == []
    assert recall(index, catalog) >= 0.9
    index.close()


WRITER = """
import sys, numpy as np
import serve.index, serve.ann.state
from pathlib import Path
from serve.catalog import Catalog
from serve.index import Index, unit_vectors
from serve.samples import Sample
from tests.gallery_items import clustered, toy_facts

serve.index.MANY_ROWS = serve.ann.state.MANY_ROWS = 100
folder, name = Path(sys.argv[1]), sys.argv[2]
catalog = Catalog(folder / "catalog.sqlite")
index = Index(catalog, folder / "index")
for turn in range(12):
    vectors = np.random.default_rng(hash(name) % 2**32 + turn).standard_normal((50, 16))
    ids = catalog.add([Sample(f"{name}/{turn}/{i}") for i in range(50)], unit_vectors(vectors, 16), {})
    index.catch_up()
    catalog.remove(ids[:10])
    index.catch_up()
    index.compact()
index.close()
print(index.problems())
"""


def test_two_processes_write_bases(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        index.catch_up()
        found = index.search(clustered(1), 10)[1]
        assert len(set(found[0].tolist())) == found.shape[1]
    for writer in writers:
        assert writer.returncode == 0
    index.catch_up()
    assert len(index) == 2 * 12 * 40
    assert index.problems() == []
    assert recall(index, catalog) == 1
    index.close()
    again = Index(catalog, tmp_path / "index")
    assert len(folders(tmp_path / "index")) == 1
    assert again.problems() == []


def test_a_newer_base_of_another_process_is_taken_over(tmp_path, catalog):
    one, two = Index(catalog, tmp_path / "index"), Index(catalog, tmp_path / "index")
    add(catalog, 300)
    one.catch_up()
    one.save()
    two.catch_up()
    assert two.unsaved == 300
    two.save()
    assert two.unsaved == 0
    assert two._state.base.folder == one._state.base.folder


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_a_closed_index_lets_go_of_its_files_and_finds_nothing_untrue(tmp_path, catalog):
    add(catalog, 300)
    index = Index(catalog, tmp_path / "index", QUICK)
    index.save()
    query = catalog.vector(1)[None]
    assert index.search(query, 1)[1].tolist() == [[1]]
    assert str(tmp_path / "index") in Path("/proc/self/maps").read_text()
    index.close()
    assert str(tmp_path / "index") not in Path("/proc/self/maps").read_text()
    with pytest.raises(GalleryError, match="has been closed; open it again"):
        index.search(query, 1)
