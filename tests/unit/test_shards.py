"""WebDataset shards: what belongs together by name, what the sidecars say, and shards that cannot be used."""

import io
import json
import logging
import re
import tarfile

import pytest

from serve.sources import open_source, read_bytes
from tests.drawn_sources import picture, refusal


def shard(path, members):
    """A .tar of these members, in this order: bytes, text, or an object for JSON; a number stands for a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = picture(content) if isinstance(content, int) else content
            data = data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def facts(source, role="train"):
    return [(s.source.rpartition("!/")[2], s.label, s.identity, s.camera, s.time) for s in getattr(open_source(source), role)]


def labels(source, role="train"):
    return [row[:2] for row in facts(source, role)]


def numbered(tmp_path, count, prefix="part-"):
    for i in range(count):
        shard(tmp_path / f"{prefix}{i:06}.tar", {f"{i:03}a.png": i, f"{i:03}a.cls": str(i), f"{i:03}b.jpg": i + 100})
    return tmp_path


def test_a_key_is_the_name_up_to_its_first_dot(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        {
            "dir.v2/0001.png": 1,
            "dir.v2/0001.cls": "7\n",
            "0001.cls": "8",
            "0002.PNG": 2,
            "0002.json": {"label": "cat"},
            "3.png": 3,
        },
    )
    assert labels(path) == [("0002.PNG", "cat"), ("3.png", None), ("dir.v2/0001.png", "7")]
    for sample, seed in zip(open_source(path).train, (2, 3, 1), strict=True):
        assert read_bytes(sample.source) == picture(seed)


def test_json_says_label_identity_camera_and_time(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        {
            "1.png": 1,
            "1.json": {"label": 3, "identity": "0007", "camera": 2, "time": 12.5, "caption": ["a", "cat"]},
            "2.png": 2,
            "2.json": {"time": "2024-03-01T12:00:00Z", "label": None, "camera": ""},
            "2.cls": "04",
            "3.png": 3,
            "3.cls": "1",
            "3.json": {"label": "one"},
        },
    )
    assert facts(path) == [
        ("1.png", "3", "0007", "2", 12.5),
        ("2.png", "4", None, None, 1709294400.0),
        ("3.png", "one", None, None, None),
    ]


def test_a_mask_beside_its_picture_is_left_out(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.jpg": 1, "1.seg.png": 2, "1.cls": "0", "2.left.png": 3, "2.right.png": 4})
    assert labels(path) == [("1.jpg", "0"), ("2.left.png", None), ("2.right.png", None)]


@pytest.mark.parametrize(
    "extra", [{}, {"annotations.json": {"label": "cat"}}, {"cat/1.json": {"caption": "a cat"}}, {"cat/1.txt": "a cat"}]
)
def test_without_labels_beside_its_pictures_a_tar_is_an_ordinary_archive(tmp_path, extra):
    path = shard(tmp_path / "a.tar", {"cat/1.png": 1, "dog/2.png": 2} | extra)
    assert labels(path) == [("cat/1.png", "cat"), ("dog/2.png", "dog")]


def test_folders_inside_a_shard_still_split_it(tmp_path):
    path = shard(tmp_path / "a.tar", {"train/1.png": 1, "train/1.cls": "5", "test/2.png": 2, "test/2.cls": "6"})
    assert (labels(path), labels(path, "test")) == ([("train/1.png", "5")], [("test/2.png", "6")])
    assert labels(f"{path}!/test") == [("test/2.png", "6")]


def test_a_folder_of_shards_is_one_source_in_order(tmp_path):
    numbered(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("no picture")
    wanted = [
        ("000a.png", "0"),
        ("000b.jpg", None),
        ("001a.png", "1"),
        ("001b.jpg", None),
        ("002a.png", "2"),
        ("002b.jpg", None),
    ]
    assert labels(tmp_path) == wanted
    assert read_bytes(open_source(tmp_path).train[4].source) == picture(2)
    (tmp_path / "cover.png").write_bytes(picture())
    assert len(open_source(tmp_path).train) == 1, "a folder with pictures is a folder of pictures"


def test_braces_count_as_in_a_shell(tmp_path, monkeypatch):
    numbered(tmp_path / "shards", 12)
    monkeypatch.chdir(tmp_path)
    for pattern, count in (("part-{000000..000011}.tar", 24), ("part-{000009..000010}.tar", 4), ("part-00000{2..2}.tar", 2)):
        samples = open_source(f"shards/{pattern}").train
        assert len(samples) == count
        assert samples[0].source.startswith(str(tmp_path))
    assert "2 of 4 shards are missing, such as " in (message := refusal("shards/part-{000010..000013}.tar"))
    assert message.endswith("part-000012.tar")
    assert "counts -1 shards" in refusal("shards/part-{000003..000001}.tar")
    assert "wanted 1 to 100,000" in refusal("shards/part-{0..99999999999}.tar")


def test_a_file_may_really_have_braces_in_its_name(tmp_path):
    assert labels(shard(tmp_path / "a{0..1}.tar", {"1.png": 1})) == [("1.png", None)]


@pytest.mark.parametrize("names", [("train-{}.tar", "val-{}.tar"), ("train/{}.tar", "test/{}.tar")])
def test_shards_called_train_and_val_are_a_split(tmp_path, names):
    for role, name in enumerate(names):
        for i in range(2):
            shard(tmp_path / name.format(i), {f"{role}{i}.png": 1, f"{role}{i}.cls": "1"})
    assert [name for name, _ in labels(tmp_path)] == ["00.png", "01.png"]
    assert [name for name, _ in labels(tmp_path, "test")] == ["10.png", "11.png"]


def test_val_shards_alone_are_no_split(tmp_path):
    assert len(open_source(numbered(tmp_path, 2, "val-")).train) == 4


def test_many_shards_need_few_handles_and_are_indexed_once(tmp_path, monkeypatch):
    numbered(tmp_path, 40)
    opened = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *given, **options: opened.append(given[0]) or real(*given, **options))
    samples = open_source(tmp_path).train
    for sample in samples[::2] + samples[1::2]:
        read_bytes(sample.source)
    assert len(opened) == 40


def test_a_shard_without_pictures_is_named_and_the_others_go_on(tmp_path, caplog):
    numbered(tmp_path, 2)
    empty = shard(tmp_path / "part-9.tar", {"1.cls": "1", "readme.txt": "none"})
    with caplog.at_level(logging.WARNING):
        assert len(open_source(tmp_path).train) == 4
    assert caplog.messages == [f"{empty}: holds no pictures"]
    assert "holds no pictures" in refusal(empty)


@pytest.mark.parametrize("damage", ["nonsense", "truncated", "header"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    numbered(tmp_path, 3)
    path = tmp_path / "part-000001.tar"
    data = bytearray(path.read_bytes())
    if damage == "nonsense":
        data = b"nonsense" * 1000
    elif damage == "truncated":
        data = data[: data.index(b"001b.jpg") + 600]
    else:
        data[data.index(b"001b.jpg")] ^= 1
    path.write_bytes(data)
    assert f"{path}: not a readable archive" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("1.cls", "cat", "holds 'cat', wanted a class number"),
        ("1.cls", "", "holds '', wanted a class number"),
        ("1.cls", "-1", "holds '-1'"),
        ("1.cls", "1.5", "holds '1.5'"),
        ("1.cls", "9" * 5000, "holds '9+', wanted"),
        ("1.cls", b"\xff\xfe", "not text in UTF-8"),
        ("1.json", "{", "not readable JSON"),
        ("1.json", "[" * 100_000, "not readable JSON"),
        ("1.json", [1], "holds a list, wanted an object"),
        ("1.json", {"label": ["cat"]}, "label is a list, wanted text or a number"),
        ("1.json", {"camera": True}, "camera is a bool"),
        ("1.json", {"time": "yesterday"}, "time is 'yesterday', wanted seconds"),
        ("1.json", '{"time": NaN}', "time is 'nan'"),
    ],
)
def test_a_sidecar_that_cannot_be_used_is_named(tmp_path, name, content, complaint):
    path = shard(tmp_path / "a.tar", {"1.png": 1, name: content})
    message = refusal(path)
    assert message.startswith(f"{path}!/1.")
    assert re.search(complaint, message), message
