"""The list of pictures that were left out."""

import json

import pytest

from serve.engines.quarantine import read_quarantine, write_quarantine
from serve.errors import SourceError
from serve.samples import Unreadable

BAD = [Unreadable("a b.png", "a b.png: empty file"), Unreadable("ü\n.png", "no\nlines")]


def test_an_object_a_line(tmp_path):
    path = tmp_path / "new" / "quarantine.jsonl"
    assert read_quarantine(path) == []
    write_quarantine(path, BAD)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"source": "a b.png", "reason": "a b.png: empty file"},
        {"source": "ü\n.png", "reason": "no\nlines"},
    ]
    assert read_quarantine(path) == BAD


def test_where_nothing_was_left_out_there_is_no_file(tmp_path):
    write_quarantine(tmp_path / "q.jsonl", [])
    write_quarantine(tmp_path / "q.jsonl", BAD)
    write_quarantine(tmp_path / "q.jsonl", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"a diary\n", b'{"source": "a"}\n', b"[1]\n", b'"text"\n', b"\xff\xfe"])
def test_another_file_is_not_taken_for_one(tmp_path, content):
    (tmp_path / "diary.txt").write_bytes(content)
    with pytest.raises(SourceError, match=r"diary\.txt: no list of pictures left out .*; give another name or remove it"):
        read_quarantine(tmp_path / "diary.txt")
