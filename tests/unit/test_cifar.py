"""CIFAR in its binary version: rows as pictures, on disk and inside a .tar; the pickled version is refused."""

import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from serve.contract import Preprocess
from serve.errors import SourceError
from serve.sources import open_source, read_batches, read_bytes
from tests.drawn_sources import refusal

CLASSES = ["airplane", "automobile", "bird"]
FRAME = Preprocess(height_px=32, width_px=32, resize="stretch", crop=1.0, resample="bicubic", jpeg="full")


def rows(seed, count, label_bytes):
    """(labels, pictures (count, 32, 32, 3), the bytes of the .bin), written out as CIFAR's page describes them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), count)
    pictures = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    data = b""
    for label, picture in zip(labels, pictures, strict=True):
        data += bytes([0] * (label_bytes - 1) + [label])
        for channel in range(3):
            for y in range(32):
                data += bytes(picture[y, :, channel])
    return labels, pictures, data


def cifar10(root):
    root.mkdir(parents=True)
    (root / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    (root / "readme.html").write_text("hello")
    parts = {"data_batch_1": rows(1, 3, 1), "data_batch_2": rows(2, 2, 1), "test_batch": rows(3, 2, 1)}
    for name, (_, _, data) in parts.items():
        (root / f"{name}.bin").write_bytes(data)
    return parts


def cifar100(root):
    root.mkdir(parents=True)
    (root / "fine_label_names.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "coarse_label_names.txt").write_text("things\n")
    parts = {"train": rows(4, 3, 2), "test": rows(5, 2, 2)}
    for name, (_, _, data) in parts.items():
        (root / f"{name}.bin").write_bytes(data)
    return parts


def tarred(folder, path):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, folder.name)
    return path


@pytest.mark.parametrize(("build", "name"), [(cifar10, "cifar-10-batches-bin"), (cifar100, "cifar-100-binary")])
@pytest.mark.parametrize("place", ["folder", "its parent", "tar", "inside tar"])
def test_rows_are_pictures_with_classes_and_a_split(tmp_path, build, name, place):
    root = tmp_path / "data" / name
    parts = build(root)
    archive = tarred(root, tmp_path / "cifar.tar")
    source = {"folder": root, "its parent": root.parent, "tar": archive, "inside tar": f"{archive}!/{name}"}[place]
    base = f"{archive}!/{name}" if "tar" in place else str(root)
    images = open_source(source)
    for role, found in (("train", images.train), ("test", images.test)):
        wanted = [
            (part, i) for part in parts if part.startswith("test") == (role == "test") for i in range(len(parts[part][0]))
        ]
        assert [sample.source for sample in found] == [f"{base}/{part}.bin!/{i}" for part, i in wanted]
        for sample, (part, i) in zip(found, wanted, strict=True):
            labels, pictures, _ = parts[part]
            assert sample.label == CLASSES[labels[i]]
            seen = np.asarray(Image.open(io.BytesIO(read_bytes(sample.source))))
            np.testing.assert_array_equal(seen, pictures[i])


def test_rows_are_decoded_as_any_picture(tmp_path):
    parts = cifar10(tmp_path / "c")
    ((good, pixels, bad),) = read_batches(open_source(tmp_path / "c").everything, FRAME)
    assert (len(good), bad) == (7, [])
    np.testing.assert_array_equal(pixels, np.concatenate([pictures for _, pictures, _ in parts.values()]))


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("cut", [1, 3073 * 2 - 1, 3072, -1])
def test_a_truncated_batch_is_refused_by_name(tmp_path, cut, archived):
    parts = cifar10(tmp_path / "c")
    path = tmp_path / "c" / "data_batch_2.bin"
    path.write_bytes(parts["data_batch_2"][2][:-cut] if cut > 0 else b"")
    message = refusal(tarred(tmp_path / "c", tmp_path / "c.tar") if archived else tmp_path / "c")
    assert "data_batch_2.bin: " in message
    assert "truncated? download it again" in message


def test_a_class_without_a_name_is_refused(tmp_path):
    cifar10(tmp_path / "c")
    (tmp_path / "c" / "batches.meta.txt").write_text("airplane\n")
    assert "batches.meta.txt names 1; download it again" in refusal(tmp_path / "c")


@pytest.mark.parametrize("row", ["7", "-1", "one", "", "1e3", "²"])
def test_a_row_that_is_not_there(tmp_path, row):
    cifar10(tmp_path / "c")
    archive = tarred(tmp_path / "c", tmp_path / "c.tar")
    for place in (f"{tmp_path}/c/data_batch_1.bin", f"{archive}!/c/data_batch_1.bin", f"{archive}!/c/data_batch_9.bin"):
        if row:
            with pytest.raises(SourceError, match="cannot be read"):
                read_bytes(f"{place}!/{row}")


def test_a_batch_cut_after_it_was_listed_is_one_unreadable_picture(tmp_path):
    cifar10(tmp_path / "c")
    samples = open_source(tmp_path / "c").train
    (tmp_path / "c" / "data_batch_1.bin").write_bytes(b"x" * 3073)
    ((good, _, bad),) = read_batches(samples, FRAME)
    assert (len(good), [fault.source for fault in bad]) == (3, [sample.source for sample in samples[1:3]])


@pytest.mark.parametrize("names", [("data_batch_1", "test_batch", "batches.meta"), ("train", "test", "meta")])
@pytest.mark.parametrize("archived", [False, True])
def test_the_pickled_version_is_refused(tmp_path, names, archived):
    folder = tmp_path / "cifar-py"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"\x80\x02")
    message = refusal(tarred(folder, tmp_path / "c.tar") if archived else folder)
    assert "nothing is unpickled here; download its binary version" in message


def test_other_bin_files_are_no_cifar(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(3074))
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
    assert "holds no pictures" in refusal(tmp_path)


def test_pictures_beside_it_come_first(tmp_path):
    cifar10(tmp_path / "c")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert len(open_source(tmp_path).everything) == 1
    shutil.rmtree(tmp_path / "c")
