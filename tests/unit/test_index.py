"""The index as its gallery uses it: what is on disk, what is in memory, and what happens when either is not as it should be."""

import errno
import json
import logging
import shutil

import numpy as np
import pytest

import serve.ann.build
import serve.ann.state
from serve.ann.base import folders
from serve.catalog import Catalog
from serve.errors import GalleryError
from serve.index import Index, unit_vectors
from serve.samples import Sample
from tests.gallery_items import toy_facts

DIM = 8
FACTS = toy_facts(DIM)


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
        scores, found = index.search(vectors, 1)
        assert found[:, 0].tolist() == ids.tolist()
        np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)


def test_save_load_and_replay(tmp_path, catalog, caplog):
    index = Index(catalog, tmp_path / "index")
    assert index.unsaved == 50
    index.save()
    assert index.unsaved == 0
    new = catalog.add([Sample("new")], random_units(1, 9), {})
    catalog.remove([1, 2, *new])
    catalog.add([Sample("newer"), Sample("1.jpg")], random_units(2, 10), {})
    catalog.update(7, random_units(1, 11)[0])
    with caplog.at_level(logging.INFO):
        again = Index(catalog, tmp_path / "index")
    assert caplog.messages == []
    assert again.unsaved == 2 + 2 + 2  # removed, added, and one changed: its old row and its new one
    assert_right(again, catalog)
    index.catch_up()
    assert_right(index, catalog)
    again.save()
    assert (again.unsaved, index.unsaved) == (0, 6)
    assert_right(index, catalog)  # the base it maps is gone from the disk, and stays readable
    assert_right(Index(catalog, tmp_path / "index"), catalog)


def edited(base, name, edit):
    path = base / name
    path.write_bytes(edit(path.read_bytes()))


def flipped(good):
    return good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :]


def reformatted(text):
    whole = json.loads(text)
    whole["content"]["header"]["seq"] -= 1
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda base: shutil.rmtree(base),
        lambda base: [path.unlink() for path in base.iterdir()],
        lambda base: (base / "index.json").unlink(),
        lambda base: (base / "rows.vectors").unlink(),
        lambda base: edited(base, "index.json", lambda good: b""),
        lambda base: edited(base, "index.json", lambda good: good[:-1]),
        lambda base: edited(base, "index.json", flipped),
        lambda base: edited(base, "index.json", reformatted),
        lambda base: edited(base, "index.json", lambda good: b"[1, 2]"),
        lambda base: edited(base, "index.json", lambda good: b'{"crc32": 0, "content": {}}'),
        lambda base: edited(base, "index.json", lambda good: np.random.default_rng(0).bytes(5000)),
        lambda base: edited(base, "rows.ids", lambda good: good[:-8]),
        lambda base: edited(base, "rows.ids", flipped),
        lambda base: edited(base, "rows.vectors", lambda good: good + b"0000"),
        lambda base: edited(base, "rows.vectors", flipped),
    ],
)
def test_a_base_that_cannot_be_trusted_is_built_anew_and_said_so(tmp_path, catalog, caplog, damage):
    Index(catalog, tmp_path / "index").save()
    (base,) = folders(tmp_path / "index")
    damage(base)
    caplog.clear()
    index = Index(catalog, tmp_path / "index")
    assert ("built anew from the catalog" in caplog.text) == base.exists()
    assert len(index) == 50
    assert all(str(base) in problem for problem in index.problems())
    index.save()
    assert_right(index, catalog)
    assert len(folders(tmp_path / "index")) == 1
    assert_right(Index(catalog, tmp_path / "index"), catalog)


def test_a_base_of_another_gallery_is_not_believed(tmp_path, catalog, caplog):
    Index(filled(tmp_path / "other.sqlite", seed=7), tmp_path / "index").save()
    assert_right(Index(catalog, tmp_path / "index"), catalog)
    assert "another gallery" in caplog.text


def test_an_older_base_of_the_same_gallery_is_replayed(tmp_path, catalog, caplog):
    index = Index(catalog, tmp_path / "index")
    index.save()
    shutil.copytree(tmp_path / "index", tmp_path / "old")
    catalog.remove([3])
    catalog.add([Sample("later")], random_units(1, 5), {})
    index.catch_up()
    index.save()
    shutil.rmtree(tmp_path / "index")
    shutil.copytree(tmp_path / "old", tmp_path / "index")
    assert_right(Index(catalog, tmp_path / "index"), catalog)
    assert caplog.messages == []


def test_of_a_damaged_newest_base_and_an_older_one_the_older_is_used(tmp_path, catalog, caplog):
    index = Index(catalog, tmp_path / "index")
    index.save()
    (first,) = folders(tmp_path / "index")
    shutil.copytree(first, tmp_path / "kept")
    catalog.remove([3])
    index.catch_up()
    index.save()
    (second,) = folders(tmp_path / "index")
    shutil.copytree(tmp_path / "kept", first)
    edited(second, "rows.ids", flipped)
    again = Index(catalog, tmp_path / "index")
    assert str(second) in caplog.text
    assert str(first) not in caplog.text
    assert again.unsaved == 1
    again.save()
    assert_right(again, catalog)


def test_a_catalog_restored_from_a_backup_makes_the_index_stale(tmp_path, catalog, caplog):
    """Same gallery, same sequence number, another past: ids alone would not tell."""
    catalog.close()
    shutil.copy(tmp_path / "catalog.sqlite", tmp_path / "backup")
    catalog = Catalog(tmp_path / "catalog.sqlite")
    catalog.add([Sample("lost")], random_units(1, 5), {})
    Index(catalog, tmp_path / "index").save()
    catalog.close()
    shutil.copy(tmp_path / "backup", tmp_path / "catalog.sqlite")
    restored = Catalog(tmp_path / "catalog.sqlite")
    restored.add([Sample("other")], random_units(1, 6), {})
    assert_right(Index(restored, tmp_path / "index"), restored)
    assert "another past" in caplog.text


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_leaves_the_old_base(tmp_path, catalog, monkeypatch):
    index = Index(catalog, tmp_path / "index")
    index.save()
    before = folders(tmp_path / "index")
    catalog.remove([1])
    index.catch_up()
    for step in ("write_array", "write_header"):
        with monkeypatch.context() as patch:
            patch.setattr(serve.ann.build, step, full)
            with pytest.raises(GalleryError, match=r"No space left on device.*nothing is lost"):
                index.save()
    assert folders(tmp_path / "index") == before
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [before[0].name, "lock"]
    assert index.unsaved == 1
    index.save()
    assert_right(Index(catalog, tmp_path / "index"), catalog)


def test_a_broken_replay_starts_over(tmp_path, catalog, monkeypatch):
    index = Index(catalog, tmp_path / "index")
    catalog.add([Sample("x")], random_units(1, 5), {})
    catalog.remove([1])
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "vectors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.catch_up()
    index.catch_up()
    assert_right(index, catalog)


def test_search_with_allowed_and_excluded_ids_is_exact(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    index.save()
    catalog.add([Sample(f"later {i}") for i in range(10)], random_units(10, 3), {})
    index.catch_up()  # half in the base and half beside it
    ids, vectors = (np.concatenate(parts) for parts in zip(*catalog.vectors(0, 99), strict=True))
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 49, 60):
        allowed = np.sort(rng.choice(ids, size, replace=False))
        excluded = rng.choice(ids, 10, replace=False)
        for may, out in ((None, None), (allowed, None), (None, excluded), (allowed, excluded), (allowed, ids[:0])):
            query = random_units(1, int(rng.integers(1000)))[0]
            wanted = [i for i in ids if (may is None or i in may) and (out is None or i not in out)]
            wanted.sort(key=lambda i: -float(vectors[i - 1] @ query))
            scores, found = index.search(query[None], 7, allowed=may, excluded=out)
            assert [i for i in found[0] if i >= 0] == wanted[:7]
            np.testing.assert_allclose(scores[0][: len(wanted)], [vectors[i - 1] @ query for i in wanted[:7]], atol=1e-6)
            assert (scores[0][len(wanted) :] == -np.inf).all()


def test_equal_scores_stand_by_growing_id(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    same = np.repeat(random_units(1, 77), 6, axis=0)
    catalog.add([Sample(f"same {i}") for i in range(3)], same[:3], {})
    index.catch_up()
    index.save()
    catalog.add([Sample(f"same {i}") for i in range(3, 6)], same[3:], {})
    index.catch_up()
    assert index.search(same[:1], 6)[1].tolist() == [[51, 52, 53, 54, 55, 56]]


def test_more_than_there_is(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    assert index.search(random_units(2), 10**12)[1].shape == (2, 50)
    empty = Index(Catalog(tmp_path / "empty.sqlite", FACTS), tmp_path / "none")
    for count in (1, 3, 3000):
        assert empty.search(random_units(count), 3)[1].shape == (count, 0)
    empty.save()
    assert_right(empty, empty._catalog)
    assert_right(Index(empty._catalog, tmp_path / "none"), empty._catalog)


def test_everything_may_be_removed(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    index.save()
    catalog.remove(list(range(1, 51)))
    index.catch_up()
    assert index.search(random_units(2), 3)[1].shape == (2, 0)
    index.close()
    assert_right(Index(catalog, tmp_path / "index"), catalog)


def test_many_queries_are_cut_into_blocks(tmp_path, catalog):
    index, queries = Index(catalog, tmp_path / "index"), random_units(2500, 4)
    scores, ids = index.search(queries, 3)
    np.testing.assert_array_equal(ids, np.concatenate([index.search(query[None], 3)[1] for query in queries]))
    assert scores.shape == (2500, 3)


def test_without_a_base_many_rows_go_to_the_disk_before_they_are_searched(tmp_path, catalog, monkeypatch):
    monkeypatch.setattr(serve.index, "MANY_ROWS", 40)
    index = Index(catalog, tmp_path / "index")
    assert index.unsaved == 0
    assert_right(index, catalog)
    with monkeypatch.context() as patch:
        patch.setattr(serve.ann.build, "write_header", full)
        inside = Index(catalog, tmp_path / "elsewhere")
    assert inside.unsaved == 50  # no room: then in memory
    assert_right(inside, catalog)


def test_problems_are_found(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    index.save()
    state = index._state.without(np.array([4, 5]))
    foreign = state.tail.followed_by(np.array([5, 500]), random_units(2, 77))
    index._state = serve.ann.state.replace(state, tail=foreign)
    with catalog._file.writing() as db:
        db.execute("UPDATE vectors SET vector = zeroblob(32) WHERE id = 6")
    assert sorted(index.problems()) == [
        "item 4: missing from the index",
        "item 500: in the index, not in the catalog",
        "item 5: the index holds another vector",
        "item 6: the index holds another vector",
        "item 6: vector is not of unit length",
    ]
    index.rebuild()
    assert index.problems() == ["item 6: vector is not of unit length"]


def test_a_bit_that_flips_while_a_base_is_in_use_is_found(tmp_path, catalog):
    index = Index(catalog, tmp_path / "index")
    index.save()
    (base,) = folders(tmp_path / "index")
    for name in ("rows.ids", "rows.vectors", "index.json"):
        good = (base / name).read_bytes()
        (base / name).write_bytes(flipped(good))
        assert any(str(base) in problem for problem in index.problems()), name
        (base / name).write_bytes(good)
    assert index.problems() == []


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
