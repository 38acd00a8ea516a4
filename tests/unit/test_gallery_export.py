"""A gallery as a Parquet file, and back."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from serve.contract import METADATA_KEY, Manifest
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Sample
from serve.transfer.exporting import ENCODER_ID_KEY, export_gallery
from serve.transfer.importing import import_vectors
from tests.gallery_items import vectors_of

EXTRA = {
    "s1": {"blur": 0.25, "note": 'quote " and é', "box": [1, 2, 3], "seen": True},
    "s2": {"id": 7, "track": 5},
    "s3": {"nothing": None},
}
SAMPLES = [
    Sample("s0"),
    Sample("s1", label="cat", identity="007", camera="2", time=0.1 + 0.2),
    Sample("s2", label="", time=-1e300),
    Sample("s3", track="t1"),
    *(Sample(f"more/{i}", label=f"l{i % 3}", time=float(i)) for i in range(3000)),
]


@pytest.fixture
def gallery(gallery):
    gallery.add(SAMPLES, vectors_of(len(SAMPLES)), extra=EXTRA, batch_size=1000)
    gallery.remove([5, 3004])
    return gallery


def content(gallery):
    return [(item, gallery.vector(item.id).tobytes()) for item in gallery.items()]


def test_what_is_exported_is_imported_to_the_last_bit(gallery, tmp_path, toy_encoder):
    out = tmp_path / "all.parquet"
    assert export_gallery(gallery, out) == len(SAMPLES) - 2
    report = import_vectors(str(tmp_path / "copy"), out)
    assert (report.added, report.already_present, report.count) == (len(SAMPLES) - 2, 0, len(SAMPLES) - 2)
    with Gallery.open(tmp_path / "copy", toy_encoder) as copy:
        assert content(copy) == content(gallery)
        assert copy.verify() == []
        assert copy.manifest == gallery.manifest
    export_gallery(copy := Gallery.open(tmp_path / "copy"), tmp_path / "again.parquet")
    copy.close()
    assert (tmp_path / "again.parquet").read_bytes() == out.read_bytes()


def test_the_columns_are_those_of_embed_and_more(gallery, tmp_path, toy_encoder):
    export_gallery(gallery, tmp_path / "out.parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["source", "label", "identity", "camera", "track", "time", "vector", "id", "extra"]
    assert Manifest.parse(schema.metadata[METADATA_KEY.encode()], "it") == toy_encoder.manifest
    assert schema.metadata[ENCODER_ID_KEY.encode()].decode() == toy_encoder.encoder_id
    row = pq.read_table(tmp_path / "out.parquet").slice(1, 1).to_pylist()[0]
    assert (row["id"], row["identity"], row["time"], json.loads(row["extra"])) == (2, "007", 0.1 + 0.2, EXTRA["s1"])


def test_only_what_passes(gallery, tmp_path):
    assert export_gallery(gallery, tmp_path / "out.parquet", "label = l1 and time < 100") == 33
    assert set(pq.read_table(tmp_path / "out.parquet")["label"].to_pylist()) == {"l1"}
    assert export_gallery(gallery, tmp_path / "none.parquet", "label = nobody") == 0
    assert len(pq.read_table(tmp_path / "none.parquet")) == 0


def test_it_is_of_one_moment(gallery, tmp_path, monkeypatch):
    """A writer at work in the midst of it, as another process would be."""
    rows = Gallery.rows

    def disturbed(self, where):
        for number, block in enumerate(rows(self, where)):
            if number == 1:
                gallery.add([Sample("late")], vectors_of(1, seed=9))
                gallery.remove([3000])
                gallery.relabel([2999], label="late")
            yield block

    before = {item.id: item for item in gallery.items()}
    monkeypatch.setattr(Gallery, "rows", disturbed)
    export_gallery(gallery, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert dict(zip(table["id"], table["label"], strict=True)) == {i: item.label for i, item in before.items()}


def test_a_failure_leaves_the_file_that_was_there(gallery, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_text("precious")
    with pytest.raises(GalleryError, match="cammera"):
        export_gallery(gallery, out, "cammera = 1")
    assert out.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_ids_that_are_taken_are_refused_and_new_ones_given_on_request(gallery, tmp_path):
    out = tmp_path / "out.parquet"
    export_gallery(gallery, out, "label = cat")
    with Gallery.open(tmp_path / "other", gallery.encoder, create=True) as other:
        other.add([Sample("a"), Sample("b"), Sample("c")], vectors_of(3, seed=5))
        other.remove([2])
    for _ in range(2):
        with pytest.raises(GalleryError, match=r"id 2 has been used.*--new-ids"):
            import_vectors(str(tmp_path / "other"), out)
    import_vectors(str(tmp_path / "other"), out, new_ids=True)
    with Gallery.open(tmp_path / "other") as other:
        (item,) = other.items("label = cat")
        assert item == replace(gallery.item(2), id=4, extra={**EXTRA["s1"], "id": 2})
        assert np.array_equal(other.vector(4), gallery.vector(2))
