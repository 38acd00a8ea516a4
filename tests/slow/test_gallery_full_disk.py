"""A disk that fills up under a gallery and is given room again: one line, nothing acknowledged lost, and on it goes."""

import subprocess
import sys

import pytest

from serve.gallery import Gallery
from tests.gallery_writer import new_gallery, vectors_of

PROGRAM = """
import resource, sys
from pathlib import Path
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Sample
from tests.gallery_writer import vectors_of

def room(limited):
    {room}

def add(first):
    tags = list(range(first, first + 20))
    gallery.add([Sample(f"{{tag}}" + "x" * 500) for tag in tags], vectors_of(tags))
    print("added", first + 20, flush=True)

with Gallery.open(sys.argv[1]) as gallery:
    room(limited=True)
    count = 0
    try:
        while True:
            add(count)
            count += 20
    except GalleryError as error:
        print("refused", error)
    try:
        gallery.relabel(gallery.ids(), label="y" * 1000)
    except GalleryError as error:
        print("refused", error)
    print("found", len(gallery.search(vectors_of([1])[0], 10**6)))
    room(limited=False)
    add(count)
    gallery.relabel([1], label="later")
    gallery.save()
"""
FILE_SIZE = "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000 if limited else -1, -1))"  # for all files, as EFBIG
BALLAST = """ballast = Path(sys.argv[1]).parent / "ballast"
    ballast.write_bytes(bytes(1_500_000)) if limited else ballast.unlink()"""  # ENOSPC


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def check(folder, room):
    new_gallery(folder)
    command = [sys.executable, "-c", PROGRAM.format(room=room), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    words = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    *before, (_, count) = [word for word in words if word[0] == "added"]
    assert len(before) > 3
    refusals = [text for word, text in words if word == "refused"]
    assert len(refusals) == 2, done.stdout
    assert all("SQLite says" in text and "is the disk full" in text for text in refusals)
    assert ["found", str(20 * len(before))] in words
    with Gallery.open(folder) as gallery:
        assert len(gallery) == int(count) == 20 * len(before) + 20
        assert gallery.verify() == []
        assert [item.label for item in gallery.items(limit=2)] == ["later", None]
        for tag in range(0, len(gallery), 7):
            assert gallery.search(vectors_of([tag])[0], 1)[0].source == f"{tag}" + "x" * 500


def test_a_limit_of_file_sizes(tmp_path):
    check(tmp_path / "gallery", FILE_SIZE)


def test_a_full_file_system(small_disk):
    check(small_disk / "gallery", BALLAST)
