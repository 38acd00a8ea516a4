"""What is Milvus' own: addresses, what it cannot do, what goes wrong."""

import subprocess
import sys

import numpy as np
import pytest

import serve.milvus.store
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.milvus.address import Address
from serve.milvus.collection import BLOCK_ROWS, MOST_FOUND
from serve.samples import Sample
from tests.gallery_items import samples_of, vectors_of


@pytest.fixture
def gallery(milvus_address, toy_encoder):
    with Gallery.open(milvus_address, toy_encoder, create=True) as gallery:
        yield gallery


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("milvus://host/people", ("http://host:19530", "", "people")),
        ("milvus://10.0.0.1:1234/people/", ("http://10.0.0.1:1234", "", "people")),
        ("milvus://host/shop/people", ("http://host:19530", "shop", "people")),
        ("milvus://[::1]:1234/people", ("http://[::1]:1234", "", "people")),
        ("milvus-lite:///data/people.db", ("/data/people.db", "", "simclr")),
        ("milvus-lite:///data/people.db#shop", ("/data/people.db", "", "shop")),
    ],
)
def test_addresses(text, wanted):
    address = Address.parse(text)
    assert (address.server, address.database, address.collection) == wanted
    assert (address.file is None) == text.startswith("milvus:")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("milvus://host:19530", "wanted a folder, milvus://HOST:PORT/COLLECTION or milvus-lite:///FILE.db"),
        ("milvus:///people", "no address of a gallery"),
        ("milvus://host:port/people", "no address of a gallery"),
        ("milvus://host/a/b/c", "no address of a gallery"),
        ("qdrant://host/people", "no address of a gallery"),
        ("milvus://root:secret@host/people", "takes no password; set MILVUS_TOKEN"),
        ("milvus://host/peo-ple", "'peo-ple' is no name for Milvus"),
        ("milvus://host/1/people", "'1' is no name for Milvus"),
        ("milvus-lite:///data/people", "the file ending in .db"),
        ("milvus-lite:///data/people.db#a b", "'a b' is no name"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text, complaint, toy_encoder):
    with pytest.raises(GalleryError, match=complaint) as caught:
        Gallery.open(text, toy_encoder, create=True)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_without_pymilvus_the_extra_is_named(tmp_path, monkeypatch, toy_encoder):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(GalleryError, match=r"needs pymilvus: pip install 'simclr-serve\[scale\]'"):
        Gallery.open(f"milvus-lite://{tmp_path}/x.db", toy_encoder, create=True)


@pytest.mark.milvus
def test_without_milvus_lite_the_extra_is_named(tmp_path, monkeypatch, toy_encoder):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed (the extra `scale`)")
    monkeypatch.setitem(sys.modules, "milvus_lite.server_manager", None)
    with pytest.raises(GalleryError, match=r"needs milvus_lite: pip install 'simclr-serve\[scale\]'"):
        Gallery.open(f"milvus-lite://{tmp_path}/x.db", toy_encoder, create=True)


@pytest.mark.milvus
def test_a_server_that_is_not_there(monkeypatch, toy_encoder):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed (the extra `scale`)")
    monkeypatch.setattr("serve.milvus.connection._TIMEOUT_S", 0.5)
    with pytest.raises(GalleryError, match="is the server up, and is MILVUS_TOKEN right") as caught:
        Gallery.open("milvus://127.0.0.1:9/people", toy_encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.milvus
@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda g: g.verify(), "verify"),
        (lambda g: g.rebuild(), "rebuild"),
        (lambda g: g.repair(), "repair"),
        (lambda g: g.limits, "tune"),
        (lambda g: g.erase([1]), "erase"),
        (lambda g: g.folder, "what is kept beside a gallery"),
    ],
)
def test_what_is_for_folders_is_refused_in_one_line_and_changes_nothing(gallery, ask, what):
    gallery.add(samples_of(2), vectors_of(2))
    with pytest.raises(GalleryError, match=f"{what} is for galleries in folders; Milvus keeps") as caught:
        ask(gallery)
    assert "\n" not in str(caught.value)
    assert len(gallery) == 2


@pytest.mark.milvus
def test_a_collection_of_somebody_else_is_no_gallery(milvus_lite, toy_encoder):
    from pymilvus import MilvusClient

    client = MilvusClient(Address.parse(milvus_lite).server)
    client.create_collection("foreign", dimension=16)
    client.close()
    for create in (False, True):
        with pytest.raises(GalleryError, match="a collection, but not a gallery's"):
            Gallery.open(f"{milvus_lite}#foreign", toy_encoder, create=create)


@pytest.mark.milvus
def test_what_is_too_long_for_milvus_is_refused_before_anything_is_changed(gallery):
    (kept,) = gallery.add(samples_of(1), vectors_of(1)).ids
    with pytest.raises(GalleryError, match="label has 65,536 bytes, Milvus takes 65,535; nothing was changed"):
        gallery.add([Sample("fits"), Sample("long", label="ä" * 32_768)], vectors_of(2))
    with pytest.raises(GalleryError, match=r"extra has 70,01\d bytes"):
        gallery.relabel([kept], extra={"text": "x" * 70_000})
    with pytest.raises(GalleryError, match="cannot be stored"):
        gallery.relabel([kept], time=float("nan"))
    with pytest.raises(GalleryError, match="cannot be stored"):
        gallery.add([Sample("half", label="\ud800")], vectors_of(1))
    assert gallery.items() == gallery.items("label = l0")


@pytest.mark.milvus
def test_more_than_milvus_finds_is_refused(gallery):
    gallery.add(samples_of(3), vectors_of(3))
    assert len(gallery.search(np.ones(16), MOST_FOUND - 1)) == 3
    for ask in (lambda: gallery.search(np.ones(16), MOST_FOUND), lambda: gallery.search_many(np.ones((1, 16)), MOST_FOUND + 1)):
        with pytest.raises(GalleryError, match="Milvus finds 16,383 items at most"):
            ask()


@pytest.mark.milvus
def test_more_than_a_block_is_added_relabelled_and_removed(gallery):
    count = BLOCK_ROWS + 7
    gallery.add(samples_of(count), vectors_of(count), batch_size=count)
    assert gallery.ids().tolist() == list(range(1, count + 1))
    gallery.relabel(range(1, count + 1), label="new")
    assert gallery.count("label = new") == count
    assert [len(items) for items, _ in gallery.rows()] == [BLOCK_ROWS, 7]
    gallery.remove(range(1, count))
    assert gallery.ids().tolist() == [count]
    assert gallery.search_many(vectors_of(300), 1)[1].tolist() == [[count]] * 300


@pytest.mark.milvus
def test_ids_go_on_after_a_session_that_broke_off(gallery, monkeypatch):
    monkeypatch.setattr(serve.milvus.store, "MOST_FOUND", 2)  # looks in several goes
    with Gallery.open(gallery.address) as killed:
        killed.add(samples_of(5), vectors_of(5))
        monkeypatch.setattr(killed._store, "_note_next_id", lambda: None)
    with Gallery.open(gallery.address) as again:
        assert again._store._noted_id() == 1
        assert again.next_id == 6
        again.remove([5])
    with Gallery.open(gallery.address) as third:
        assert third.add([Sample("x")], vectors_of(1)).ids == (6,)


ELSEWHERE = """
import sys
from serve.errors import GalleryError
from serve.gallery import Gallery

try:
    with Gallery.open(sys.argv[1]) as gallery:
        print(len(gallery), "items")
except GalleryError as error:
    print(error)
"""


@pytest.mark.milvus
def test_a_file_is_one_process_own_until_it_is_closed(milvus_lite, tmp_path, toy_encoder):
    address = f"milvus-lite://{tmp_path}/own.db"

    def said_elsewhere():
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, address], capture_output=True, text=True, timeout=300, check=True
        )
        assert done.stderr == ""
        return done.stdout.strip()

    with Gallery.open(address, toy_encoder, create=True) as gallery:
        gallery.add(samples_of(3), vectors_of(3))
        assert "has no other process the file open? Milvus Lite serves one" in said_elsewhere()
    assert said_elsewhere() == "3 items"
    with pytest.raises(GalleryError, match="this gallery has been closed; open it again"):
        len(gallery)
