"""`simclr gallery`: what it does, prints and refuses."""

import json
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from serve.encoder import open_encoder
from serve.gallery import Gallery
from serve.sources import open_source
from tests.command_line import draw, one_line, tree


@pytest.fixture
def own_gallery(world, tmp_path):
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.add(open_source(world / "pictures").everything)
    return tmp_path / "gallery"


def test_a_gallery_from_the_first_picture_to_the_last(simclr, tmp_path):
    gallery = tmp_path / "gallery"
    code, out, err = simclr("gallery", "add", gallery, "--images", "pictures", "--encoder", "toy")
    assert (code, out) == (0, f"{gallery}: 10 added, 0 were there, 10 in all\n")
    assert "10/10" in err
    draw(tmp_path / "more" / "new.png", 99)
    code, out, _ = simclr("gallery", "add", gallery, "--images", tmp_path / "more")  # with the encoder it knows
    assert (code, out) == (0, f"{gallery}: 1 added, 0 were there, 11 in all\n")
    assert simclr("gallery", "add", gallery, "--images", "pictures")[1] == f"{gallery}: 0 added, 10 were there, 11 in all\n"
    assert simclr("gallery", "verify", gallery)[:2] == (0, f"{gallery}: 11 items, all well\n")
    code, out, _ = simclr("gallery", "info", gallery, "--json")
    info = json.loads(out)
    assert (info["count"], info["encoder_name"], info["embedding_dim"]) == (11, "toy", 8)
    assert "encoder_id     " + info["encoder_id"] in simclr("gallery", "info", gallery)[1]
    assert simclr("gallery", "remove", gallery, 2, 3)[:2] == (0, f"{gallery}: 2 removed, 9 left\n")
    assert simclr("gallery", "rebuild", gallery)[:2] == (0, f"{gallery}: index of 9 items rebuilt\n")
    for name, there in (("a/2.png", False), ("a/4.png", False), ("a/6.png", True)):  # sorted: the second and the third
        code, out, err = simclr("search", "--gallery", gallery, "--image", f"pictures/{name}", "-k", 3)
        assert (code, err, len(out.splitlines())) == (0, "", 3)
        assert (name in out) is there


def test_tune(simclr, own_gallery):
    code, out, _ = simclr("gallery", "tune", own_gallery, "--recall", 0.99)
    assert (code, out) == (0, f"{own_gallery}: exact; 10 vectors, 0 changes not yet in index/\n")
    assert json.loads((own_gallery / "index" / "base-000002" / "index.json").read_text())["content"]["header"]["limits"] == {
        "recall": 0.99,
        "latency_ms": 5.0,
        "memory_mb": None,
    }
    code, out, err = simclr("gallery", "tune", own_gallery, "--recall", 2)
    assert (code, out) == (1, "")
    assert "wanted recall above 0" in err


def test_relabel(simclr, own_gallery):
    said = simclr(
        "gallery", "relabel", own_gallery, "--where", "label = a", "--label", "cat", "--time", 2, "--extra", '{"x": 1}'
    )
    assert said == (0, f"{own_gallery}: 5 relabelled\n", "")
    assert simclr("gallery", "relabel", own_gallery, "--ids", 1, 2, "--forget", "label", "--json")[1] == '{"relabelled": 2}\n'
    with Gallery.open(own_gallery) as gallery:
        assert [item.label for item in gallery.items()] == [None, None, *["cat"] * 3, *["b"] * 5]
        assert (gallery.item(3).time, gallery.item(3).extra) == (2.0, {"x": 1})


def test_your_own_vectors_in_and_out_and_another_encoder(simclr, refused, world, tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((10, 8)))
    (tmp_path / "names.txt").write_text("".join(f"{path}\n" for path in sorted((world / "pictures").rglob("*.png"))))
    load = ("gallery", "import", tmp_path / "mine", "--vectors", tmp_path / "v.npy", "--items", tmp_path / "names.txt")
    assert "--encoder ENC, or --name NAME" in refused(*load)
    assert simclr(*load, "--name", "old")[:2] == (0, f"{tmp_path}/mine: 10 added, 0 were there, 10 in all\n")
    assert simclr(*load, "--name", "old")[:2] == (0, f"{tmp_path}/mine: 0 added, 10 were there, 10 in all\n")
    code, out, _ = simclr("search", "--gallery", tmp_path / "mine", "--like", 4, "-k", 2)
    assert (code, out.splitlines()[0]) == (0, f"  1  1.0000  #4  {world}/pictures/a/6.png")
    assert "--encoder" in refused("search", "--gallery", tmp_path / "mine", "--image", "one/only.png")
    out = tmp_path / "half.parquet"
    saved = simclr("gallery", "export", tmp_path / "mine", "--out", out, "--where", "label is unknown")
    assert saved[:2] == (0, f"{out}: 10 items\n")
    assert simclr("gallery", "import", tmp_path / "copy", "--vectors", out)[0] == 0
    code, told, _ = simclr("gallery", "reembed", tmp_path / "copy", "--encoder", "other")
    identity = open_encoder(world / "other").encoder_id
    assert (code, told) == (0, f"{tmp_path}/copy: 10 items of encoder {identity}, 0 removed\n")
    assert simclr("search", "--gallery", tmp_path / "copy", "--image", "pictures/b/3.png", "-k", 1)[1].split()[2] == "#7"


def test_remove_by_filter_tells_how_many(simclr, own_gallery):
    assert simclr("gallery", "remove", own_gallery, "--where", "label = a")[:2] == (0, f"{own_gallery}: 5 removed, 5 left\n")
    assert simclr("gallery", "remove", own_gallery, "--where", "label = a")[:2] == (0, f"{own_gallery}: 0 removed, 5 left\n")
    assert json.loads(simclr("gallery", "remove", own_gallery, 7, "--json")[1]) == {"removed": 1, "left": 4}


def test_duplicates_are_found_listed_and_removed_in_two_steps(simclr, refused, own_gallery, world, tmp_path):
    pictures = tmp_path / "more"
    pictures.mkdir()
    for name in ("0.png", "2.png"):
        shutil.copy(world / "pictures" / "a" / name, pictures / name)
    simclr("gallery", "add", own_gallery, "--images", pictures, "--encoder", "toy")
    ask = ("gallery", "duplicates", own_gallery, "--threshold", 1)
    files = ("--json", tmp_path / "d.json", "--sheet", tmp_path / "d.jpg", "--to-remove", tmp_path / "d.txt")
    code, out, err = simclr(*ask, *files)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == (
        f"{own_gallery}: 2 of 12 items are duplicates of 2 others: 2 the same file, 0 the same pixels, 0 near"
    )
    assert out.splitlines()[-1] == f"nothing was removed; simclr gallery remove {own_gallery} --ids-from {tmp_path}/d.txt"
    report = json.loads((tmp_path / "d.json").read_text())
    assert [group["keep"]["id"] for group in report["groups"]] == [1, 2]
    assert [[copy["id"] for copy in group["members"]] for group in report["groups"]] == [[11], [12]]
    assert json.loads(simclr(*ask, "--json", "-")[1]) == report
    with Image.open(tmp_path / "d.jpg") as sheet:
        assert sheet.format == "JPEG"
    (tmp_path / "x.txt").write_text("11\nall of them\n")
    assert "line 2" in refused("gallery", "remove", own_gallery, "--ids-from", tmp_path / "x.txt")
    refused("gallery", "remove", own_gallery, "--ids-from", tmp_path / "no such list")
    removed = simclr("gallery", "remove", own_gallery, "--ids-from", tmp_path / "d.txt")
    assert removed[:2] == (0, f"{own_gallery}: 2 removed, 10 left\n")
    assert simclr(*ask)[1].startswith(f"{own_gallery}: 0 of 10 items are duplicates")


@pytest.mark.parametrize("words", [(), ("--quarantine", "LIST")])
def test_gallery_add_lists_what_it_left_out(simclr, world, tmp_path, words):
    draw(tmp_path / "mixed" / "good.png")
    (tmp_path / "mixed" / "bad.png").write_text("no picture")
    listed = tmp_path / ("list.jsonl" if words else "g/quarantine.jsonl")
    words = [listed if word == "LIST" else word for word in words]
    code, _, err = simclr("gallery", "add", tmp_path / "g", "--images", tmp_path / "mixed", "--encoder", "toy", *words)
    assert (code, f"left out: 1 in all, listed in {listed}" in err) == (0, True)
    assert json.loads(listed.read_text())["source"] == str(tmp_path / "mixed" / "bad.png")
    assert simclr("gallery", "verify", tmp_path / "g")[0] == 0


GALLERY_DOORS = [
    ("gallery", "info", "GALLERY"),
    ("gallery", "rebuild", "GALLERY"),
    ("gallery", "verify", "GALLERY"),
    ("gallery", "remove", "GALLERY", "1"),
    ("gallery", "relabel", "GALLERY", "--where", "camera = 1", "--label", "x"),
    ("gallery", "add", "GALLERY", "--images", "one"),
    ("search", "--gallery", "GALLERY", "--image", "one/only.png"),
    ("search", "--gallery", "GALLERY", "--image", "one/only.png", "--encoder", "toy"),
    ("app", "--gallery", "GALLERY", "--encoder", "toy"),
]


@pytest.mark.parametrize("door", GALLERY_DOORS, ids=" ".join)
@pytest.mark.parametrize("gallery", ["missing", "empty", "no gallery", "text.txt", "milvus://host:1/c"])
def test_a_gallery_that_is_none(refused, world, door, gallery):
    before = tree(world)
    assert gallery in refused(*(gallery if word == "GALLERY" else word for word in door))
    assert tree(world) == before


@pytest.mark.parametrize("gallery", ["no gallery", "text.txt", "milvus://host:1/c"])
def test_where_no_gallery_can_be_made(refused, world, gallery):
    before = tree(world)
    assert gallery in refused("gallery", "add", gallery, "--images", "one", "--encoder", "toy")
    assert tree(world) == before


def test_a_gallery_whose_encoder_is_unknown_or_gone(refused, world, tmp_path):
    got = refused("search", "--gallery", "homeless", "--image", "one/only.png")
    assert "give --encoder" in got
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.encoder_spec = "/gone"
    assert "/gone" in refused("search", "--gallery", tmp_path / "gallery", "--image", "one/only.png")


@pytest.mark.parametrize("ids", [(999,), (1, 999), (0,), (99999999999999999999,)])
def test_an_unknown_id_removes_nothing(refused, world, ids):
    assert f"no item with id {ids[-1]}; nothing was removed" in refused("gallery", "remove", "gallery", *ids)
    with Gallery.open(world / "gallery") as gallery:
        assert len(gallery) == 10


def test_a_damaged_gallery(simclr, world, tmp_path):
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.add(open_source(world / "pictures").everything)
    database = sqlite3.connect(tmp_path / "gallery" / "catalog.sqlite")
    database.execute("UPDATE vectors SET vector = x'00' WHERE id < 4")
    database.commit()
    database.close()
    code, out, err = simclr("gallery", "verify", tmp_path / "gallery")
    assert code == 1
    assert [f"item {i}: vector of 1 bytes, wanted 32" in out for i in (1, 2, 3)] == [True] * 3
    problems = out.splitlines()
    assert f"{len(problems)} problems; --repair" in one_line(err)
    code, out, err = simclr("gallery", "verify", tmp_path / "gallery", "--repair", "--json")
    report = json.loads(out)
    assert (code, report["items"], report["found"]) == (1, 10, problems)
    assert f"not repaired: {report['left'][0]}" in one_line(err)
    assert simclr("gallery", "remove", tmp_path / "gallery", 1, 2, 3)[0] == 0
    assert simclr("gallery", "verify", tmp_path / "gallery")[:2] == (0, f"{tmp_path / 'gallery'}: 7 items, all well\n")


def test_an_sqlite_index_that_lost_an_item_is_repaired(simclr, own_gallery):
    with closing(sqlite3.connect(own_gallery / "catalog.sqlite")) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'items_label'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    content = bytearray((own_gallery / "catalog.sqlite").read_bytes())
    content[page * size - 2] ^= 1  # the last bytes of its page are its first entry: a label and an id
    (own_gallery / "catalog.sqlite").write_bytes(content)
    code, out, _ = simclr("gallery", "verify", own_gallery)
    assert (code, "missing from index items_label" in out) == (1, True)
    assert simclr("gallery", "verify", own_gallery, "--repair")[:2] == (0, f"{out}{own_gallery}: 10 items, repaired\n")
    assert simclr("gallery", "verify", own_gallery)[:2] == (0, f"{own_gallery}: 10 items, all well\n")


def test_a_catalog_that_is_no_database(refused, world, tmp_path):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "catalog.sqlite").write_text("not a database, but long enough to look at" * 100)
    assert "catalog.sqlite" in refused("gallery", "info", tmp_path / "gallery")
