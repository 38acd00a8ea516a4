"""Whole or not at all, whatever happens in between."""

import errno
import os
import stat
from pathlib import Path

import pytest

import serve.files
from serve.files import atomic_folder, atomic_path


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half(path, failure):
    path.write_text("half")
    raise failure


def inside(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent, "another file system could not rename it"
        assert temporary.name.startswith("."), "sources and repositories pass over hidden files"
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert mode(path) == 0o644
    assert inside(path.parent) == ["a.txt"]


def test_a_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert inside(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path, failure, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with pytest.raises(failure), atomic_path(path) as temporary:
        write_half(temporary, failure)
    assert inside(tmp_path) == ["a.txt"] * bool(old)
    assert not old or path.read_text() == old


def test_a_temporary_file_that_its_writer_took_away(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.unlink()
    assert inside(tmp_path) == []


@pytest.mark.parametrize("where", ["mkstemp", "fsync", "replace"])
def test_a_full_disk_while_saving_a_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.txt"
    path.write_text("old")
    owner = {"mkstemp": serve.files.tempfile, "fsync": os, "replace": Path}[where]
    monkeypatch.setattr(owner, where, full)
    with pytest.raises(OSError, match="No space left"), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert inside(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_at_the_write_itself(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"), atomic_path(path) as temporary:
        copy_onto_full_disk(temporary)
    assert inside(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def copy_onto_full_disk(path):
    path.unlink()
    path.symlink_to("/dev/full")
    path.write_text("half")


def test_where_a_folder_stands_no_file_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "keep").touch()
    with pytest.raises(OSError, match="directory"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert inside(tmp_path) == ["a"]
    assert inside(tmp_path / "a") == ["keep"]


def build(folder, text):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text(text)
    (folder / f"only in {text}").touch()


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def names(text):
    return sorted(["sub", "sub/a.txt", f"only in {text}"])


@pytest.mark.parametrize("apart", [False, True])
def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path, apart):
    path, workshop = tmp_path / "parent" / "folder", None
    if apart:
        workshop = tmp_path / "workshop"
        workshop.mkdir()
    for text in ("old", "new"):
        with atomic_folder(path, workshop=workshop) as temporary:
            assert temporary.parent == (workshop or path.parent)
            build(temporary, text)
            assert not path.exists() or content(path) == names("old")
        assert content(path) == names(text), "nothing of the old one is mixed in"
        assert mode(path) == 0o755
        assert inside(path.parent) == ["folder"]
        assert workshop is None or inside(workshop) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_midway_leaves_the_old_folder_and_nothing_else(tmp_path, failure, old):
    path = tmp_path / "folder"
    if old:
        path.mkdir()
        build(path, "old")
    with pytest.raises(failure), atomic_folder(path) as temporary:
        write_half(temporary / "a.txt", failure)
    assert inside(tmp_path) == ["folder"] * old
    assert not old or content(path) == names("old")


@pytest.mark.parametrize("calls", range(1, 6))
def test_a_full_disk_at_any_sync_of_a_folder(tmp_path, monkeypatch, calls):
    """Four things are synced: the files, the folders, and the new folder itself; the fifth is the parent, after the rename."""
    path = tmp_path / "folder"
    path.mkdir()
    build(path, "old")
    fsync, count = os.fsync, iter(range(1, 100))
    monkeypatch.setattr(os, "fsync", lambda descriptor: full() if next(count) == calls else fsync(descriptor))
    with pytest.raises(OSError, match="No space left"), atomic_folder(path) as temporary:
        build(temporary, "new")
    assert inside(tmp_path) == ["folder"]
    assert content(path) == names("new" if calls == 5 else "old")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, failing):
    path = tmp_path / "folder"
    path.mkdir()
    build(path, "old")
    rename, count = Path.rename, iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, target: full() if next(count) == failing else rename(self, target))
        with pytest.raises(OSError, match="No space left"), atomic_folder(path) as temporary:
            build(temporary, "new")
    assert inside(tmp_path) == ["folder"]
    assert content(path) == names("old")
