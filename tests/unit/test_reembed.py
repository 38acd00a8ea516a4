"""A gallery changes its encoder: what stays, what is caught up with, and what others see meanwhile."""

import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import serve.transfer.reembed
from serve.ann.choice import IndexLimits
from serve.contract import Manifest
from serve.engines.quarantine import read_quarantine
from serve.errors import EncoderMismatch, GalleryError, Reembedded
from serve.gallery import Gallery
from serve.samples import Sample
from serve.transfer.next_vectors import NextVectors
from serve.transfer.reembed import QUARANTINE_NAME, reembed


@pytest.fixture
def folder(tmp_path, toy_encoder, pictures):
    """40 pictures, of which some were removed, some have another label, and one has another source."""
    samples = pictures(40)
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        gallery.add(samples, extra={samples[1].source: {"blur": 0.5}}, batch_size=10)
        gallery.relabel([3, 4], label="other", extra={"seen": True})
        gallery.remove([7, 40])
        gallery.encoder_spec = "/old"
    return tmp_path / "gallery"


def items_of(folder):
    with Gallery.open(folder) as gallery:
        return gallery.items()


def check_vectors(folder, encoder):
    """Every vector is the encoder's of that very picture, and search finds it."""
    with Gallery.open(folder, encoder) as gallery:
        for item in gallery.items():
            (wanted,) = encoder.embed([item.source])
            np.testing.assert_allclose(gallery.vector(item.id), wanted, atol=1e-6)
            assert gallery.search(item.source, 1)[0].id == item.id
        assert gallery.verify() == []


def test_ids_and_all_that_is_known_stay(folder, other_encoder, toy_encoder):
    before = items_of(folder)
    report = reembed(str(folder), other_encoder, "/new")
    assert (report.count, report.dropped) == (38, ())
    assert items_of(folder) == before
    check_vectors(folder, other_encoder)
    with Gallery.open(folder, other_encoder) as gallery:
        assert gallery.encoder_spec == "/new"
        assert Manifest.parse(gallery.manifest, "it") == other_encoder.manifest
        assert Manifest.parse((folder / "gallery.json").read_text(), "it") == other_encoder.manifest
        assert gallery.add([Sample("late")], other_encoder.embed([before[0].source])).ids == (41,), "ids are never used again"
    with pytest.raises(EncoderMismatch, match=f"simclr gallery reembed {folder} --encoder"):
        Gallery.open(folder, toy_encoder)


def test_there_and_back_and_twice_the_same(folder, other_encoder, toy_encoder):
    for encoder in (other_encoder, other_encoder, toy_encoder, other_encoder):
        reembed(str(folder), encoder)
        check_vectors(folder, encoder)


def test_to_another_dimension(folder, other_encoder, monkeypatch):
    class Half:
        """The first 8 numbers of another's vectors."""

        manifest = Manifest.create(
            **{
                **{name: getattr(other_encoder.manifest, name) for name in Manifest.model_fields if name != "encoder_id"},
                "embedding_dim": 8,
                "output": other_encoder.manifest.output.model_copy(update={"shape": (8,)}),
            }
        )
        encoder_id = manifest.encoder_id

        def embed(self, images):
            vectors = other_encoder.embed(images)[:, :8]
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    reembed(str(folder), Half())
    check_vectors(folder, Half())
    with Gallery.open(folder) as gallery:
        assert gallery.info().embedding_dim == 8


def test_the_limits_of_the_index_stay(folder, other_encoder):
    with Gallery.open(folder) as gallery:
        gallery.tune(IndexLimits(recall=0.97))
    reembed(str(folder), other_encoder)
    with Gallery.open(folder) as gallery:
        assert gallery.limits == IndexLimits(recall=0.97)


class Meanwhile:
    """An encoder, and what happens after so many batches of it."""

    def __init__(self, encoder, *happens):
        self.encoder_id, self.manifest, self._encoder, self._happens = encoder.encoder_id, encoder.manifest, encoder, [*happens]

    def embed(self, images):
        vectors = self._encoder.embed(images)
        if len(images) and self._happens:
            self._happens.pop(0)()
        return vectors


def test_what_is_changed_meanwhile_is_caught_up_with(folder, other_encoder, toy_encoder, tmp_path):
    new = [tmp_path / "pictures" / f"new{i}.png" for i in range(3)]
    for number, path in enumerate(new):
        Image.fromarray(np.random.default_rng(100 + number).integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    with Gallery.open(folder, toy_encoder) as old:

        def first():
            old.add([Sample(str(new[0]), label="new")])
            old.update(1, str(new[1]), source=str(new[1]))
            old.remove([2])
            old.relabel([3], label="late", extra={"seen": None})

        def second():
            old.update(41, str(new[2]), source=str(new[2]))
            old.remove([5])

        reembed(str(folder), Meanwhile(other_encoder, first, second, lambda: old.remove([6])))
    items = {item.id: item for item in items_of(folder)}
    assert items.keys() == {1, 3, 4, *range(8, 40), 41}
    assert (items[41].source, items[41].label) == (str(new[2]), "new")
    assert items[1].source == str(new[1])
    assert (items[3].label, items[3].extra) == ("late", {})
    check_vectors(folder, other_encoder)


def test_readers_go_on_with_the_old_vectors_and_writers_are_told(folder, other_encoder, toy_encoder, caplog):
    with Gallery.open(folder, toy_encoder) as old:
        query = old.vector(1)
        before = old.search(query, 100)
        within = old.search(query, 100, "camera = 1")
        reembed(str(folder), other_encoder)
        assert old.search(query, 100) == before
        assert old.search(query, 100, "camera = 1") == within
        assert [record.message for record in caplog.records if "another encoder" in record.message][1:] == []
        for action in (
            lambda: old.vector(1),
            lambda: old.add([Sample("x")], query[None]),
            lambda: old.update(1, query),
            lambda: old.relabel([1], label="x"),
            lambda: old.remove([1]),
            lambda: list(old.rows()),
            old.verify,
            old.save,
        ):
            with pytest.raises(Reembedded, match="open it again"):
                action()
        with Gallery.open(folder, other_encoder) as new:
            new.remove([1])
            new.relabel([2], label="seen by all")
            after = old.search(query, 100)
            assert [hit.id for hit in after] == [hit.id for hit in before if hit.id != 1], "hits exist"
            assert next(hit for hit in after if hit.id == 2).label == "seen by all"
    check_vectors(folder, other_encoder)


def test_a_reader_that_has_much_to_save_leaves_nothing_behind(folder, other_encoder, toy_encoder):
    with Gallery.open(folder, toy_encoder) as old:
        old.search(old.vector(1), 1)
        reembed(str(folder), other_encoder)
        old.search(np.ones(16, np.float32), 1)
    bases = [path.name for path in (folder / "index").glob("base-*")]
    with Gallery.open(folder, other_encoder) as gallery:
        assert gallery.verify() == []
    assert len(bases) == 1


def test_the_old_one_is_searched_all_the_while(folder, other_encoder, toy_encoder, monkeypatch):
    """Every answer is the old encoder's, or the gallery's that was opened after; nothing between."""
    monkeypatch.setattr(serve.transfer.reembed, "_BLOCK_ITEMS", 4)
    with Gallery.open(folder, toy_encoder) as old:
        query, failures, answers, over = old.vector(1), [], [], threading.Event()
        wanted = [(hit.id, hit.score) for hit in old.search(query, 10)]

        def search():
            try:
                while not over.is_set():
                    answers.append([(hit.id, hit.score) for hit in old.search(query, 10)])
                    with Gallery.open(folder) as opened:
                        encoder = other_encoder if opened.encoder_id == other_encoder.encoder_id else toy_encoder
                    answers.append(wanted if encoder is toy_encoder else None)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=search)
        thread.start()
        reembed(str(folder), other_encoder)
        over.set()
        thread.join()
    assert failures == []
    assert {str(answer) for answer in answers if answer is not None} == {str(wanted)}
    assert len(answers) > 3


def test_unreadable_pictures_keep_it_the_old_ones_until_told_to_drop_them(folder, other_encoder, toy_encoder):
    before = items_of(folder)
    kept = Path(before[4].source).read_bytes()
    for item in before[3:6]:
        Path(item.source).unlink()
    for _ in range(2):
        with pytest.raises(GalleryError, match=r"3 of 38 pictures.*unreadable\.jsonl.*--drop-unreadable"):
            reembed(str(folder), other_encoder)
        assert items_of(folder) == before
        assert [bad.source for bad in read_quarantine(folder / QUARANTINE_NAME)] == [item.source for item in before[3:6]]
        with Gallery.open(folder, toy_encoder) as gallery:
            assert gallery.verify() == []
    Path(before[4].source).write_bytes(kept)
    report = reembed(str(folder), other_encoder, drop_unreadable=True)
    assert [bad.source for bad in report.dropped] == [before[3].source, before[5].source]
    assert items_of(folder) == [item for item in before if item not in (before[3], before[5])]
    check_vectors(folder, other_encoder)
    with Gallery.open(folder) as gallery:
        assert gallery.add([Sample("new")], np.ones((1, 16), np.float32)).ids == (41,)


def test_a_share_that_is_not_mounted_empties_no_gallery(folder, other_encoder):
    before = items_of(folder)
    Path(before[0].source).parent.rename(folder.parent / "elsewhere")
    with pytest.raises(GalleryError, match="38 of 38") as caught:
        reembed(str(folder), other_encoder, drop_unreadable=True)
    assert "--drop-unreadable" not in str(caught.value)
    assert items_of(folder) == before


def test_it_goes_on_where_it_was_broken_off(folder, other_encoder, monkeypatch):
    monkeypatch.setattr(serve.transfer.reembed, "_BLOCK_ITEMS", 10)
    embedded = []

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reembed(str(folder), Meanwhile(other_encoder, lambda: None, lambda: None, stop))
    counting = Meanwhile(other_encoder, *[lambda: None] * 100)
    embed = counting.embed
    counting.embed = lambda images: embedded.append(len(images)) or embed(images)
    reembed(str(folder), counting)
    assert sum(embedded) == 18
    check_vectors(folder, other_encoder)


def test_what_is_erased_meanwhile_leaves_no_vector(folder, other_encoder, toy_encoder, monkeypatch):
    monkeypatch.setattr(NextVectors, "take_over", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reembed(str(folder), other_encoder)
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as db:
        (vector,) = db.execute(f"SELECT vector FROM next_{other_encoder.encoder_id} WHERE id = 1").fetchone()  # noqa: S608
    with Gallery.open(folder, toy_encoder) as gallery:
        gallery.erase([1])
        assert gallery.verify() == []
    for file in folder.rglob("*"):
        assert file.is_dir() or vector[:32] not in file.read_bytes(), file
    monkeypatch.undo()
    reembed(str(folder), other_encoder)
    check_vectors(folder, other_encoder)


def test_a_third_encoder_in_between(folder, other_encoder, toy_encoder, monkeypatch):
    """What was begun for an encoder that did not take over is gone with the next that does."""
    with monkeypatch.context() as patch:
        patch.setattr(NextVectors, "take_over", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reembed(str(folder), other_encoder)
    third = type(toy_encoder)("third", seed=3)
    reembed(str(folder), third)
    check_vectors(folder, third)
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'trigger')")}
        indexes = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND name LIKE 'vec%'")}
    assert names == {"facts", "changes", "items", "vectors", "removed"}
    assert indexes == {"vectors_seq"}


def test_two_at_once(folder, other_encoder):
    """The second finds the work done."""
    done = []
    reembed(str(folder), Meanwhile(other_encoder, lambda: done.append(reembed(str(folder), other_encoder))))
    assert done[0].count == 38
    check_vectors(folder, other_encoder)


def test_an_empty_gallery(tmp_path, toy_encoder, other_encoder):
    Gallery.open(tmp_path / "gallery", toy_encoder, create=True).close()
    assert reembed(str(tmp_path / "gallery"), other_encoder).count == 0
    with Gallery.open(tmp_path / "gallery", other_encoder) as gallery:
        gallery.add([Sample("a")], np.ones((1, 16), np.float32))


def test_a_base_of_the_former_vectors_is_not_used(folder, other_encoder, toy_encoder, tmp_path, caplog):
    with Gallery.open(folder, toy_encoder) as gallery:
        gallery.save()
    (folder / "index").rename(tmp_path / "kept")
    reembed(str(folder), other_encoder)
    for path in (folder / "index").glob("base-*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (tmp_path / "kept" / "base-000001").rename(folder / "index" / "base-000009")
    check_vectors(folder, other_encoder)
    assert "not usable" in caplog.text


def test_only_folders(other_encoder, tmp_path):
    with pytest.raises(GalleryError, match="folder"):
        reembed("milvus://localhost:1/x", other_encoder)
    with pytest.raises(GalleryError, match="no such gallery"):
        reembed(str(tmp_path / "nowhere"), other_encoder)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"
