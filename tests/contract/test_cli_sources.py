"""Pictures that every verb takes: `simclr embed`, and sources that cannot be used."""

import re

import pyarrow.parquet as pq
import pytest

from tests.command_line import draw, name_of, tree


def test_embed_tells_what_it_left_out(simclr, world, tmp_path):
    draw(tmp_path / "mixed" / "good.png")
    for i in range(12):
        (tmp_path / "mixed" / f"bad{i:02}.png").write_text("no picture")
    code, out, err = simclr("embed", "--encoder", "toy", "--images", tmp_path / "mixed", "--out", tmp_path / "o.parquet")
    assert (code, out) == (0, f"{tmp_path}/o.parquet: 1 vectors\n")
    told = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert told[0] == f"left out: {tmp_path}/mixed/bad00.png: not a readable picture (not a picture in a known format)"
    assert len(told) == 11
    assert told[-1] == f"left out: 12 in all, listed in {tmp_path}/o.parquet.quarantine.jsonl"
    assert len((tmp_path / "o.parquet.quarantine.jsonl").read_text().splitlines()) == 12
    assert pq.read_table(tmp_path / "o.parquet")["source"].to_pylist() == [str(tmp_path / "mixed" / "good.png")]


def test_embed_into_a_folder(simclr, world, tmp_path):
    assert simclr("embed", "--encoder", "toy", "--images", "pictures", "--out", f"{tmp_path}/o/")[:2] == (
        0,
        f"{tmp_path}/o/: 10 vectors\n",
    )
    assert pq.read_table(tmp_path / "o").num_rows == 10


SOURCE_DOORS = [
    ("embed", "--encoder", "toy", "--out", "OUT"),
    ("gallery", "add", "OUT", "--encoder", "toy"),
    ("fit-head", "--encoder", "toy", "--out", "OUT"),
    ("evaluate", "--encoder", "toy"),
    ("reid", "evaluate", "--encoder", "toy"),
    ("pretrain", "--run", "OUT", "--batch-size", "2"),
]
BAD_SOURCES = {
    "missing": "missing: no such file or folder",
    "": "no such file or folder",
    "empty": "empty: holds no pictures",
    "text.txt": "text.txt: wanted a folder, .csv, .parquet, .zip or .tar",
    "pictures/a/0.png": "0.png: wanted a folder, .csv, .parquet, .zip or .tar",
    "nonsense.csv": r"nonsense\.csv: not a CSV file",
    "columns.csv": r"columns\.csv: columns are \['file;class'\]",
    "times.csv": r"times\.csv, line 2: .*yesterday",
    "broken.zip": r"broken\.zip: not a readable archive",
    "unreadable": "can be read",
}


@pytest.mark.parametrize("door", SOURCE_DOORS, ids=name_of)
@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_source_that_cannot_be_used(refused, world, tmp_path, door, source):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in door]
    assert re.search(BAD_SOURCES[source], refused(*words, "--images", source))
    if door[0] != "gallery":  # an empty gallery is a gallery
        assert tree(tmp_path) == []


NO_LABELS = [("evaluate",), ("evaluate", "--protocol", "linear"), ("fit-head", "--out", "OUT")]


@pytest.mark.parametrize("door", NO_LABELS, ids=" ".join)
def test_one_picture_without_a_label_teaches_nothing(refused, tmp_path, door):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in door]
    got = refused(*words, "--encoder", "toy", "--images", "one")
    assert "label" in got or "class" in got
    assert tree(tmp_path) == []


def test_one_picture_is_not_enough_to_pretrain(refused, tmp_path):
    assert "pictures" in refused("pretrain", "--images", "one", "--run", tmp_path / "run")


def test_one_picture_is_enough_to_embed_and_to_search(simclr, world, tmp_path):
    assert simclr("embed", "--encoder", "toy", "--images", "one", "--out", tmp_path / "o.parquet")[0] == 0
    assert simclr("gallery", "add", tmp_path / "g", "--images", "one", "--encoder", "toy")[0] == 0
    code, out, _ = simclr("search", "--gallery", tmp_path / "g", "--image", "one/only.png")
    assert (code, len(out.splitlines())) == (0, 1)
