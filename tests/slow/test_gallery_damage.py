"""A bit flipped anywhere in a gallery's files is found, or does no harm; what is derived is repaired."""

import multiprocessing
import os
import random
import shutil
import signal

import numpy as np
import pytest

from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Sample
from tests.gallery_writer import new_gallery, vectors_of

FILTERS = ("label = l1", "camera != 2", "identity in (3, 4)", "time >= 20", "extra.box = 7", "source = new7")
TRUTH = ("catalog.sqlite", "catalog.sqlite-wal")


@pytest.fixture(scope="module")
def gallery_folder(tmp_path_factory):
    """A gallery whose last writer was killed: some of it is in the catalog's file, the rest in the file of its WAL."""
    folder = new_gallery(tmp_path_factory.mktemp("damage") / "gallery")
    with Gallery.open(folder) as gallery:
        gallery.encoder_spec = "grpc://somewhere"
        samples = [Sample(f"s{i}", f"l{i % 3}", str(i % 5), str(i % 4), float(i)) for i in range(120)]
        gallery.add(samples, vectors_of(list(range(120))), extra={f"s{i}": {"box": i} for i in range(60)}, batch_size=10)
        gallery.remove([3, 4, 50])
        gallery.rebuild()
    writer = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(folder,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert (folder / "catalog.sqlite-wal").stat().st_size > 10_000
    return folder


def write_and_die(folder):
    with Gallery.open(folder) as gallery:
        for i in range(10):
            gallery.add([Sample(f"new{i}", label="l1")], vectors_of([1000 + i]))
        gallery.update(7, vectors_of([5000])[0])
        gallery.relabel([8, 9], label="other", extra={"seen": True})
        gallery.remove([20])
        os.kill(os.getpid(), signal.SIGKILL)


def everything(gallery):
    """All that can be read."""
    queries = [gallery.vector(7), *vectors_of([1, 2, 3])]
    return {
        "facts": (gallery.info().encoder_id, gallery.info().embedding_dim, gallery.encoder_spec),
        "items": gallery.items(),
        "vectors": [gallery.vector(item.id).tobytes() for item in gallery.items()],
        "filters": [gallery.ids(where).tolist() for where in FILTERS],
        "counts": [gallery.count(where) for where in FILTERS],
        "distinct": [gallery.distinct(field) for field in ("label", "identity", "camera", "source")],
        "searches": [gallery.search(query, 10, where) for query in queries for where in (None, *FILTERS)],
        "manifest": (gallery.folder / "gallery.json").read_bytes(),
    }


def flip(path, rng):
    """Returns: where."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}, byte {place}, bit {bit}"


def read(folder, caplog, repair):
    """What is complained of, and all values if one may believe them (after a repair)."""
    try:
        with Gallery.open(folder) as gallery:
            said = [*caplog.messages, *gallery.verify()]
            if said and not repair:
                return said, None
            if said:
                gallery.repair()
            return said, everything(gallery)
    except GalleryError as error:
        return [str(error)], None


def test_a_flipped_bit_is_found_or_does_no_harm(gallery_folder, tmp_path, full, caplog):
    shutil.copytree(gallery_folder, tmp_path / "whole")
    with Gallery.open(tmp_path / "whole") as gallery:
        assert (gallery.verify(), caplog.messages) == ([], [])
        truth = everything(gallery)
    files = [path for path in sorted(gallery_folder.rglob("*")) if path.is_file() and path.stat().st_size]
    names = [str(path.relative_to(gallery_folder)) for path in files]
    assert set(TRUTH) < set(names)
    rng, found = random.Random(0), dict.fromkeys(names, 0)  # noqa: S311
    for trial in range(4000 if full else 150):
        name = TRUTH[trial % 4] if trial % 4 < 2 else rng.choice(names)
        folder = tmp_path / "copy"
        shutil.copytree(gallery_folder, folder)
        where = flip(folder / name, rng)
        caplog.clear()
        said, values = read(folder, caplog, repair=name not in TRUTH)
        assert values == truth or (values is None and said and name in TRUTH), where
        assert not any("\n" in line for line in said), where
        found[name] += bool(said)
        shutil.rmtree(folder)
    assert all(found[name] for name in names if name in TRUTH or name.endswith("rows.vectors"))


def test_a_bit_in_every_row_of_the_catalog_is_found(gallery_folder, tmp_path):
    """Rows of vectors are most of the file: none is left out of the check."""
    shutil.copytree(gallery_folder, tmp_path / "copy")
    with Gallery.open(tmp_path / "copy") as gallery:
        blobs = {item.id: gallery.vector(item.id).tobytes() for item in gallery.items()}
    content = (tmp_path / "copy" / "catalog.sqlite").read_bytes()
    rng = np.random.default_rng(0)
    for item_id, blob in blobs.items():
        damaged = bytearray(content)
        damaged[content.index(blob) + rng.integers(len(blob))] ^= 1
        (tmp_path / "copy" / "catalog.sqlite").write_bytes(damaged)
        with Gallery.open(tmp_path / "copy") as gallery:
            assert f"vector of item {item_id}: changed on the disk (checksum)" in gallery.verify()
