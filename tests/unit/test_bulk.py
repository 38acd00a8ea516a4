"""Many pictures at once: into a gallery, a Parquet file, a re-ID report."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import serve.files
from serve.bulk import add_pictures, embed_samples, embed_to_parquet, evaluate_reid
from serve.contract import METADATA_KEY, Manifest
from serve.errors import SourceError
from serve.gallery import Gallery
from serve.metrics import evaluate_ranking
from serve.sources import Sample, open_source


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
    "vector": pa.list_(pa.float32(), 16),
}


def test_a_parquet_file_holds_all_that_is_known(tmp_path, toy_encoder):
    for i in range(3):
        draw(tmp_path / f"{i}.png", i)
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "list.csv").write_text(
        "path,label,identity,camera,time\n0.png,cat,7,1,2.5\nbroken.png,,,,\n1.png,,,,\n2.png,dog,,,2024-01-01\n"
    )
    out = tmp_path / "new" / "out.parquet"
    count, (bad,) = embed_to_parquet(toy_encoder, str(tmp_path / "list.csv"), out)
    assert (count, bad.source) == (3, str(tmp_path / "broken.png"))
    table = pq.read_table(out)
    assert {field.name: field.type for field in table.schema} == SCHEMA
    assert table["source"].to_pylist() == [str(tmp_path / f"{i}.png") for i in range(3)]
    assert table["label"].to_pylist() == ["cat", None, "dog"]
    assert (table["identity"].to_pylist(), table["camera"].to_pylist()) == (["7", None, None], ["1", None, None])
    assert table["time"].to_pylist() == [2.5, None, 1704067200.0]
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, toy_encoder.embed([tmp_path / f"{i}.png" for i in range(3)]), atol=1e-6)
    manifest = Manifest.parse(table.schema.metadata[METADATA_KEY.encode()], "the file")
    assert manifest == toy_encoder.manifest
    assert [path.name for path in out.parent.iterdir()] == ["out.parquet"]


def test_the_columns_have_the_same_types_where_nothing_is_known(tmp_path, toy_encoder):
    draw(tmp_path / "pictures" / "a.png")
    embed_to_parquet(toy_encoder, str(tmp_path / "pictures"), tmp_path / "out.parquet")
    assert {field.name: field.type for field in pq.read_schema(tmp_path / "out.parquet")} == SCHEMA


def test_pictures_of_more_than_one_batch_stay_in_order(tmp_path, toy_encoder):
    for i in range(300):
        draw(tmp_path / "pictures" / f"{i:03}.png", i)
    embed_to_parquet(toy_encoder, str(tmp_path / "pictures"), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert [Path(source).stem for source in table["source"].to_pylist()] == [f"{i:03}" for i in range(300)]
    one = toy_encoder.embed([tmp_path / "pictures" / "299.png"])[0]
    np.testing.assert_allclose(table["vector"][299].as_py(), one, atol=1e-6)


def test_where_no_picture_can_be_read_nothing_is_written(tmp_path, toy_encoder):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(SourceError, match=r"none of 1 pictures can be read; the first: .*a\.png"):
        embed_to_parquet(toy_encoder, str(tmp_path), tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_save_leaves_the_old_file(tmp_path, toy_encoder, monkeypatch):
    draw(tmp_path / "pictures" / "a.png")
    (tmp_path / "out.parquet").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serve.files, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        embed_to_parquet(toy_encoder, str(tmp_path / "pictures"), tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "pictures"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_a_name_that_is_not_utf8_is_left_out_of_parquet(tmp_path, toy_encoder):
    draw(tmp_path / "a.png")
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "a.png").read_bytes())
    count, (bad,) = embed_to_parquet(toy_encoder, str(tmp_path), tmp_path / "out.parquet")
    assert count == 1
    assert os.fsencode(bad.source) == odd
    assert "not UTF-8" in bad.reason
    assert pq.read_table(tmp_path / "out.parquet")["source"].to_pylist() == [str(tmp_path / "a.png")]


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


@pytest.fixture
def market(tmp_path):
    """A root in Market-1501's layout: 3 people, 3 cameras, junk and distractors."""
    root = tmp_path / "market"
    for person in range(3):
        for camera in range(1, 4):
            draw(root / "bounding_box_test" / f"000{person + 1}_c{camera}s1_00000{camera}_00.jpg", 10 * person + camera)
        draw(root / "query" / f"000{person + 1}_c1s1_000009_00.jpg", 100 + person)
    draw(root / "bounding_box_test" / "-1_c1s1_000001_00.jpg", 50)
    draw(root / "bounding_box_test" / "0000_c2s1_000001_00.jpg", 51)
    return root


def test_a_reid_report_is_the_protocol_over_the_sets_distances(market, toy_encoder):
    images = open_source(market)
    queries, gallery = (toy_encoder.embed([s.source for s in part]) for part in (images.query, images.gallery))
    wanted = evaluate_ranking(
        -(queries.astype(np.float64) @ gallery.T),
        [s.identity for s in images.query],
        [s.identity for s in images.gallery],
        [s.camera for s in images.query],
        [s.camera for s in images.gallery],
    )
    report = evaluate_reid(toy_encoder, str(market))
    assert report == {
        "rank1": pytest.approx(wanted.cmc[0]),
        "rank5": pytest.approx(wanted.cmc[4]),
        "rank10": pytest.approx(wanted.cmc[9]),
        "map_step": pytest.approx(wanted.map_step),
        "map_trapezoid": pytest.approx(wanted.map_trapezoid),
        "minp": pytest.approx(wanted.minp),
        "queries": 3,
        "without_match": 0,
        "gallery": 11,
        "unreadable": 0,
        "encoder_id": toy_encoder.encoder_id,
    }
    assert 0 < report["map_trapezoid"] <= report["map_step"] < 1


def test_a_reid_report_counts_what_it_could_not_read(market, toy_encoder):
    (market / "query" / "0002_c1s1_000009_00.jpg").write_text("no picture")
    (market / "bounding_box_test" / "0003_c3s1_000003_00.jpg").write_bytes(b"")
    report = evaluate_reid(toy_encoder, str(market))
    assert (report["queries"], report["gallery"], report["unreadable"]) == (2, 10, 2)


def test_what_is_no_reid_set(tmp_path, market, toy_encoder):
    draw(tmp_path / "pictures" / "a.png")
    with pytest.raises(SourceError, match="no re-ID set; wanted the folders query and bounding_box_test"):
        evaluate_reid(toy_encoder, str(tmp_path / "pictures"))
    for path in (market / "bounding_box_test").glob("000[123]*"):
        path.unlink()
    with pytest.raises(SourceError, match="none of 3 queries has a match"):
        evaluate_reid(toy_encoder, str(market))
