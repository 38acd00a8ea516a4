"""What is below a folder, and what is remembered of it: a changed folder is always listed anew."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from serve.formats import listing
from serve.formats.listing import list_files


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own, for trees of any size."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(listing, "WORTH_REMEMBERING", 1)
    return folder


@pytest.fixture
def later(monkeypatch):
    """The clock an hour on: nothing on the disk is fresh."""
    now = time.time_ns
    monkeypatch.setattr(listing.time, "time_ns", lambda: now() + 3600 * 10**9)


@pytest.fixture
def scanned(monkeypatch):
    """The names of the folders that were really listed."""
    seen, scandir = [], os.scandir

    def watched(path):
        seen.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watched)
    return seen


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def cache_file(cache):
    (path,) = cache.rglob("*.json")
    return path


def by_os_walk(root):
    paths = [Path(folder, name).relative_to(root) for folder, _, names in os.walk(root) for name in names]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def test_all_files_sorted_and_hidden_ones_left_out(tmp_path):
    fill(tmp_path, "b/2.png", "b/deep/er/3.png", "a.png", "B.txt", ".git/x", "b/.hidden", "__MACOSX/a.png")
    (tmp_path / "empty").mkdir()
    assert list_files(tmp_path) == ["B.txt", "a.png", "b/2.png", "b/deep/er/3.png"]


def test_the_second_time_no_folder_is_listed(tmp_path, cache, later, scanned):
    root = fill(tmp_path / "root", "a.png", "b/2.png", "b/c/3.png")
    first = list_files(root)
    assert sorted(scanned) == ["b", "c", "root"]
    scanned.clear()
    assert list_files(root) == first == by_os_walk(root)
    assert scanned.count("b") + scanned.count("c") == 2  # those are os.walk's own; ours listed none
    assert cache_file(cache).is_relative_to(cache / "simclr-serve" / "listings")


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "new folder", "folder gone", "replaced, old mtime"])
def test_a_folder_that_changed_is_listed_again_and_no_other(tmp_path, later, scanned, change):
    root = fill(tmp_path / "root", "a.png", "b/2.png", "b/c/3.png", "d/4.png")
    list_files(root)
    status = (root / "b").stat()
    if change == "added":
        fill(root, "b/new.png")
    elif change == "removed":
        (root / "b" / "2.png").unlink()
    elif change == "renamed":
        (root / "b" / "2.png").rename(root / "b" / "22.png")
    elif change == "new folder":
        fill(root, "b/new/5.png")
    elif change == "folder gone":
        (root / "b" / "c" / "3.png").unlink()
        (root / "b" / "c").rmdir()
    else:
        (root / "b" / "2.png").rename(root / "b" / "x.png")
        os.utime(root / "b", ns=(status.st_atime_ns, status.st_mtime_ns))
    scanned.clear()
    found = list_files(root)
    assert sorted(scanned) == (["b", "new"] if change == "new folder" else ["b"])
    assert found == by_os_walk(root)


def test_what_was_listed_within_a_tick_of_its_change_is_not_trusted(tmp_path, cache, monkeypatch):
    root = fill(tmp_path / "root", "a.png", "b/2.png")
    list_files(root)
    assert not list(cache.rglob("*.json"))
    monkeypatch.setattr(listing, "RACY_NS", 0)
    list_files(root)
    monkeypatch.setattr(listing, "RACY_NS", 2 * 10**9)
    fill(root, "b/c/3.png")
    list_files(root)
    assert set(json.loads(cache_file(cache).read_text())["folders"]) == {""}, "only the folder that has rested"


def test_small_trees_are_not_remembered(tmp_path, cache, monkeypatch, later):
    monkeypatch.setattr(listing, "WORTH_REMEMBERING", 4)
    root = fill(tmp_path / "root", "1", "2", "b/3")
    list_files(root)
    assert not list(cache.rglob("*"))
    list_files(fill(root, "4"))
    assert cache_file(cache)


def poisons():
    """What a cache file may hold; STAMP stands for the true one, so that only the rest can give it away."""
    good = {"version": 1, "folders": {"": ["STAMP", ["a.png"], []]}}
    yield b""
    yield b"\xff\x00garbage"
    yield b"[" * 100_000
    yield b"null"
    yield b'"text"'
    yield json.dumps(good | {"version": 0}).encode()
    yield json.dumps(good | {"folders": ["a"]}).encode()
    for fields in (
        ["STAMP"],
        ["STAMP", ["x"], [], 1],
        [7, ["x"], []],
        ["STAMP", "x", []],
        ["STAMP", [7], []],
        ["STAMP", ["../../etc/passwd"], []],
        ["STAMP", ["x"], [".."]],
        ["STAMP", ["x"], ["a/../.."]],
        ["STAMP", ["x"], [""]],
        None,
    ):
        yield json.dumps(good | {"folders": {"": fields}}).encode()


@pytest.mark.parametrize("poison", list(poisons()))
def test_a_poisoned_cache_is_ignored_and_mended(tmp_path, cache, later, poison):
    root = fill(tmp_path / "root", "a.png", "b/2.png")
    wanted = list_files(root)
    path = cache_file(cache)
    stamp = json.loads(path.read_text())["folders"][""][0]
    path.write_bytes(poison.replace(b"STAMP", stamp.encode()))
    assert list_files(root) == wanted
    assert set(json.loads(path.read_text())["folders"]) == {"", "b/"}


def test_the_stamp_in_those_poisons_is_what_makes_them_bite(tmp_path, cache, later):
    root = fill(tmp_path / "root", "a.png")
    list_files(root)
    path = cache_file(cache)
    path.write_text(path.read_text().replace("a.png", "b.png"))
    assert list_files(root) == ["b.png"]


def test_no_place_for_a_cache_is_no_fault(tmp_path, monkeypatch, later, cache):
    root = fill(tmp_path / "root", "a.png")
    (cache / "simclr-serve").write_text("a file where the folder should be")
    assert list_files(root) == ["a.png"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert list_files(root) == ["a.png"]


def test_a_relative_cache_home_is_ignored_as_xdg_says(tmp_path, monkeypatch, later):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    list_files(fill(tmp_path / "root", "a.png"))
    assert not (tmp_path / "relative").exists()
    assert cache_file(tmp_path / "home" / ".cache")


def test_links_to_folders_are_followed_and_cycles_end(tmp_path, later):
    root = fill(tmp_path / "root", "a/1.png", "b/2.png")
    fill(tmp_path / "elsewhere", "3.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "a").symlink_to(root / "a")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root / "self")
    (root / "dangling").symlink_to(tmp_path / "gone")
    wanted = ["a/1.png", "b/2.png", "b/a/1.png", "dangling", "out/3.png", "self"]
    assert list_files(root) == wanted
    assert list_files(root) == wanted


def test_a_folder_that_cannot_be_listed_is_named_and_left_out(tmp_path, monkeypatch, caplog):
    root, scandir = fill(tmp_path / "root", "a.png", "b/2.png"), os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list_files(root) == ["a.png"]
    assert f"{root}/b: left out, it cannot be listed (Permission denied)" in caplog.text
    with pytest.raises(FileNotFoundError):
        list_files(tmp_path / "gone")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_names_that_are_no_utf8_survive_the_cache(tmp_path, later):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_text("x")
    first = list_files(tmp_path)
    assert [os.fsencode(name) for name in first] == [b"caf\xe9.png"]
    assert list_files(tmp_path) == first


def test_a_long_listing_shows_a_bar_and_a_short_one_does_not(tmp_path, capsys, monkeypatch):
    root = fill(tmp_path / "root", *(f"{i}/a.png" for i in range(30)))
    list_files(root)
    assert capsys.readouterr().err == ""
    real = listing.tqdm
    monkeypatch.setattr(listing, "tqdm", lambda **options: real(**options | {"delay": 1e-9, "mininterval": 0}))
    list_files(root)
    assert "listing root: 30 files" in capsys.readouterr().err
