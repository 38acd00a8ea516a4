import errno
import logging
import shutil

import faiss
import numpy as np
import pytest

from serve.catalog import Catalog, Facts
from serve.errors import GalleryError
from serve.index import Index, unit_vectors
from serve.sources import Sample

DIM = 8
FACTS = Facts(encoder_id="e" * 16, encoder_name="toy", embedding_dim=DIM, manifest="{}")


def random_units(count, seed=0):
    return unit_vectors(np.random.default_rng(seed).standard_normal((count, DIM)), DIM)


@pytest.fixture
def catalog(tmp_path):
    return filled(tmp_path / "catalog.sqlite", seed=0)


def filled(path, seed):
    catalog = Catalog(path, FACTS)
    catalog.add([Sample(f"{i}.jpg") for i in range(50)], random_units(50, seed), {})
    return catalog


def assert_right(index, catalog):
    """The index holds exactly the catalog's vectors: each finds itself, and nothing else is in it."""
    assert index.problems() == []
    assert len(index) == len(catalog)
    for ids, vectors in catalog.vectors(0, 2**62):
        for item_id, vector in zip(ids, vectors, strict=True):
            scores, found = index.search(vector, 1)
            assert found.tolist() == [item_id]
            assert scores[0] == pytest.approx(1, abs=1e-5)


def test_save_load_and_replay(tmp_path, catalog, caplog):
    index = Index(catalog, tmp_path / "index.faiss")
    assert index.unsaved == 50
    index.save()
    assert index.unsaved == 0
    new = catalog.add([Sample("new")], random_units(1, 9), {})
    catalog.remove([1, 2, *new])
    catalog.add([Sample("newer"), Sample("1.jpg")], random_units(2, 10), {})
    with caplog.at_level(logging.INFO):
        again = Index(catalog, tmp_path / "index.faiss")
    assert caplog.messages == []
    assert again.unsaved == 2 + 3  # not all 50: it was replayed, not rebuilt
    assert_right(again, catalog)
    index.catch_up()
    assert_right(index, catalog)


def foreign_index(tmp_path):
    Index(filled(tmp_path / "other.sqlite", seed=7), tmp_path / "foreign").save()
    return (tmp_path / "foreign").read_bytes()


def bare_faiss(tmp_path):
    bare = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    bare.add_with_ids(random_units(50, 3), np.arange(1, 51))
    faiss.write_index(bare, str(tmp_path / "bare"))
    return (tmp_path / "bare").read_bytes()


def flipped(good):
    return good[:600] + bytes([good[600] ^ 1]) + good[601:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda good, tmp_path: None,
        lambda good, tmp_path: b"",
        lambda good, tmp_path: good[:100],
        lambda good, tmp_path: good[:-1],
        lambda good, tmp_path: good[:-256],
        lambda good, tmp_path: good[:200] + good[-256:],
        lambda good, tmp_path: flipped(good),
        lambda good, tmp_path: b"[1, 2]".ljust(300),
        lambda good, tmp_path: b'{"format": 1}'.rjust(300),
        lambda good, tmp_path: np.random.default_rng(0).bytes(5000),
        lambda good, tmp_path: foreign_index(tmp_path),
        lambda good, tmp_path: bare_faiss(tmp_path),
    ],
    ids=["gone", "empty", "short", "1 less", "no trailer", "hole", "bit", "list", "half", "noise", "foreign", "bare"],
)
def test_a_file_that_cannot_be_trusted_is_built_anew_and_said_so(tmp_path, catalog, caplog, damage):
    path = tmp_path / "index.faiss"
    Index(catalog, path).save()
    content = damage(path.read_bytes(), tmp_path)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        index = Index(catalog, path)
    assert "built anew from the catalog" in caplog.text
    assert_right(index, catalog)


def test_an_older_file_of_the_same_gallery_is_replayed(tmp_path, catalog, caplog):
    path, old = tmp_path / "index.faiss", tmp_path / "old"
    index = Index(catalog, path)
    index.save()
    shutil.copy(path, old)
    catalog.remove([3])
    catalog.add([Sample("later")], random_units(1, 5), {})
    index.catch_up()
    index.save()
    shutil.copy(old, path)
    assert_right(Index(catalog, path), catalog)
    assert caplog.messages == []


def test_a_catalog_restored_from_a_backup_makes_the_index_stale(tmp_path, catalog, caplog):
    """Same gallery, same sequence number, another past: ids alone would not tell."""
    catalog.close()
    shutil.copy(tmp_path / "catalog.sqlite", tmp_path / "backup")
    catalog = Catalog(tmp_path / "catalog.sqlite")
    catalog.add([Sample("lost")], random_units(1, 5), {})
    Index(catalog, tmp_path / "index.faiss").save()
    catalog.close()
    shutil.copy(tmp_path / "backup", tmp_path / "catalog.sqlite")
    restored = Catalog(tmp_path / "catalog.sqlite")
    restored.add([Sample("other")], random_units(1, 6), {})
    assert_right(Index(restored, tmp_path / "index.faiss"), restored)
    assert "another past" in caplog.text


def test_a_failed_save_leaves_the_old_file(tmp_path, catalog, monkeypatch):
    path = tmp_path / "index.faiss"
    index = Index(catalog, path)
    index.save()
    before = path.read_bytes()
    catalog.remove([1])
    index.catch_up()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        with pytest.raises(GalleryError, match=r"No space left on device.*nothing is lost"):
            index.save()
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if "faiss" in p.name) == ["index.faiss"]
    assert index.unsaved == 1
    index.save()
    assert_right(Index(catalog, path), catalog)


def test_a_broken_replay_starts_over(tmp_path, catalog, monkeypatch):
    index = Index(catalog, tmp_path / "index.faiss")
    catalog.add([Sample("x")], random_units(1, 5), {})
    catalog.remove([1])
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "removed", lambda *_: 1 / 0)  # after the additions went in
        with pytest.raises(ZeroDivisionError):
            index.catch_up()
    index.catch_up()
    assert_right(index, catalog)


def test_search_with_allowed_and_excluded_ids_is_exact(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index.faiss")
    ((ids, vectors),) = catalog.vectors(0, 99)
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 49, 50):
        allowed = np.sort(rng.choice(ids, size, replace=False))
        excluded = rng.choice(ids, 10, replace=False)
        for may, out in ((None, None), (allowed, None), (None, excluded), (allowed, excluded), (allowed, ids[:0])):
            query = random_units(1, int(rng.integers(1000)))[0]
            wanted = [i for i in ids if (may is None or i in may) and (out is None or i not in out)]
            wanted.sort(key=lambda i: -float(vectors[i - 1] @ query))
            scores, found = index.search(query, 7, allowed=may, excluded=out)
            assert found.tolist() == wanted[:7]
            np.testing.assert_allclose(scores, [vectors[i - 1] @ query for i in wanted[:7]], atol=1e-6)


def test_more_than_there_is(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index.faiss")
    assert len(index.search(random_units(1)[0], 10**12)[1]) == 50
    empty = Index(Catalog(tmp_path / "empty.sqlite", FACTS), tmp_path / "none")
    assert len(empty.search(random_units(1)[0], 3)[1]) == 0


def test_problems_are_found(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index.faiss")
    index._faiss.remove_ids(np.array([4, 5]))
    index._faiss.add_with_ids(random_units(2, 77), np.array([5, 500]))
    catalog._db.execute("UPDATE items SET vector = zeroblob(32) WHERE id = 6")
    assert sorted(index.problems()) == [
        "item 4: missing from the index",
        "item 500: in the index, not in the catalog",
        "item 5: the index holds another vector",
        "item 6: the index holds another vector",
        "item 6: vector is not of unit length",
    ]
    index.rebuild()
    assert index.problems() == ["item 6: vector is not of unit length"]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32])
def test_unit_vectors(kind):
    raw = (np.random.default_rng(0).standard_normal((5, 3)) * 100).astype(kind)
    unit = unit_vectors(raw, 3)
    assert unit.dtype == np.float32
    for row, original in zip(unit, raw.astype(float), strict=True):
        np.testing.assert_allclose(row, original / sum(x * x for x in original) ** 0.5, rtol=1e-5)


def test_unit_vectors_of_extreme_size():
    np.testing.assert_allclose(unit_vectors(np.array([[3e30, 4e30]], np.float32), 2), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(unit_vectors(np.array([[3e-30, 4e-30]], np.float32), 2), [[0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "complaint"),
    [
        (np.zeros((2, 3)), "row 0 is zero"),
        (np.array([[1.0, 0, 0], [0, np.nan, 0]]), "row 1"),
        (np.array([[np.inf, 0, 0]]), "row 0"),
        (np.ones((2, 4)), r"wanted numbers of shape \(N, 3\)"),
        (np.ones(3), "wanted numbers"),
        (np.array([["a", "b", "c"]]), "wanted numbers"),
    ],
)
def test_unit_vectors_refuses(vectors, complaint):
    with pytest.raises(GalleryError, match=complaint):
        unit_vectors(vectors, 3)
