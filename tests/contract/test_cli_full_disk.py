"""A full disk, and places where nothing can be written: one line, and nothing is lost or left behind."""

import sys
from pathlib import Path

import pytest

from serve.encoder import open_encoder
from serve.gallery import Gallery
from serve.sources import open_source
from tests.command_line import one_line, process, tree


def limited(size):
    """The process may write no file beyond `size` bytes: what a full disk looks like, from inside one process."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")


@needs_limits
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_while_saving_vectors(world, tmp_path, old):
    out = tmp_path / "out.parquet"
    if old:
        out.write_text("old")
    done = process("embed", "--encoder", "toy", "--images", "pictures", "--out", out, before=limited(1000), cwd=world)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in one_line(done.stderr)
    assert tree(tmp_path) == ["out.parquet"] * old
    assert not old or out.read_text() == "old"


@needs_limits
def test_a_full_disk_while_saving_figures(world, tmp_path):
    words = ("reid", "evaluate", "--encoder", "toy", "--images", "market", "--json", tmp_path / "r.json")
    done = process(*words, before=limited(20), cwd=world)
    assert done.returncode == 1
    assert "File too large" in one_line(done.stderr)
    assert tree(tmp_path) == []


@needs_limits
def test_a_full_disk_while_adding_to_a_gallery(world, tmp_path):
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.add(open_source(world / "pictures").everything)
        gallery.encoder_spec = str(world / "toy")
    before = tree(tmp_path / "gallery")
    data = (world / "one" / "only.png").read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(600):
        (tmp_path / "many" / f"{'x' * 150}{i}.png").write_bytes(data)
    size = max(path.stat().st_size for path in (tmp_path / "gallery").iterdir())
    done = process("gallery", "add", tmp_path / "gallery", "--images", tmp_path / "many", before=limited(size + 100_000))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is the disk full" in one_line(done.stderr)
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy")) as gallery:
        assert len(gallery) >= 10
        assert gallery.verify() == []
        assert gallery.search(world / "pictures" / "a" / "0.png", 1)[0].score > 0.999
    assert set(tree(tmp_path / "gallery")) <= {*before, "catalog.sqlite-wal", "catalog.sqlite-shm"}


@needs_limits
def test_a_full_disk_while_making_a_gallery(world, tmp_path):
    done = process(
        "gallery", "add", tmp_path / "g", "--images", "pictures", "--encoder", "toy", before=limited(3000), cwd=world
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "is the disk full" in one_line(done.stderr)
    done = process("gallery", "add", tmp_path / "g", "--images", "pictures", "--encoder", "toy", cwd=world)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/g: 10 added, 0 were there, 10 in all\n")


def test_where_nothing_can_be_written(refused, world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "keep").touch()
    before = tree(tmp_path)
    for out in (tmp_path / "file" / "out.parquet", tmp_path / "folder", Path("/proc/none/out.parquet")):
        refused("embed", "--encoder", "toy", "--images", "one", "--out", out)
    refused("fit-head", "--encoder", "toy", "--images", "pictures", "--out", tmp_path / "folder")
    refused("gallery", "add", tmp_path / "file" / "gallery", "--images", "one", "--encoder", "toy")
    assert tree(tmp_path) == before
    assert (tmp_path / "file").read_text() == "in the way"
