"""A gallery copied between folders and Milvus: the same vectors and facts, nothing embedded, nothing doubled."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
from tqdm import tqdm

import cli
import serve.catalog
import serve.milvus.store
import serve.transfer.copying
from serve.errors import EncoderMismatch, GalleryError
from serve.gallery import Gallery
from serve.transfer.copying import CopyReport, copy_gallery
from tests.gallery_items import samples_of, vectors_of

KINDS = ("folder", "milvus")


@pytest.fixture
def places(request, tmp_path, milvus_lite):
    """Gives addresses of either kind where no gallery is yet."""
    numbers = itertools.count()
    return lambda kind: (
        str(tmp_path / f"gallery {next(numbers)}")
        if kind == "folder"
        else f"{milvus_lite}#{tmp_path.name.translate({45: 95})}_{next(numbers)}"
    )


@pytest.fixture
def filled(places, toy_encoder):
    """Makes a gallery of 37 items in which some ids are missing, and closes it."""

    def fill(kind):
        address = places(kind)
        extra = {"s1": {"box": [1, 2], "blur": 0.5, "night": True, "none": None}, "s7": {"ä": "ö'\"\\\n"}}
        with Gallery.open(address, toy_encoder, create=True) as gallery:
            gallery.encoder_spec = "grpc://host:8001/toy"
            gallery.add(samples_of(40), vectors_of(40), extra=extra)
            gallery.remove([1, 20, 40])
            gallery.relabel([3], label=None, camera=None, time=None)
        return address

    return fill


def contents(address):
    with Gallery.open(address) as gallery:
        return gallery.items(), {item.id: gallery.vector(item.id).tobytes() for item in gallery.items()}, gallery.encoder_spec


@pytest.mark.milvus
@pytest.mark.parametrize("original", KINDS)
@pytest.mark.parametrize("copy", KINDS)
def test_a_new_copy_is_the_same_to_the_last_bit_and_id(filled, places, original, copy, toy_encoder, monkeypatch):
    source, target = filled(original), places(copy)
    monkeypatch.setattr(toy_encoder, "embed", lambda _: pytest.fail("embedded"))
    assert copy_gallery(source, target) == CopyReport(copied=37, kept_ids=37, already_present=0, count=37)
    assert contents(target) == contents(source)
    assert copy_gallery(source, target) == CopyReport(copied=0, kept_ids=0, already_present=37, count=37)
    with Gallery.open(target, toy_encoder) as gallery, Gallery.open(source) as former:
        query = vectors_of(1, seed=3)[0]
        found, wanted = gallery.search(query, 37), former.search(query, 37)
        assert [hit.id for hit in found] == [hit.id for hit in wanted]
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in wanted], atol=1e-6)


@pytest.mark.milvus
@pytest.mark.parametrize("copy", KINDS)
def test_a_copy_that_broke_off_goes_on(filled, places, copy, monkeypatch):
    source, target = filled("folder"), places(copy)
    read = serve.catalog.Catalog.rows
    monkeypatch.setattr(serve.catalog.Catalog, "rows", lambda self, where: read(self, where, 5))
    add, calls = serve.transfer.copying._add, itertools.count()

    def breaking(*block):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return add(*block)

    monkeypatch.setattr(serve.transfer.copying, "_add", breaking)
    with pytest.raises(KeyboardInterrupt):
        copy_gallery(source, target)
    assert len(contents(target)[0]) == 15
    assert copy_gallery(source, target) == CopyReport(copied=22, kept_ids=22, already_present=15, count=37)
    assert contents(target) == contents(source)


@pytest.mark.milvus
@pytest.mark.parametrize("copy", KINDS)
def test_what_is_in_the_copy_stays_and_what_comes_gets_new_ids(filled, places, copy, toy_encoder):
    source, target = filled("folder"), places(copy)
    with Gallery.open(target, toy_encoder, create=True) as gallery:
        gallery.add(samples_of(50, "other"), vectors_of(50))
        gallery.add(samples_of(3)[2:], vectors_of(1))  # s2, of which the original says otherwise
        gallery.remove([50])
        before = gallery.items()
    assert copy_gallery(source, target) == CopyReport(copied=36, kept_ids=0, already_present=1, count=86)
    items, vectors, _ = contents(target)
    assert items[: len(before)] == before
    assert [item.id for item in items[len(before) :]] == list(range(52, 88))
    former, of_former, _ = contents(source)
    assert [item.source for item in items[len(before) :]] == [item.source for item in former if item.source != "s2"]
    ids = {item.source: item.id for item in items}
    assert all(vectors[ids[item.source]] == of_former[item.id] for item in former if item.source != "s2")


@pytest.mark.milvus
@pytest.mark.parametrize("copy", KINDS)
def test_a_gallery_of_another_encoder_is_refused_and_stays(filled, places, copy, toy_encoder, other_encoder):
    source, target = filled("folder"), places(copy)
    Gallery.open(target, other_encoder, create=True).close()
    with pytest.raises(EncoderMismatch, match=toy_encoder.encoder_id):
        copy_gallery(source, target)
    assert contents(target) == ([], {}, None)


def test_the_figures_do_not_hang_on_the_progress_bar(tmp_path, toy_encoder, monkeypatch):
    """TQDM_DISABLE=1 is read when tqdm is imported; then the bar counts nothing."""
    monkeypatch.setattr(serve.transfer.copying, "tqdm", partial(tqdm, disable=True))
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    with Gallery.open(source, toy_encoder, create=True) as gallery:
        gallery.add(samples_of(5), vectors_of(5))
    assert copy_gallery(source, target) == CopyReport(copied=5, kept_ids=5, already_present=0, count=5)
    assert copy_gallery(source, target) == CopyReport(copied=0, kept_ids=0, already_present=5, count=5)


@pytest.mark.milvus
def test_the_command_says_what_it_did_in_one_line(filled, places, capsys):
    source, target = filled("folder"), places("milvus")
    cli.main(["gallery", "copy", source, target])
    assert capsys.readouterr().out == f"{target}: 37 copied, all with their ids, 0 were there, 37 in all\n"
    cli.main(["gallery", "copy", source, target, "--json"])
    assert json.loads(capsys.readouterr().out) == {"copied": 0, "kept_ids": 0, "already_present": 37, "count": 37}
    cli.main(["gallery", "info", target, "--json"])
    assert json.loads(capsys.readouterr().out)["index"].startswith("FLAT in milvus_lite")
    with pytest.raises(SystemExit):
        cli.main(["gallery", "verify", target])
    assert capsys.readouterr().err.startswith(f"simclr: {target}: verify is for galleries in folders; ")


def test_a_gallery_that_is_not_there(tmp_path):
    with pytest.raises(GalleryError, match="no such gallery"):
        copy_gallery(str(tmp_path / "no"), str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
