"""Every data set by its layout, as a folder and as a zip; and what is wrong with lists and names."""

import logging
import struct
from pathlib import Path

import numpy as np
import pytest

from serve.datasets.published import PUBLISHED, difference
from serve.errors import SourceError
from serve.samples import ImageSet, Sample
from serve.sources import open_source
from tests import reid_sets
from tests.drawn_sources import fill, refusal
from tests.reid_sets import mat, text, zipped


def told(images):
    """Role -> (file, identity, camera, time, track) of its pictures."""
    return {
        role: [(Path(s.source).name, s.identity, s.camera, s.time, s.track) for s in getattr(images, role)]
        for role in ("train", "test", "query", "gallery")
        if getattr(images, role)
    }


def facts(images):
    return {role: [row[1:] for row in rows] for role, rows in told(images).items()}


WANTED = {
    "market": {
        "train": [("0002", "1", 451.0, None)],
        "query": [("0001", "1", 1051.0, None)],
        "gallery": [("-1", "1", 401.0, None), ("0000", "1", 151.0, None), ("0001", "2", 976.0, None)],
    },
    "duke": {
        "train": [("0001", "2", None, None)],
        "query": [("0005", "2", None, None)],
        "gallery": [("0005", "6", None, None)],
    },
    "msmt17": {
        "train": [("train-0", "1", None, None)],
        "test": [("train-0", "14", None, None)],
        "query": [("0", "2", None, None)],
        "gallery": [("0", "11", None, None), ("1", "2", None, None)],
    },
    "cuhk03": {
        "train": [(person, view, None, None) for person in ("1_001", "1_002") for view in "12"],
        "query": [("2_001", "1", None, None), ("2_002", "1", None, None)],
        "gallery": [("2_001", "2", None, None), ("2_002", "2", None, None)],
    },
    "veri": {
        "train": [("0001", "1", 16450.0, None)],
        "query": [("0002", "2", 30600.0, None)],
        "gallery": [("0002", "20", 30605.0, None), ("0003", "2", 30605.0, None)],
    },
    "vehicleid": {
        "train": [("99", None, None, None)],
        "test": [(identity, None, None, None) for identity in "10101"],
    },
    "mars": {
        "train": [("0001", "1", 1.0, "train 1")],
        "query": [("0002", "1", 1.0, "test 1"), ("0002", "1", 2.0, "test 1")],
        "gallery": [
            ("0002", "2", 1.0, "test 2"),
            ("0002", "2", 2.0, "test 2"),
            ("0000", "1", 1.0, "test 3"),
            ("-1", "3", 1.0, "test 4"),
        ],
    },
    "sysu30k": {
        "train": [(None, None, None, None)] * 3,
        "query": [("000028311", "1", None, None)],
        "gallery": [("000028311", "2", None, None), ("0000others", "1", None, None), ("0000others", "1", None, None)],
    },
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("root", ["set", "12_c3", "0002_c1s1_000451_03.jpg", "query"])
def test_a_set_is_recognised_whatever_its_folder_is_called(tmp_path, name, root):
    made = getattr(reid_sets, name)(tmp_path / "outer" / root)
    images = open_source(made)
    assert (images.layout, facts(images)) == (name, WANTED[name])
    assert facts(open_source(made.parent)) == WANTED[name]


@pytest.mark.parametrize("name", WANTED)
def test_a_zip_gives_the_same_without_unpacking(tmp_path, name):
    made = getattr(reid_sets, name)(tmp_path / "set")
    archive = zipped(made, tmp_path / "set.zip")
    for source in (archive, f"{archive}!/set"):
        images = open_source(source)
        assert (images.layout, told(images)) == (name, told(open_source(made)))
    assert all(sample.source.startswith(f"{archive}!/set/") for sample in images.everything)


def test_msmt17s_second_version_has_other_folders(tmp_path):
    images = open_source(reid_sets.msmt17(tmp_path, version=2))
    assert facts(images) == WANTED["msmt17"]
    assert all("mask_" in sample.source for sample in images.everything)


def test_people_of_training_and_test_are_never_taken_for_each_other(tmp_path):
    """MSMT17 numbers both from 0; a gallery of everything would merge them."""
    images = open_source(reid_sets.msmt17(tmp_path))
    assert not {s.identity for s in images.train + images.test} & {s.identity for s in images.query + images.gallery}


def test_the_later_distractors_of_market_1501_join_the_gallery(tmp_path):
    images = open_source(fill(reid_sets.market(tmp_path), "images/0000_c3s1_000007_00.jpg"))
    assert facts(images)["gallery"] == [*WANTED["market"]["gallery"], ("0000", "3", 7.0, None)]


def test_cuhk03_detected_unless_the_other_list_is_named(tmp_path):
    reid_sets.cuhk03(tmp_path / "set")
    archive = zipped(tmp_path / "set", tmp_path / "set.zip")
    for root in (tmp_path / "set", f"{archive}!/set"):
        for kind, size in (("detected", 2), ("labeled", 1)):
            images = open_source(f"{root}/cuhk03_new_protocol_config_{kind}.mat")
            assert len(images.gallery) == size
            assert all(f"/images_{kind}/" in sample.source for sample in images.everything)
    assert len(open_source(tmp_path / "set").gallery) == 2


def test_cuhk03_without_lists_is_the_classic_set_and_shows_nobody_twice(tmp_path):
    for kind in ("detected", "labeled"):
        fill(tmp_path / f"images_{kind}", *reid_sets.CUHK03)
    for root in (tmp_path, tmp_path / "images_labeled"):
        images = open_source(root)
        assert (images.layout, len(images.train)) == ("cuhk03-classic", len(reid_sets.CUHK03))
    assert images.train[1].identity == "1_001"
    assert images.train[1].camera == "2"


def test_cuhk03s_release_is_refused_in_one_line(tmp_path):
    (tmp_path / "cuhk03_release").mkdir()
    (tmp_path / "cuhk03_release/cuhk-03.mat").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(SourceError, match=r"cuhk-03.mat: HDF5 is not read here; unpack .*images_detected/1_001_1_01.png"):
        open_source(tmp_path)


def test_vehicleid_takes_the_test_list_that_is_named(tmp_path):
    root = reid_sets.vehicleid(tmp_path / "set")
    assert len(open_source(root / "train_test_split/test_list_1600.txt").test) == 8
    archive = zipped(root, tmp_path / "set.zip")
    assert len(open_source(f"{archive}!/set/train_test_split/test_list_1600.txt").test) == 8


def test_sysu30ks_bags_are_labels_and_others_are_nobody(tmp_path):
    root = reid_sets.sysu30k(tmp_path / "set")
    assert [sample.label for sample in open_source(root).train] == ["2 3", "2 3", "9"]
    test_alone = open_source(root / "sysu_test_set_all")
    assert (test_alone.layout, len(test_alone.query), len(test_alone.gallery)) == ("sysu30k", 1, 3)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            ("query/7/a.png", "gallery/7/b.png", "gallery/-1/c.png"),
            {"query": [("7", None, None, None)], "gallery": [("-1", None, None, None), ("7", None, None, None)]},
        ),
        (
            ("query/7/left/a.png", "gallery/7/right/b.png", "gallery/stray.png"),
            {"query": [("7", "left", None, None)], "gallery": [("7", "right", None, None)]},
        ),
        (
            ("query/0007/0007_c1s1_000001_00.jpg", "gallery/0007/0007_c12s1_000001_00.jpg"),
            {"query": [("0007", "1", None, None)], "gallery": [("0007", "12", None, None)]},
        ),
        (
            ("ann/cam1/x.png", "ann/cam2/x.png", "bob/Camera-1/x.png"),
            {"train": [("ann", "cam1", None, None), ("ann", "cam2", None, None), ("bob", "Camera-1", None, None)]},
        ),
    ],
)
def test_plain_folders_of_identity_and_camera(tmp_path, names, wanted):
    images = open_source(fill(tmp_path, *names))
    assert (images.layout, facts(images)) == (None, wanted)


def test_folders_below_a_class_are_no_cameras(tmp_path):
    images = open_source(fill(tmp_path, "cat/big/1.png", "dog/small/2.png"))
    assert [(sample.label, sample.identity) for sample in images.train] == [("cat", None), ("dog", None)]


def test_a_csv_names_tracks(tmp_path):
    text(tmp_path / "list.csv", "path,identity,camera,time,track", "a.png,7,2,1.5,t1", "b.png,7,2,,")
    assert open_source(tmp_path / "list.csv").train == (
        Sample(str(tmp_path / "a.png"), identity="7", camera="2", time=1.5, track="t1"),
        Sample(str(tmp_path / "b.png"), identity="7", camera="2"),
    )


def test_two_and_three_digit_cameras_are_read_whole(tmp_path):
    """A camera of which only the first digit is read breaks the same-camera rule of VeRi-776 and MSMT17."""
    cameras = {s.camera for s in open_source(reid_sets.veri(tmp_path / "a")).everything}
    assert cameras == {"1", "2", "20"}
    assert {s.camera for s in open_source(reid_sets.msmt17(tmp_path / "b")).everything} == {"1", "2", "11", "14"}


def test_the_order_is_that_of_the_names(tmp_path):
    """Neither the disk's nor the list's, which differ from machine to machine."""
    for name in WANTED:
        for samples in vars(open_source(getattr(reid_sets, name)(tmp_path / name))).values():
            if isinstance(samples, tuple) and name != "mars":  # MARS: by tracklet
                assert [s.source for s in samples] == sorted(s.source for s in samples)


def test_strange_names_are_counted_and_named(tmp_path, caplog):
    root = fill(reid_sets.market(tmp_path), "query/Thumbs.png", "query/x0001_c1s1_000001_00.jpg")
    with caplog.at_level(logging.WARNING):
        assert len(open_source(root).query) == 1
    assert "query: left out 2 of other names, such as query/Thumbs.png" in caplog.text


def test_listed_pictures_that_are_missing_are_counted(tmp_path, caplog):
    root = reid_sets.msmt17(tmp_path)
    (root / "test/0001/0001_002_02_0303morning_0003_0.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(open_source(root).gallery) == 1
    assert "list_gallery.txt: 1 of its 2 pictures are not there" in caplog.text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0000/0000_000_02_0303morning_0001_0.jpg", "line 1: .* has 1 columns, wanted 2"),
        ("0000/0000_000_02_0303morning_0001_0.jpg 0 0", "has 3 columns, wanted 2"),
        ("0000/a.jpg 0", "a.jpg names no camera"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path, line, complaint):
    text(reid_sets.msmt17(tmp_path) / "list_query.txt", line)
    with pytest.raises(SourceError, match=complaint):
        open_source(tmp_path)


def test_a_list_that_is_no_text(tmp_path):
    (reid_sets.msmt17(tmp_path) / "list_query.txt").write_bytes(b"\xff\xfe\x00")
    assert "list_query.txt: not text in UTF-8" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not a readable .mat file"),
        (b"nonsense" * 100, "not a readable .mat file"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + struct.pack("<H", 0x0200) + b"IM" + bytes(400), r"version 7.3 \(HDF5\)"),
    ],
)
def test_a_mat_file_that_cannot_be_read(tmp_path, content, complaint):
    (reid_sets.mars(tmp_path) / "info/query_IDX.mat").write_bytes(content)
    with pytest.raises(SourceError, match=complaint):
        open_source(tmp_path)


def test_mat_files_that_say_something_else(tmp_path):
    root = reid_sets.mars(tmp_path / "mars")
    mat(root / "info/query_IDX.mat", query_IDX=np.array([9]))
    assert "query_IDX.mat: points beyond the 4 tracklets" in refusal(root)
    mat(root / "info/query_IDX.mat", other=np.array([1]))
    assert "holds no query_IDX" in refusal(root)
    mat(root / "info/query_IDX.mat", query_IDX=np.array([1.5]))
    assert "holds float64 values, wanted whole numbers" in refusal(root)
    root = reid_sets.cuhk03(tmp_path / "cuhk03")
    config = root / "cuhk03_new_protocol_config_detected.mat"
    names = np.array([["1_001_1_01.png"]], object)
    for index in (0, 2):
        mat(config, filelist=names, train_idx=np.array([1]), query_idx=np.array([index]), gallery_idx=np.array([1]))
        assert f"points at picture {index} of 1" in refusal(root)
    mat(config, filelist=np.array([["me.png"]], object), train_idx=[1], query_idx=[1], gallery_idx=[1])
    assert "lists images_detected/me.png, wanted names like 1_001_1_01.png" in refusal(root)


def test_a_tracklet_of_two_people_is_refused(tmp_path):
    root = reid_sets.mars(tmp_path)
    names = (root / "info/test_name.txt").read_text().replace("0002C1T0001F002", "0003C1T0001F002")
    (root / "info/test_name.txt").write_text(names)
    assert "test_name.txt: tracklet 1 is of person 2, camera 1, but holds 0003C1T0001F002.jpg" in refusal(root)


@pytest.mark.parametrize("content", ["", "{}x", "[1]", '[{"BagLabel": ["x"], "BagImages": ["1/*"]}]', '[{"BagLabel": [1]}]'])
def test_bags_that_cannot_be_read(tmp_path, content):
    (reid_sets.sysu30k(tmp_path) / "meta/bag_level_label.json").write_text(content)
    assert "bag_level_label.json: wanted a list of" in refusal(tmp_path)


def sized(**roles):
    """A set of so many pictures of as many people."""
    return ImageSet(**{role: tuple(Sample(str(i), identity=str(i), camera="1") for i in range(n)) for role, n in roles.items()})


def test_counts_that_differ_are_told_in_one_line():
    assert difference("veri", sized(query=3, gallery=11_579)) == (
        "not the published VeRi-776: query 3 (published 1,678), test identities 3 (published 200), cameras 1 (published 20)"
    )
    assert difference("cross-camera", sized(query=3, gallery=4)) is None


def test_the_published_counts_pass_with_and_without_junk():
    query = tuple(Sample(str(i), identity=str(i % 750), camera=str(i % 6)) for i in range(3368))
    gallery = tuple(Sample(str(i), identity=str(i), camera="1") for i in range(15_913))
    junk = tuple(Sample(str(i), identity="-1", camera="1") for i in range(3819))
    assert difference("market", ImageSet(query=query, gallery=gallery)) is None
    assert difference("market", ImageSet(query=query, gallery=gallery + junk)) is None
    assert "gallery 15,912" in str(difference("market", ImageSet(query=query, gallery=gallery[1:] + junk)))


def test_mars_counts_tracklets(tmp_path):
    assert "query 1 (published 1,980), gallery 2 (published 9,330)" in str(
        difference("mars", open_source(reid_sets.mars(tmp_path)))
    )


def test_every_set_that_is_recognised_and_asked_by_its_own_counts_has_published_ones():
    assert set(WANTED) == set(PUBLISHED)
