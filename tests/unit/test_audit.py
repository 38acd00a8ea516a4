import errno
import json
import os

import pytest

from serve.errors import GalleryError
from serve.identity import audit


def test_lines_are_found_by_name_and_do_not_hold_it(tmp_path):
    audit.note(tmp_path, "rename", ["Anna", "Berta"], 3)
    audit.note(tmp_path, "forgotten", ["Berta"], 3)
    audit.note(tmp_path, "merge", ["Cora", "Dora"], 2)
    text = (tmp_path / "audit.jsonl").read_text()
    assert not any(name in text for name in ("Anna", "Berta", "Cora", "Dora"))
    assert [line["action"] for line in audit.lines_about(tmp_path, "Berta")] == ["rename", "forgotten"]
    assert [line["items"] for line in audit.lines_about(tmp_path, "Anna")] == [3]
    assert audit.lines_about(tmp_path, "anna") == []
    assert len(text.splitlines()) == 4
    assert all(json.loads(line).get("time", "2020") > "2" for line in text.splitlines())


def test_the_same_name_differs_from_gallery_to_gallery(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        audit.note(folder, "forgotten", ["Anna"], 1)
    one, two = (audit.lines_about(folder, "Anna")[0]["identities"] for folder in (tmp_path / "one", tmp_path / "two"))
    assert one != two


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path, monkeypatch):
    audit.note(tmp_path, "rename", ["Anna", "Berta"], 3)
    before = (tmp_path / "audit.jsonl").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        audit.note(tmp_path, "forgotten", ["Berta"], 3)
    assert (tmp_path / "audit.jsonl").read_bytes() == before


def test_no_log_yet(tmp_path):
    assert audit.lines_about(tmp_path, "Anna") == []
    (tmp_path / "audit.jsonl").touch()
    assert audit.lines_about(tmp_path, "Anna") == []
    audit.note(tmp_path, "forgotten", ["Anna"], 1)
    assert len(audit.lines_about(tmp_path, "Anna")) == 1


@pytest.mark.parametrize("text", ["no JSON\n", '{"format": "other", "salt": "00"}\n', "[]\n", '{"salt": 1}\n'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "audit.jsonl").write_text(text)
    for ask in (lambda: audit.lines_about(tmp_path, "Anna"), lambda: audit.note(tmp_path, "forgotten", ["Anna"], 1)):
        with pytest.raises(GalleryError, match=r"audit.jsonl: no audit log"):
            ask()
    assert (tmp_path / "audit.jsonl").read_text() == text
