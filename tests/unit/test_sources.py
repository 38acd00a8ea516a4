"""Every kind of source: what is found in it, under which roles, in which order; and what is refused."""

import csv
import os
import re
import shutil
import struct
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve import sources
from serve.contract import Preprocess
from serve.errors import SourceError
from serve.preprocess import load_image
from serve.samples import Sample
from serve.sources import describe_traits, open_source, read_batches, read_bytes
from tests.drawn_sources import fill, picture, refusal

FRAME = Preprocess(height_px=8, width_px=6, resize="stretch", crop=1.0, resample="bicubic", jpeg="full")


PNG = picture()


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(root))
    return path


def tarred(root, path, prefix=""):
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.add(file, prefix + str(file.relative_to(root)), recursive=False)
    return path


def facts(source, base):
    """What a source holds, with names relative to `base`."""
    images = open_source(source)
    return {
        role: [
            (sample.source.removeprefix(str(base)).lstrip("!/"), sample.label, sample.identity, sample.camera, sample.time)
            for sample in getattr(images, role)
        ]
        for role in ("train", "test", "query", "gallery")
    }


def labels(source, role="train"):
    return [(Path(sample.source).name, sample.label) for sample in getattr(open_source(source), role)]


def test_a_flat_folder_has_no_labels(tmp_path):
    fill(tmp_path, "b.png", "a.jpg", "c.JPEG", "d.webp")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert labels(tmp_path) == [("a.jpg", None), ("b.png", None), ("c.JPEG", None), ("d.webp", None)]
    sample = open_source(tmp_path).train[0]
    assert (sample.source, sample.group, sample.time) == (str(tmp_path / "a.jpg"), None, None)


def test_class_folders_are_labels(tmp_path):
    fill(tmp_path, "dog/2.png", "cat/1.png", "cat/deep/3.png", "loose.png")
    assert labels(tmp_path) == [("1.png", "cat"), ("3.png", "cat"), ("2.png", "dog"), ("loose.png", None)]
    assert open_source(tmp_path).train[0].group == "cat"


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_a_train_test_split(tmp_path, test_folder):
    fill(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{test_folder}/cat/3.png", "stray.png")
    assert labels(tmp_path) == [("stray.png", None), ("1.png", "cat"), ("2.png", "dog")]
    assert labels(tmp_path, "test") == [("3.png", "cat")]
    assert [Path(sample.source).name for sample in open_source(tmp_path).everything] == ["stray.png", "1.png", "2.png", "3.png"]


def test_a_folder_called_train_alone_is_no_split(tmp_path):
    fill(tmp_path, "train/cat/1.png", "train/dog/2.png")
    assert labels(tmp_path) == [("1.png", "cat"), ("2.png", "dog")]
    assert labels(tmp_path, "test") == []


def test_a_split_without_classes(tmp_path):
    fill(tmp_path, "train/1.png", "test/2.png")
    assert labels(tmp_path) == [("1.png", None)]
    assert labels(tmp_path, "test") == [("2.png", None)]


MARKET = (
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0007_c3s3_077419_03.jpg",
    "bounding_box_test/-1_c1s1_000401_03.jpg",
    "bounding_box_test/0000_c1s1_000151_01.jpg",
    "bounding_box_test/0001_c2s1_000976_01.jpg",
    "query/0001_c1s1_001051_00.jpg",
    "gt_bbox/0001_c1s1_001051_00.jpg",
    "readme.png",
)
MARKET_FACTS = {
    "train": [(MARKET[0], None, "0002", "1", 451.0), (MARKET[1], None, "0007", "3", 77419.0)],
    "test": [],
    "query": [(MARKET[5], None, "0001", "1", 1051.0)],
    "gallery": [
        (MARKET[2], None, "-1", "1", 401.0),
        (MARKET[3], None, "0000", "1", 151.0),
        (MARKET[4], None, "0001", "2", 976.0),
    ],
}


def test_a_market_1501_root(tmp_path):
    fill(tmp_path, *MARKET, "bounding_box_test/Thumbs.png", "query/notes_c1.png")
    assert facts(tmp_path, tmp_path) == MARKET_FACTS
    assert open_source(tmp_path).train[0].group == "0002"


def test_names_without_sequence_and_frame_as_in_dukemtmc(tmp_path):
    fill(tmp_path, "bounding_box_test/0005_c2_f0046985.jpg", "query/0005_c10_f1.jpg", "bounding_box_train/0001_c1.png")
    images = open_source(tmp_path)
    assert [(s.identity, s.camera, s.time) for s in images.everything] == [
        ("0001", "1", None),
        ("0005", "10", None),
        ("0005", "2", None),
    ]


def test_a_flat_folder_of_market_names(tmp_path):
    fill(tmp_path, "0002_c1s1_000451_03.jpg", "-1_c06s2_000007_00.jpg")
    assert facts(tmp_path, tmp_path)["train"] == [
        ("-1_c06s2_000007_00.jpg", None, "-1", "6", 7.0),
        ("0002_c1s1_000451_03.jpg", None, "0002", "1", 451.0),
    ]


def test_one_other_name_makes_a_flat_folder_ordinary(tmp_path):
    fill(tmp_path, "0002_c1s1_000451_03.jpg", "holiday.jpg")
    assert {sample.identity for sample in open_source(tmp_path).train} == {None}


@pytest.mark.parametrize("root", ["12_c3", "0002_c1s1_000451_03.jpg", "train"])
def test_names_are_matched_on_the_file_never_on_the_folders(tmp_path, root):
    market = fill(tmp_path / "a" / root, *MARKET)
    plain = fill(tmp_path / "b" / root, "cat/1.png", "dog/2.png")
    for opened in (market, market.parent, zipped(market.parent, tmp_path / "a.zip")):
        assert [sample[1:] for part in facts(opened, "").values() for sample in part] == [
            sample[1:] for part in MARKET_FACTS.values() for sample in part
        ]
    for opened in (plain, plain.parent, zipped(plain.parent, tmp_path / "b.zip")):
        assert labels(opened) == [("1.png", "cat"), ("2.png", "dog")]
        assert {sample.identity for sample in open_source(opened).train} == {None}


LAYOUTS = {
    "flat": ("b.png", "a.jpg"),
    "classes": ("dog/2.png", "cat/1.png", "cat/deep/3.png"),
    "split": ("train/dog/2.png", "train/cat/1.png", "test/cat/3.png"),
    "market": MARKET,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapped", ["", "all of it", "two/folders"])
def test_folder_zip_and_tar_give_the_same(tmp_path, layout, wrapped):
    folder = tmp_path / "folder"
    base = fill(folder / wrapped, *LAYOUTS[layout])
    (folder / "__MACOSX" / "cat").mkdir(parents=True)
    (folder / "__MACOSX" / "cat" / "._1.png").write_bytes(b"resource fork")
    wanted = facts(folder, base)
    assert sum(map(len, wanted.values())) > 1
    inner = f"!/{wrapped}" if wrapped else ""
    zipped(folder, tmp_path / "a.zip")
    tarred(folder, tmp_path / "a.tar")
    tarred(folder, tmp_path / "dotted.tar", prefix="./")  # as `tar -C folder .` names them
    shutil.copy(tmp_path / "a.zip", tmp_path / "UPPER.ZIP")
    for archive in (tmp_path / name for name in ("a.zip", "a.tar", "dotted.tar", "UPPER.ZIP")):
        assert facts(archive, f"{archive}{inner}") == wanted
        assert facts(f"{archive}!/{wrapped}", f"{archive}{inner}") == wanted
        for there, here in zip(open_source(archive).everything, open_source(folder).everything, strict=True):
            assert read_bytes(there.source) == read_bytes(here.source) == Path(here.source).read_bytes()


def test_a_folder_inside_an_archive(tmp_path):
    folder = fill(tmp_path / "folder", "cats/tabby/1.png", "cats/black/2.png", "dogs/3.png", "cats2/4.png")
    for archive in (zipped(folder, tmp_path / "a.zip"), tarred(folder, tmp_path / "a.tar")):
        assert labels(f"{archive}!/cats") == labels(f"{archive}!/cats/") == [("2.png", "black"), ("1.png", "tabby")]
        assert open_source(f"{archive}!/cats").train[0].source == f"{archive}!/cats/black/2.png"
        assert "holds no pictures" in refusal(f"{archive}!/horses")


def test_an_exclamation_mark_in_a_folders_name(tmp_path):
    fill(tmp_path / "wow!", "ha!/1.png")
    (sample,) = open_source(tmp_path / "wow!/ha!").train
    assert read_bytes(sample.source) == picture(0)
    archive = zipped(tmp_path / "wow!", tmp_path / "wow!" / "a.zip")
    (sample,) = open_source(archive).train
    assert sample.source == f"{archive}!/ha!/1.png"
    assert read_bytes(sample.source) == picture(0)


def test_hidden_and_system_files_are_ignored(tmp_path):
    fill(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "__MACOSX/c.png", "cat/.thumb/d.png", "._a.png")
    assert labels(tmp_path) == [("a.png", None)]


def test_a_hidden_root_is_still_a_root(tmp_path):
    assert labels(fill(tmp_path / ".data", "a.png")) == [("a.png", None)]


def test_the_order_is_sorted_and_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    names = [f"{folder}/{i}.png" for folder in ("b", "a", "C") for i in (10, 9, 1)]
    fill(tmp_path, *names)
    wanted = [sample.source for sample in open_source(tmp_path).train]
    assert wanted == [str(tmp_path / name) for name in sorted(names)]
    scandir = os.scandir

    @contextmanager
    def backwards(path):
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", backwards)
    assert [sample.source for sample in open_source(tmp_path).train] == wanted


def test_sources_are_absolute_because_galleries_outlive_the_working_folder(tmp_path, monkeypatch):
    fill(tmp_path / "pictures", "a.png")
    zipped(tmp_path / "pictures", tmp_path / "a.zip")
    (tmp_path / "list.csv").write_text("path\npictures/a.png\n")
    monkeypatch.chdir(tmp_path)
    for name, wanted in (("pictures", "pictures/a.png"), ("a.zip", "a.zip!/a.png"), ("list.csv", "pictures/a.png")):
        (sample,) = open_source(name).train
        assert sample.source == str(tmp_path / wanted)


def table(path, *rows, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_csv_names_everything(tmp_path):
    fill(tmp_path, "b.png", "sub/a.png")
    path = table(
        tmp_path / "list.csv",
        ("label", "path", "camera", "identity", "time"),
        ("cat", "b.png", "2", "007", "12.5"),
        ("", str(tmp_path / "sub/a.png"), "", "", ""),
        ("a, b", "sub/a.png", "", "x", "-3"),
    )
    assert open_source(path).train == (
        Sample(str(tmp_path / "b.png"), "cat", "007", "2", 12.5),
        Sample(str(tmp_path / "sub/a.png")),
        Sample(str(tmp_path / "sub/a.png"), "a, b", "x", None, -3.0),
    )
    assert read_bytes(open_source(path).train[0].source) == picture(0)


def test_a_csv_may_name_members_of_an_archive(tmp_path):
    zipped(fill(tmp_path / "folder", "cat/a.png"), tmp_path / "a.zip")
    path = table(tmp_path / "list.csv", ("path",), ("a.zip!/cat/a.png",))
    assert read_bytes(open_source(path).train[0].source) == picture(0)


def test_a_csv_from_excel_starts_with_a_byte_order_mark(tmp_path):
    path = table(tmp_path / "list.CSV", ("path", "label"), ("é.png", "café"), encoding="utf-8-sig")
    assert open_source(path).train == (Sample(str(tmp_path / "é.png"), "café"),)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1700000000", 1700000000),
        ("1e3", 1000),
        ("2024-03-01T12:30:00", datetime(2024, 3, 1, 12, 30, tzinfo=UTC).timestamp()),
        ("2024-03-01 12:30:00.25", datetime(2024, 3, 1, 12, 30, tzinfo=UTC).timestamp() + 0.25),
        ("2024-03-01T12:30:00Z", datetime(2024, 3, 1, 12, 30, tzinfo=UTC).timestamp()),
        ("2024-03-01T12:30:00+02:00", datetime(2024, 3, 1, 10, 30, tzinfo=UTC).timestamp()),
        ("2024-03-01", datetime(2024, 3, 1, tzinfo=UTC).timestamp()),
    ],
)
def test_times_are_seconds_and_utc_where_no_zone_is_named(tmp_path, text, wanted, monkeypatch):
    path = table(tmp_path / "list.csv", ("path", "time"), ("a.png", text))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert open_source(path).train[0].time == wanted
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"columns are \[\], wanted path"),
        (b"file,label\na.png,cat\n", r"columns are \['file', 'label'\], wanted path and any of"),
        (b"path,colour\na.png,red\n", r"columns are \['colour', 'path'\]"),
        (b"path;label\na.png;cat\n", r"columns are \['path;label'\]"),
        (b"path,label\n,cat\n", "line 2: .*'label': 'cat'"),
        (b"path,label\na.png,cat\nb.png,dog,9\n", "line 3"),
        (b"path,time\na.png,yesterday\n", "line 2.*yesterday"),
        (b"path,time\na.png,nan\n", "line 2.*time is 'nan'"),
        (b"path,time\na.png,inf\n", "line 2.*time is 'inf'"),
        (b"path,label\na.png,caf\xe9\n", "not a CSV file in UTF-8"),
        (b"\xff\xfep\0a\0t\0h\0\n\0", "not a CSV file in UTF-8"),
        (b"path,label\na.png," + b"x" * 200_000 + b"\n", "not a CSV file in UTF-8"),
        (b"path,label\n", "holds no pictures"),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path, content, complaint):
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert re.search(complaint, message)


def test_what_is_missing_empty_or_something_else_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no pictures here")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("nor here")
    assert "no such file or folder" in refusal(tmp_path / "missing")
    assert "no such file or folder" in refusal("")
    assert "no such file or folder" in refusal(tmp_path / "missing.zip!/inner")
    assert "holds no pictures" in refusal(tmp_path / "empty")
    assert "holds no pictures" in refusal(tmp_path / "texts")
    assert "wanted a folder, .csv, .parquet, .zip or .tar" in refusal(tmp_path / "notes.txt")
    assert "wanted a folder, .csv, .parquet, .zip or .tar" in refusal(fill(tmp_path, "one.png") / "one.png")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_is_refused(tmp_path, mode):
    fill(tmp_path / "folder", "a.png")
    for name in (f"a.tar.{mode}", "a.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as archive:
            archive.add(tmp_path / "folder", "folder")
    assert "pack or unpack it" in refusal(tmp_path / f"a.tar.{mode}")
    assert "compressed .tar files must be unpacked" in refusal(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 200])
def test_a_broken_archive_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "not a readable archive" in refusal(tmp_path / name)


def complaint_of_reading(source):
    with pytest.raises(SourceError) as caught:
        read_bytes(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(source)
    return str(caught.value)


def test_what_has_gone_since_it_was_listed(tmp_path):
    folder = fill(tmp_path / "folder", "a.png")
    archives = [zipped(folder, tmp_path / "a.zip"), tarred(folder, tmp_path / "a.tar")]
    sources = [open_source(place).train[0].source for place in (folder, *archives)]
    for archive in archives:
        assert "no such member" in complaint_of_reading(f"{archive}!/b.png")
    (folder / "a.png").unlink()
    for archive in archives:
        archive.unlink()
    for source in sources:
        assert "No such file or directory" in complaint_of_reading(source)
    assert "embedded null byte" in complaint_of_reading("a\0.png")


def test_an_archive_that_was_replaced_is_read_anew(tmp_path):
    for seed in (1, 2):
        (tmp_path / "a.png").write_bytes(picture(seed, size=(9, 7 * seed)))
        for name in ("a.zip", "a.tar"):
            if name == "a.zip":
                with zipfile.ZipFile(tmp_path / name, "w") as archive:
                    archive.write(tmp_path / "a.png", "a.png")
            else:
                with tarfile.open(tmp_path / name, "w") as archive:
                    archive.add(tmp_path / "a.png", "a.png")
            os.utime(tmp_path / name, (seed, seed))
            assert read_bytes(f"{tmp_path}/{name}!/a.png") == picture(seed, size=(9, 7 * seed))


def damaged_zip(path, change):
    """A zip of one deflated member, with its headers changed in both places where they stand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", PNG)
    data = bytearray(path.read_bytes())
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    change(data, local, central)
    path.write_bytes(data)
    return f"{path}!/a.png"


def encrypt(data, local, central):
    data[local + 6] |= 1
    data[central + 8] |= 1


def unknown_method(data, local, central):
    for place in (local + 8, central + 10):
        struct.pack_into("<H", data, place, 99)


def scramble(data, local, central):
    data[local + 35 : central] = bytes(255 for _ in data[local + 35 : central])


@pytest.mark.parametrize(
    ("change", "reason"), [(encrypt, "encrypted"), (unknown_method, "compression method"), (scramble, "decompress")]
)
def test_a_zip_member_that_cannot_be_unpacked_is_one_unreadable_picture(tmp_path, change, reason):
    source = damaged_zip(tmp_path / "a.zip", change)
    assert reason in complaint_of_reading(source)
    ((good, _, (bad,)),) = read_batches([Sample(source)], FRAME)
    assert good == []
    assert (bad.source, reason in bad.reason) == (source, True)


def test_batches_keep_the_order_and_name_what_they_leave_out(tmp_path):
    sizes = [(1, 1), (30, 20), (7, 90), (200, 100)]
    kinds = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM"}
    for i in range(28):
        suffix = list(kinds)[i % len(kinds)]
        (tmp_path / f"{i:02}.{suffix}").write_bytes(picture(i, sizes[i % 4], kinds[suffix]))
    (tmp_path / "05b.png").write_text("no picture")
    (tmp_path / "11b.jpg").write_bytes(b"")
    (tmp_path / "17b.jpg").write_bytes(picture(0, (90, 90), "JPEG")[:2000])
    samples = [*open_source(tmp_path).train, Sample(str(tmp_path / "gone.png"))]
    batches = list(read_batches(samples, FRAME, batch_size=10))
    assert [len(good) + len(bad) for good, _, bad in batches] == [10, 10, 10, 2]
    kept = [sample for good, _, _ in batches for sample in good]
    assert kept == [sample for sample in samples if Path(sample.source).stem.isdecimal()]
    for good, pixels, _ in batches:
        assert pixels.shape == (len(good), 8, 6, 3)
        assert pixels.dtype == np.uint8
        for sample, image in zip(good, pixels, strict=True):
            np.testing.assert_array_equal(image, load_image(sample.source, FRAME))
    left_out = [bad for _, _, bads in batches for bad in bads]
    assert [Path(bad.source).name for bad in left_out] == ["05b.png", "11b.jpg", "17b.jpg", "gone.png"]
    for bad, reason in zip(left_out, ("known format", "empty file", "truncated", "No such file"), strict=True):
        assert bad.reason.startswith(f"{bad.source}: ")
        assert bad.reason.count(bad.source) == 1
        assert reason in bad.reason


def test_a_batch_of_unreadable_pictures_has_no_rows(tmp_path):
    ((good, pixels, bad),) = read_batches([Sample(str(tmp_path / "gone.png"))], FRAME)
    assert (good, pixels.shape, pixels.dtype, len(bad)) == ([], (0, 8, 6, 3), np.uint8, 1)
    assert list(read_batches([], FRAME)) == []


def test_batches_count_what_is_unusual(tmp_path):
    for i in range(25):
        kind = "RGB" if i % 5 else "L"
        Image.new(kind, (9, 7)).save(tmp_path / f"{i}.jpg")
    Image.new("CMYK", (9, 7)).save(tmp_path / "ink.jpg")
    Image.new("RGB", (9, 7)).save(tmp_path / "move.gif", save_all=True, append_images=[Image.new("RGB", (9, 7), (255, 0, 0))])
    (tmp_path / "broken.png").write_bytes(PNG[:60])
    traits = Counter()
    assert sum(len(good) for good, _, _ in read_batches(open_source(tmp_path).train, FRAME, 10, traits)) == 27
    assert traits == {"grey": 5, "CMYK": 1, "animated": 1}
    assert describe_traits(traits) == "5 grey, 1 CMYK, 1 animated (first frame used)"
    assert describe_traits(Counter()) == ""


@pytest.mark.parametrize("damage", ["header", "tail"])
def test_a_tar_damaged_in_the_middle_is_not_taken_for_a_short_one(tmp_path, damage):
    """Python's tarfile stops at a damaged header without a word."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for file in sorted(fill(tmp_path / "folder", *(f"{i}.png" for i in range(5))).iterdir()):
            archive.add(file, file.name)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    if damage == "header":
        data[data.index(b"3.png")] ^= 1
    else:
        del data[data.index(b"4.png") + 700 :]
    (tmp_path / "a.tar").write_bytes(data)
    message = refusal(tmp_path / "a.tar")
    assert "a.tar: not a readable archive" in message
    assert re.search("damaged at byte 3,072|unexpected end of data", message), message


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    assert refusal(tmp_path) == f"{tmp_path}: cannot be listed (Permission denied)"


def test_linked_folders_are_followed(tmp_path):
    fill(tmp_path / "elsewhere", "1.png")
    fill(tmp_path / "root", "dog/2.png")
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere")
    assert labels(tmp_path / "root") == [("1.png", "cat"), ("2.png", "dog")]


def test_many_threads_read_one_archive(tmp_path):
    folder = fill(tmp_path / "folder", *(f"{i:03}.png" for i in range(60)))
    for archive in (zipped(folder, tmp_path / "a.zip"), tarred(folder, tmp_path / "a.tar")):
        ((good, pixels, bad),) = read_batches(open_source(archive).train, FRAME)
        assert bad == []
        for i, sample in enumerate(good):
            assert sample.source.endswith(f"{i:03}.png")
            np.testing.assert_array_equal(pixels[i], load_image(picture(i), FRAME))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_workers_do_not_share_an_archives_handle(tmp_path):
    """A handle opened before the fork has one place in the file for all: each worker would move the others' reads."""
    archive = zipped(fill(tmp_path / "folder", *(f"{i:03}.png" for i in range(40))), tmp_path / "a.zip")
    sources = [sample.source for sample in open_source(archive).train]
    wanted = [read_bytes(source) for source in sources]
    workers = []
    for worker in range(3):
        if (child := os.fork()) == 0:
            try:
                order = np.random.default_rng(worker).integers(0, 40, 1500)
                os._exit(0 if all(read_bytes(sources[i]) == wanted[i] for i in order) else 1)
            except BaseException:
                os._exit(2)
        workers.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in workers] == [0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_a_name_that_is_not_utf8_is_listed_and_read(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(PNG)
    (sample,) = open_source(tmp_path).train
    assert os.fsencode(sample.source) == name
    assert read_bytes(sample.source) == PNG
    ((good, _, bad),) = read_batches([sample], FRAME)
    assert (good, bad) == ([sample], [])
    archive = tarred(tmp_path, tmp_path.with_suffix(".tar"))
    (sample,) = open_source(archive).train
    assert read_bytes(sample.source) == PNG


def test_the_next_batch_is_decoded_while_one_is_used(tmp_path, monkeypatch):
    """The encoder and the decoders are busy at the same time, with at most two batches in memory."""
    begun = []
    read = sources._read_one
    monkeypatch.setattr(sources, "_read_one", lambda sample, *a, **k: (begun.append(sample.source), read(sample, *a, **k))[1])
    samples = []
    for number in range(9):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
        samples.append(Sample(str(tmp_path / f"{number}.png")))
    batches = read_batches(samples, FRAME, batch_size=3)
    first = next(batches)
    deadline = time.monotonic() + 5
    while len(begun) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert begun[:6] == [sample.source for sample in samples[:6]]
    assert len(begun) == 6
    assert [first[1][0, 0, 0, 0], *(batch[1][0, 0, 0, 0] for batch in batches)] == [0, 3, 6]


def test_who_stops_in_the_middle_leaves_no_thread_behind(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    before = threading.active_count()
    batches = read_batches([Sample(str(tmp_path / "a.png"))] * 2000, FRAME, batch_size=500)
    next(batches)
    batches.close()
    assert threading.active_count() == before
