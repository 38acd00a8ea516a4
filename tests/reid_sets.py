"""Miniatures of re-ID data sets: pictures of a few pixels under the names and lists of the real ones."""

import json
import zipfile

import numpy as np
from scipy.io import savemat

from tests.drawn_sources import fill


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def mat(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            if file.is_file():
                archive.write(file, file.relative_to(root.parent))
    return path


def market(root):
    return fill(
        root,
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c1s1_000151_01.jpg",
        "bounding_box_test/0001_c2s1_000976_01.jpg",
        "query/0001_c1s1_001051_00.jpg",
    )


def duke(root):
    return fill(
        root,
        "bounding_box_train/0001_c2_f0046182.jpg",
        "bounding_box_test/0005_c6_f0046985.jpg",
        "query/0005_c2_f0046985.jpg",
    )


def msmt17(root, version=1):
    train, test = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    fill(
        root,
        f"{train}/0000/0000_000_01_0303morning_0015_0.jpg",
        f"{train}/0000/0000_001_14_0303noon_0015_1.jpg",
        f"{test}/0000/0000_000_02_0303morning_0001_0.jpg",
        f"{test}/0000/0000_001_11_0303morning_0002_0.jpg",
        f"{test}/0001/0001_002_02_0303morning_0003_0.jpg",
    )
    text(root / "list_train.txt", "0000/0000_000_01_0303morning_0015_0.jpg 0")
    text(root / "list_val.txt", "0000/0000_001_14_0303noon_0015_1.jpg 0")
    text(root / "list_query.txt", "0000/0000_000_02_0303morning_0001_0.jpg 0")
    text(
        root / "list_gallery.txt", "0001/0001_002_02_0303morning_0003_0.jpg 1", "0000/0000_001_11_0303morning_0002_0.jpg 0", ""
    )
    return root


CUHK03 = [f"{pair}_{person:03}_{view}_{view:02}.png" for pair in (1, 2) for person in (1, 2) for view in (1, 2)]


def cuhk03(root):
    for kind in ("detected", "labeled"):
        fill(root / f"images_{kind}", *CUHK03)
        names = np.empty((len(CUHK03), 1), object)
        names[:, 0] = CUHK03
        gallery = [6, 8] if kind == "detected" else [6]
        mat(
            root / f"cuhk03_new_protocol_config_{kind}.mat",
            filelist=names,
            train_idx=np.array([[1], [2], [3], [4]], np.uint16),
            query_idx=np.array([[5], [7]], np.uint16),
            gallery_idx=np.array(gallery, np.uint16),
        )
    return root


def veri(root):
    return fill(
        root,
        "image_train/0001_c001_00016450_0.jpg",
        "image_query/0002_c002_00030600_0.jpg",
        "image_test/0002_c020_00030605_1.jpg",
        "image_test/0003_c002_00030605_1.jpg",
    )


def vehicleid(root):
    fill(root, *(f"image/{number:07}.jpg" for number in range(1, 10)))
    text(root / "train_test_split/train_list.txt", "0000009 99")
    text(root / "train_test_split/test_list_800.txt", *(f"{number:07} {number % 2}" for number in range(1, 6)))
    text(root / "train_test_split/test_list_1600.txt", *(f"{number:07} {number % 3}" for number in range(1, 9)))
    return root


def mars(root):
    """Test tracklets: person 2 by cameras 1 (query) and 2, a distractor, junk."""
    tracks = [("0002", 1, 2), ("0002", 2, 2), ("0000", 1, 1), ("00-1", 3, 1)]
    names, rows = [], []
    for number, (person, camera, frames) in enumerate(tracks, start=1):
        rows.append((len(names) + 1, len(names) + frames, int(person.removeprefix("00")), camera))
        names += [f"{person}C{camera}T{number:04}F{frame:03}.jpg" for frame in range(1, frames + 1)]
    fill(root, *(f"bbox_test/{name[:4]}/{name}" for name in names), "bbox_train/0001/0001C1T0001F001.jpg")
    text(root / "info/test_name.txt", *names)
    text(root / "info/train_name.txt", "0001C1T0001F001.jpg")
    mat(root / "info/tracks_test_info.mat", track_test_info=np.array(rows, np.int32))
    mat(root / "info/tracks_train_info.mat", track_train_info=np.array([[1, 1, 1, 1]], np.uint16))
    mat(root / "info/query_IDX.mat", query_IDX=np.array([[1]], np.uint16))
    return root


def sysu30k(root):
    fill(
        root,
        "sysu_train_set_all/0000000002/1.jpg",
        "sysu_train_set_all/0000000003/1.jpg",
        "sysu_train_set_all/0000000009/1.jpg",
        "sysu_test_set_all/query/000028311/000028311_c1_1.jpg",
        "sysu_test_set_all/gallery/000028311/000028311_c2_1.jpg",
        "sysu_test_set_all/gallery/0000others/0000others_c1_1.jpg",
        "sysu_test_set_all/gallery/0000others/0000others_c1_2.jpg",
    )
    bags = [
        {"BagLabel": [3, 2], "BagID": "bag0000000010", "BagImages": ["0000000002/*", "0000000003/*"]},
        {"BagLabel": [9], "BagID": "bag0000000011", "BagImages": ["0000000009/*"]},
    ]
    (root / "meta").mkdir()
    (root / "meta/bag_level_label.json").write_text(json.dumps(bags))
    return root
