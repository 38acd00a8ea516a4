"""Many pictures at once: into a gallery, a Parquet file, a re-ID report."""

import itertools
import json
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import serve.files
from serve.bulk import add_pictures, embed_samples, embed_to_parquet
from serve.contract import METADATA_KEY, Manifest
from serve.engines.local import embed_here
from serve.errors import EncoderUnavailable, SimclrError, SourceError
from serve.gallery import Gallery
from serve.samples import Sample
from serve.sources import open_source


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    return path


SCHEMA = {
    "source": pa.string(),
    "label": pa.string(),
    "identity": pa.string(),
    "camera": pa.string(),
    "time": pa.float64(),
    "track": pa.string(),
    "vector": pa.list_(pa.float32(), 16),
}


def embed(encoder, source, out, *, shard_size=64, workers=2):
    engine = partial(embed_here, encoder=encoder, workers=workers)
    return embed_to_parquet(encoder.manifest, str(source), str(out), engine, shard_size)


def test_a_parquet_file_holds_all_that_is_known(tmp_path, toy_encoder):
    for i in range(3):
        draw(tmp_path / f"{i}.png", i)
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "list.csv").write_text(
        "path,label,identity,camera,time\n0.png,cat,7,1,2.5\nbroken.png,,,,\n1.png,,,,\n2.png,dog,,,2024-01-01\n"
    )
    out = tmp_path / "new" / "out.parquet"
    report = embed(toy_encoder, tmp_path / "list.csv", out)
    assert (report.count, [bad.source for bad in report.unreadable]) == (3, [str(tmp_path / "broken.png")])
    table = pq.read_table(out)
    assert {field.name: field.type for field in table.schema} == SCHEMA
    assert table["source"].to_pylist() == [str(tmp_path / f"{i}.png") for i in range(3)]
    assert table["label"].to_pylist() == ["cat", None, "dog"]
    assert (table["identity"].to_pylist(), table["camera"].to_pylist()) == (["7", None, None], ["1", None, None])
    assert table["time"].to_pylist() == [2.5, None, 1704067200.0]
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, toy_encoder.embed([tmp_path / f"{i}.png" for i in range(3)]), atol=1e-6)
    assert set(table.schema.metadata) == {METADATA_KEY.encode()}
    manifest = Manifest.parse(table.schema.metadata[METADATA_KEY.encode()], "the file")
    assert manifest == toy_encoder.manifest
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.parquet", "out.parquet.quarantine.jsonl"]


def test_the_columns_have_the_same_types_where_nothing_is_known(tmp_path, toy_encoder):
    draw(tmp_path / "pictures" / "a.png")
    embed(toy_encoder, tmp_path / "pictures", tmp_path / "out.parquet")
    assert {field.name: field.type for field in pq.read_schema(tmp_path / "out.parquet")} == SCHEMA


@pytest.fixture
def many(tmp_path):
    """A folder of 300 pictures."""
    for i in range(300):
        draw(tmp_path / "pictures" / f"{i:03}.png", i)
    return tmp_path / "pictures"


def sources(path):
    return [Path(source).stem for source in pq.read_table(path)["source"].to_pylist()]


@pytest.mark.parametrize("shard_size", [7, 64, 1024])
def test_pictures_of_several_shards_and_batches_stay_in_order(tmp_path, many, toy_encoder, shard_size):
    embed(toy_encoder, many, tmp_path / "out.parquet", shard_size=shard_size, workers=3)
    assert sources(tmp_path / "out.parquet") == [f"{i:03}" for i in range(300)]
    one = toy_encoder.embed([many / "299.png"])[0]
    np.testing.assert_allclose(pq.read_table(tmp_path / "out.parquet")["vector"][299].as_py(), one, atol=1e-6)


def test_a_folder_gets_a_file_for_each_shard(tmp_path, many, toy_encoder):
    (many / "007.png").write_text("no picture")
    embed(toy_encoder, many, tmp_path / "one.parquet")
    report = embed(toy_encoder, many, f"{tmp_path}/parts/")
    assert (report.count, report.quarantine) == (299, tmp_path / "parts.quarantine.jsonl")
    assert len(list((tmp_path / "parts").iterdir())) == 5
    assert pq.read_table(tmp_path / "parts").equals(pq.read_table(tmp_path / "one.parquet"))
    first = next((tmp_path / "parts").iterdir())
    Manifest.parse(pq.read_schema(first).metadata[METADATA_KEY.encode()], "the part")


def test_a_folder_then_holds_nothing_of_former_runs(tmp_path, many, toy_encoder):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "README").write_text("mine")
    (tmp_path / "parts" / ".part-000001-0123456789abcdef.parquet.x7").write_text("of a killed process")
    embed(toy_encoder, many, f"{tmp_path}/parts/")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("part-*")}
    (many / "290.png").unlink()
    embed(toy_encoder, many, f"{tmp_path}/parts/")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert (tmp_path / "parts" / "README").read_text() == "mine"
    assert len(after) == 5 + 1
    assert len(before.items() & after.items()) == 4, "shards whose pictures are the same were not embedded again"
    assert sources(tmp_path / "parts" / min(set(after) - set(before) - {"README"}))[-1] == "299"


def test_a_folder_needs_its_slash(tmp_path, many, toy_encoder):
    with pytest.raises(SimclrError, match=r"pictures: is a folder; give FILE\.parquet, or .*/pictures/ for a file per shard"):
        embed(toy_encoder, "nowhere", many)
    assert len(list(many.iterdir())) == 300


GONE = EncoderUnavailable("the server is gone")


class Failing:
    """An encoder that fails at some of its batches, and counts how many pictures it has seen."""

    def __init__(self, encoder, at, error=GONE):
        self.manifest, self.encoder_id = encoder.manifest, encoder.encoder_id
        self._embed, self._calls, self._at, self._error = encoder.embed, itertools.count(), at, error
        self.seen = 0

    def embed(self, images):
        if next(self._calls) in self._at:
            raise self._error
        self.seen += len(images)
        return self._embed(images)


@pytest.mark.parametrize("out", ["out.parquet", "parts/"])
def test_a_broken_run_goes_on_where_it_was(tmp_path, many, toy_encoder, capsys, out):
    (many / "007.png").write_text("no picture")
    (many / "131.png").write_text("no picture")
    whole = embed(toy_encoder, many, f"{tmp_path}/whole/{out}")
    with pytest.raises(EncoderUnavailable):
        embed(Failing(toy_encoder, range(3, 9)), many, f"{tmp_path}/{out}", workers=1)
    parts = tmp_path / out if out == "parts/" else tmp_path / "out.parquet.parts"
    assert len(list(parts.iterdir())) == 3
    assert not (tmp_path / "out.parquet").exists()
    capsys.readouterr()
    encoder = Failing(toy_encoder, ())
    report = embed(encoder, many, f"{tmp_path}/{out}")
    assert encoder.seen == 300 - 3 * 64
    assert "64%" in capsys.readouterr().err.split("\r")[1], "the bar begins where it was"
    assert (report.count, report.unreadable) == (whole.count, whole.unreadable)
    assert contents(tmp_path / out) == contents(tmp_path / "whole" / out)
    assert parts.exists() == (out == "parts/")


def contents(path):
    """The bytes of a file, or of all files of a folder by name."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("error", [GONE, KeyboardInterrupt()])
def test_a_failure_gives_up_what_else_is_under_way(tmp_path, many, toy_encoder, error):
    encoder = Failing(toy_encoder, {2}, error)
    with pytest.raises(type(error)):
        embed(encoder, many, tmp_path / "out.parquet", shard_size=16, workers=4)
    assert encoder.seen < 200


def test_another_encoder_begins_anew(tmp_path, many, toy_encoder, other_encoder):
    with pytest.raises(EncoderUnavailable):
        embed(Failing(toy_encoder, range(3, 9)), many, tmp_path / "out.parquet", workers=1)
    encoder = Failing(other_encoder, ())
    embed(encoder, many, tmp_path / "out.parquet")
    assert encoder.seen == 300
    embed(other_encoder, many, tmp_path / "other.parquet")
    assert contents(tmp_path / "out.parquet") == contents(tmp_path / "other.parquet")


class Wide:
    """Vectors of 1 MB."""

    def __init__(self, encoder):
        self.manifest, self.encoder_id = encoder.manifest.model_copy(update={"embedding_dim": 250_000}), encoder.encoder_id

    def embed(self, images):
        return np.ones((len(images), 250_000), np.float32)


@pytest.mark.parametrize("out", ["out.parquet", "parts/"])
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, toy_encoder, out):
    draw(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path\n" + "a.png\n" * 200)
    former, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())  # it counts from 0
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        report = embed(Wide(toy_encoder), tmp_path / "list.csv", f"{tmp_path}/{out}", shard_size=2)
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(former)
    assert report.count == 200
    assert 2e6 < peak < 40e6, "of 200 MB"


def test_where_no_picture_can_be_read_nothing_is_written(tmp_path, toy_encoder):
    (tmp_path / "a.png").write_text("no picture")
    for out in ("out.parquet", "parts/"):
        with pytest.raises(SourceError, match=r"none of 1 pictures can be read; the first: .*a\.png"):
            embed(toy_encoder, tmp_path, f"{tmp_path}/{out}")
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_save_leaves_the_old_file(tmp_path, toy_encoder, monkeypatch):
    draw(tmp_path / "pictures" / "a.png")
    (tmp_path / "out.parquet").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serve.files, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        embed(toy_encoder, tmp_path / "pictures", tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "pictures"]


def test_the_quarantine_names_every_failure_in_order(tmp_path, many, toy_encoder):
    bad = [many / f"{i:03}.png" for i in (3, 70, 71, 299)]
    for path in bad:
        path.write_bytes(b"")
    report = embed(toy_encoder, many, tmp_path / "out.parquet")
    assert report.quarantine == tmp_path / "out.parquet.quarantine.jsonl"
    assert [json.loads(line) for line in report.quarantine.read_text().splitlines()] == [
        {"source": str(path), "reason": f"{path}: not a readable picture (empty file)"} for path in bad
    ]
    for path in bad:
        draw(path)
    embed(toy_encoder, many, tmp_path / "out.parquet")
    assert not report.quarantine.exists(), "all is well now"


def test_vectors_samples_and_what_was_left_out(tmp_path, toy_encoder):
    samples = [
        Sample(str(draw(tmp_path / "a.png"))),
        Sample(str(tmp_path / "gone.png")),
        Sample(str(draw(tmp_path / "b.png", 1))),
    ]
    vectors, kept, (bad,) = embed_samples(toy_encoder, samples, "test")
    assert vectors.shape == (2, 16)
    assert (kept, bad.source) == ([samples[0], samples[2]], samples[1].source)
    vectors, kept, bad = embed_samples(toy_encoder, [], "test")
    assert (vectors.shape, kept, bad) == ((0, 16), [], [])


def test_junk_boxes_stay_out_of_a_gallery(tmp_path, toy_encoder, capsys):
    for i, name in enumerate(("-1_c1s1_000001_00.jpg", "0000_c1s1_000002_00.jpg", "0001_c2s1_000003_00.jpg")):
        draw(tmp_path / "pictures" / name, i)
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        report = add_pictures(gallery, open_source(tmp_path / "pictures").everything)
        assert len(report.ids) == len(gallery) == 2
        assert [item.identity for item in gallery.items()] == ["0000", "0001"]
    assert "2/2" in capsys.readouterr().err, "the bar says how far it is"


def test_the_quarantine_of_a_gallery_holds_all_that_is_not_in_it(tmp_path, toy_encoder):
    quarantine = tmp_path / "quarantine.jsonl"

    def add(folder):
        with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
            return add_pictures(gallery, open_source(tmp_path / folder).everything, quarantine)

    def listed():
        return [Path(json.loads(line)["source"]).name for line in quarantine.read_text().splitlines()]

    for name in ("one/a.png", "one/good.png", "two/b.png", "two/good.png"):
        draw(tmp_path / name)
    (tmp_path / "one" / "a.png").write_bytes(b"")
    (tmp_path / "two" / "b.png").write_bytes(b"")
    add("one")
    assert listed() == ["a.png"]
    add("two")
    assert listed() == ["a.png", "b.png"], "those of the first source stay"
    draw(tmp_path / "one" / "a.png")
    assert add("one").already_present == 1
    assert listed() == ["b.png"]
    (tmp_path / "two" / "b.png").unlink()
    add("two")
    assert listed() == ["b.png"], "nobody has tried it again"
    quarantine.write_text("a diary")
    with pytest.raises(SourceError, match="no list of pictures left out"):
        add("two")
    assert quarantine.read_text() == "a diary"
