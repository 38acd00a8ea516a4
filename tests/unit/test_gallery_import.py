"""Vectors from elsewhere: every kind of file, what is known about them, and what is refused."""

import csv
import json
import os
import subprocess

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import serve.transfer.importing
from serve.bulk import embed_to_parquet
from serve.engines.local import embed_here
from serve.errors import EncoderMismatch, GalleryError, SourceError
from serve.gallery import Gallery
from serve.transfer import faiss_file
from serve.transfer.declared import Declared, foreign_manifest
from serve.transfer.importing import import_vectors
from serve.transfer.item_list import ItemList
from tests.gallery_items import vectors_of

DIM = 16


def unit(rows):
    """In the obvious way, one by one."""
    return np.stack([np.asarray(row, np.float64) / np.sqrt(sum(float(x) ** 2 for x in row)) for row in rows])


def saved(path, array):
    np.save(path, array)
    return path


def stored(uri):
    """source -> item, vector."""
    with Gallery.open(uri) as gallery:
        assert gallery.verify() == []
        return {item.source: (item, gallery.vector(item.id)) for item in gallery.items()}


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "gallery")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(uri, tmp_path, kind, order):
    rows = np.asarray(vectors_of(5000), kind, order=order)
    report = import_vectors(uri, saved(tmp_path / "v.npy", rows), name="mine")
    assert (report.added, report.already_present, report.count) == (5000, 0, 5000)
    found = stored(uri)
    assert list(found) == [f"v.npy#{i}" for i in range(5000)]
    np.testing.assert_allclose(np.stack([vector for _, vector in found.values()]), unit(rows), atol=1e-6)


def test_searched_by_vector_and_by_item_and_not_by_picture(uri, tmp_path, pictures):
    import_vectors(uri, saved(tmp_path / "v.npy", vectors_of(20)), name="mine")
    with Gallery.open(uri) as gallery:
        assert [hit.id for hit in gallery.search(vectors_of(20)[7], 1)] == [8]
        assert gallery.search(gallery.vector(3), 1)[0].id == 3
        assert gallery.info().encoder_name == "foreign vectors: mine"
    with Gallery.open(uri, Declared(foreign_manifest("mine", DIM))) as gallery, pytest.raises(GalleryError, match="no encoder"):
        gallery.search(pictures(1)[0].source)


def test_vectors_of_different_makers_are_not_mixed(uri, tmp_path, toy_encoder):
    file = saved(tmp_path / "v.npy", vectors_of(3))
    import_vectors(uri, file, name="mine")
    for other in ({"name": "yours"}, {"encoder": toy_encoder}):
        with pytest.raises(EncoderMismatch, match="foreign vectors: mine"):
            import_vectors(uri, file, **other)
    with pytest.raises(EncoderMismatch):
        Gallery.open(uri, toy_encoder)
    with pytest.raises(EncoderMismatch, match="16"):
        import_vectors(uri, saved(tmp_path / "w.npy", vectors_of(3, dim=8)), encoder=toy_encoder)
    assert foreign_manifest("mine", 8).encoder_id != foreign_manifest("mine", 16).encoder_id


def test_whose_vectors_they_are_must_be_said_once(uri, tmp_path, toy_encoder):
    file = saved(tmp_path / "v.npy", vectors_of(3))
    with pytest.raises(GalleryError, match="--encoder ENC, or --name"):
        import_vectors(uri, file)
    with pytest.raises(GalleryError, match="not both"):
        import_vectors(uri, file, encoder=toy_encoder, name="mine")


def test_declared_to_be_an_encoders(uri, tmp_path, toy_encoder, pictures):
    samples = pictures(6)
    vectors = toy_encoder.embed([sample.source for sample in samples])
    items = tmp_path / "ids.txt"
    items.write_text("".join(f"{sample.source}\n" for sample in samples))
    import_vectors(uri, saved(tmp_path / "v.npy", vectors), items=items, encoder=toy_encoder, spec="/models")
    with Gallery.open(uri, toy_encoder) as gallery:
        assert gallery.search(samples[4].source, 1)[0].source == samples[4].source
        assert gallery.encoder_spec == "/models"


def test_what_embed_wrote_needs_no_saying(uri, tmp_path, toy_encoder, pictures):
    samples = pictures(5)
    for out in ("one.parquet", "parts/"):
        embed_to_parquet(
            toy_encoder.manifest,
            str(tmp_path / "pictures"),
            str(tmp_path / out) + "/" * out.endswith("/"),
            lambda shards, folder, tell: embed_here(shards, folder, tell, encoder=toy_encoder, workers=1),
            shard_size=2,
        )
        report = import_vectors(uri, tmp_path / out)
    assert (report.added, report.already_present) == (0, 5)
    with Gallery.open(uri, toy_encoder) as gallery:
        hit = gallery.search(samples[3].source, 1)[0]
        assert (hit.source, hit.score) == (samples[3].source, pytest.approx(1, abs=1e-6))
        np.testing.assert_allclose(gallery.vector(hit.id), toy_encoder.embed([samples[3].source])[0], atol=1e-6)


def test_the_files_own_word_comes_first(uri, tmp_path, toy_encoder, other_encoder):
    table = pa.table({"vector": vectors_of(2).tolist()}).replace_schema_metadata(
        {"simclr_manifest": toy_encoder.manifest.model_dump_json()}
    )
    pq.write_table(table, tmp_path / "v.parquet")
    for wrong in ({"name": "mine"}, {"encoder": other_encoder}):
        with pytest.raises(EncoderMismatch, match=toy_encoder.encoder_id):
            import_vectors(uri, tmp_path / "v.parquet", **wrong)
    assert import_vectors(uri, tmp_path / "v.parquet", encoder=toy_encoder).added == 2


LISTS = [
    ("vector", pa.list_(pa.float32()), "source"),
    ("embedding", pa.list_(pa.float32(), DIM), "image_path"),
    ("clip", pa.large_list(pa.float64()), "url"),
    ("half", pa.list_(pa.float16()), "filepath"),
]


@pytest.mark.parametrize(("column", "kind", "source"), LISTS)
def test_parquet_of_others(uri, tmp_path, column, kind, source):
    rows = vectors_of(3000).astype(np.float16)
    number = kind.value_type.to_pandas_dtype()
    table = pa.table(
        {
            source: [f"s3://bucket/{i}" for i in range(3000)],
            column: pa.array(list(rows.astype(number)), kind),
            "caption": [None if i % 2 else f"a {i}" for i in range(3000)],
            "width": pa.array(range(3000), pa.int32()),
            "nsfw": pa.array([float("nan"), *[0.5] * 2999]),
            "label": pa.array(["x", "y", None] * 1000).dictionary_encode(),
            "__index_level_0__": range(3000),
        }
    )
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=700)
    import_vectors(uri, tmp_path / "v.parquet", name="clip")
    found = stored(uri)
    np.testing.assert_allclose(np.stack([vector for _, vector in found.values()]), unit(rows), atol=1e-6)
    item = found["s3://bucket/0"][0]
    assert (item.label, item.extra) == ("x", {"caption": "a 0", "width": 0})
    assert found["s3://bucket/2"][0].extra == {"caption": "a 2", "width": 2, "nsfw": 0.5}


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]}, "a and b are columns of vectors"),
        ({"a": [1.0]}, "no column of vectors"),
        ({"vector": [[1, 2]]}, "no column of vectors"),
        ({"vector": [[1, 2]], "box": [[1.0, 2.0]]}, "no column of vectors"),
        ({"vector": [[1.0, 2.0], [1.0]]}, "row 1 has a vector of 1, wanted one of 2"),
        ({"vector": [[1.0, 2.0], None]}, "row 1 has no vector"),
        ({"vector": [[1.0, 2.0], [1.0, None]]}, "row 1 is zero, infinite or not a number"),
        ({"vector": [[1.0, 2.0]], "path": [None]}, "row 0 has no path"),
        ({"vector": [[1.0, 2.0]], "camera": [1.0]}, "camera is double"),
        ({"vector": [[1.0, 2.0]], "time": ["noon"]}, "time is 'noon'"),
        ({"vector": [[1.0, 2.0]], "extra": ["[1"]}, "wanted a JSON object"),
        ({"vector": [[1.0, 2.0]], "raw": [b"x"]}, "cannot be stored"),
    ],
)
def test_parquet_that_is_refused(uri, tmp_path, columns, complaint):
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    with pytest.raises((SourceError, GalleryError), match=complaint) as caught:
        import_vectors(uri, tmp_path / "v.parquet", name="mine")
    assert "\n" not in str(caught.value)


def written_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_items_of_a_csv(uri, tmp_path):
    rows = [
        {"path": "a.jpg", "label": "cat", "identity": "007", "camera": 2, "time": "2024-01-31", "blur": 0.5, "code": "007"},
        {"path": "b\nc.jpg", "label": "", "identity": "", "camera": "", "time": "", "blur": "", "code": "[1, true]"},
        {"path": "é.jpg", "label": "1", "identity": "1.0", "camera": "x", "time": "7.5", "blur": "NaN", "code": "no code"},
    ]
    items = written_csv(tmp_path / "items.csv", rows)
    import_vectors(uri, saved(tmp_path / "v.npy", vectors_of(3)), items=items, name="mine")
    a, b, c = (item for item, _ in stored(uri).values())
    assert (a.source, a.label, a.identity, a.camera, a.time) == (str(tmp_path / "a.jpg"), "cat", "007", "2", 1706659200.0)
    assert (b.source, b.label, b.time, b.extra) == (str(tmp_path / "b\nc.jpg"), None, None, {"code": [1, True]})
    assert (a.extra, c.extra) == ({"blur": 0.5, "code": "007"}, {"blur": "NaN", "code": "no code"})
    assert (c.identity, c.time) == ("1.0", 7.5)


def test_items_of_a_parquet_and_a_number_too_few(uri, tmp_path):
    table = pa.table({"source": ["a", "b"], "size": [1, 2], "extra": ['{"deep": {"er": 1}}', None]})
    pq.write_table(table, tmp_path / "items.parquet")
    import_vectors(uri, saved(tmp_path / "v.npy", vectors_of(2)), items=tmp_path / "items.parquet", name="mine")
    assert [item.extra for item, _ in stored(uri).values()] == [{"size": 1, "deep": {"er": 1}}, {"size": 2}]
    with pytest.raises(SourceError, match="2 rows for 3 vectors"):
        import_vectors(uri, saved(tmp_path / "v.npy", vectors_of(3)), items=tmp_path / "items.parquet", name="mine")


def test_items_that_are_ids_alone(uri, tmp_path):
    file = saved(tmp_path / "v.npy", vectors_of(3))
    import_vectors(uri, file, items=saved(tmp_path / "ids.npy", np.array([30, 10, 20])), name="mine")
    import_vectors(uri, file, items=saved(tmp_path / "names.npy", np.array(["x", "y", "z"])), name="mine")
    found = stored(uri)
    assert list(found) == ["v.npy#30", "v.npy#10", "v.npy#20", "x", "y", "z"]
    assert [item.extra for item, _ in found.values()][:4] == [{"id": 30}, {"id": 10}, {"id": 20}, {}]
    for wrong in (np.array([1.5]), np.array([{}], object)):
        with pytest.raises(SourceError, match=r"ids\.npy"):
            ItemList.read(saved(tmp_path / "ids.npy", wrong))


@pytest.mark.parametrize("name", ["x.json", "missing.csv", "empty.csv", "ragged.csv", "latin.txt"])
def test_lists_that_are_refused(tmp_path, name):
    contents = {"empty.csv": b"", "ragged.csv": b"path,label\na\n", "latin.txt": b"\xff\xfe\xe9", "x.json": b"{}"}
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(SourceError, match=name) as caught:
        ItemList.read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_row_without_a_direction_is_named_by_its_number(uri, tmp_path, bad):
    rows = vectors_of(5000)
    rows[4321] = bad
    with pytest.raises(GalleryError, match="row 4321 is zero, infinite or not a number"):
        import_vectors(uri, saved(tmp_path / "v.npy", rows), name="mine")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x93NUMPY\x01\x00", b"PAR1 and no more", b"IxPq" + bytes(100), b"IxFI\x00\x00"]
)
def test_files_that_are_none(uri, tmp_path, content):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        import_vectors(uri, tmp_path / "v", name="mine")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gallery").exists()


def test_nothing_is_unpickled_and_shapes_are_checked(uri, tmp_path):
    for array in (np.array([[{}]], object), np.zeros((3,), np.float32), np.zeros((0, 4), np.float32), np.ones((2, 2), int)):
        with pytest.raises(SourceError, match=r"v\.npy"):
            import_vectors(uri, saved(tmp_path / "v.npy", array), name="mine")
    whole = saved(tmp_path / "v.npy", vectors_of(100)).read_bytes()
    (tmp_path / "v.npy").write_bytes(whole[:-1])
    with pytest.raises(SourceError, match=r"v\.npy"):
        import_vectors(uri, tmp_path / "v.npy", name="mine")


def test_it_goes_on_where_it_was_broken_off(uri, tmp_path, monkeypatch):
    file, blocks = saved(tmp_path / "v.npy", vectors_of(9000)), []
    described = serve.transfer.importing._described

    def stops(*arguments):
        blocks.append(1)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return described(*arguments)

    monkeypatch.setattr(serve.transfer.importing, "_described", stops)
    with pytest.raises(KeyboardInterrupt):
        import_vectors(uri, file, name="mine")
    with Gallery.open(uri) as gallery:
        assert 0 < len(gallery) < 9000
    report = import_vectors(uri, file, name="mine")
    assert (report.added + report.already_present, report.count) == (9000, 9000)
    import_vectors(str(tmp_path / "whole"), file, name="mine")
    assert [(i, v.tobytes()) for i, v in stored(uri).values()] == [
        (i, v.tobytes()) for i, v in stored(tmp_path / "whole").values()
    ]


def test_a_source_is_there_once(uri, tmp_path):
    items = written_csv(tmp_path / "items.csv", [{"source": s, "n": n} for n, s in enumerate("abab")])
    report = import_vectors(uri, saved(tmp_path / "v.npy", vectors_of(4)), items=items, name="mine")
    assert (report.added, report.already_present) == (2, 2)
    found = stored(uri)
    assert {source: item.extra for source, (item, _) in found.items()} == {"a": {"n": 0}, "b": {"n": 1}}
    np.testing.assert_allclose(found["b"][1], unit(vectors_of(4))[1], atol=1e-6)


def index_of(kind, rows, ids):
    if kind.startswith("IDMap"):
        inner = {
            "Flat": faiss.IndexFlatL2(DIM),
            "HNSW": faiss.IndexHNSWFlat(DIM, 8),
            "IVF": faiss.index_factory(DIM, "IVF4,Flat"),
        }
        index = (faiss.IndexIDMap2 if "2" in kind else faiss.IndexIDMap)(inner[kind.split(",")[1]])
    else:
        index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    if kind.startswith("ID") or (kind.startswith("IVF") and ids is not None):
        index.add_with_ids(rows, ids)
    else:
        index.add(rows)
    return index


@pytest.mark.parametrize("kind", ["Flat", "HNSW8", "IVF4,Flat", "IDMap,Flat", "IDMap2,Flat", "IDMap,HNSW", "IDMap2,IVF"])
def test_faiss(uri, tmp_path, kind):
    rows, ids = vectors_of(3000), np.random.default_rng(1).permutation(10_000)[:3000].astype(np.int64)
    faiss.write_index(index_of(kind, rows, ids), str(tmp_path / "old.index"))
    import_vectors(uri, tmp_path / "old.index", name="mine")
    wanted = {int(i): row for i, row in zip(ids if kind[0] == "I" else range(3000), unit(rows), strict=True)}
    found = stored(uri)
    assert {item.extra["id"] for item, _ in found.values()} == wanted.keys()
    for source, (item, vector) in found.items():
        assert source == f"old.index#{item.extra['id']}"
        np.testing.assert_allclose(vector, wanted[item.extra["id"]], atol=1e-6)


def test_faiss_with_a_list_by_id_or_by_row(uri, tmp_path):
    rows, ids = vectors_of(500), np.random.default_rng(1).permutation(1000)[:500].astype(np.int64)
    faiss.write_index(index_of("IVF4,Flat", rows, ids), str(tmp_path / "old.index"))
    items = written_csv(tmp_path / "items.csv", [{"source": f"p{i}", "id": i, "label": i % 7} for i in range(999, -1, -1)])
    import_vectors(uri, tmp_path / "old.index", items=items, name="mine")
    found = stored(uri)
    for i, row in zip(ids, unit(rows), strict=True):
        item, vector = found[f"p{i}"]
        assert (item.label, item.extra) == (str(i % 7), {"id": i})
        np.testing.assert_allclose(vector, row, atol=1e-6)
    by_row = written_csv(tmp_path / "rows.csv", [{"source": f"q{i}"} for i in range(1000)])
    import_vectors(uri, tmp_path / "old.index", items=by_row, name="mine")
    np.testing.assert_allclose(stored(uri)[f"q{ids[3]}"][1], unit(rows)[3], atol=1e-6)
    short = written_csv(tmp_path / "short.csv", [{"source": f"r{i}", "id": i} for i in range(10)])
    (none := tmp_path / "none.csv").write_text("source,id\n")
    for items in (short, none):
        with pytest.raises(SourceError, match="says nothing of id"):
            import_vectors(uri, tmp_path / "old.index", items=items, name="mine")


CODES = ["PQ4x4", "SQ8", "SQfp16", "IVF4,PQ4x4", "IVF4,SQ8", "LSH", "IDMap,SQ8", "HNSW8,SQ8", "PCA8,Flat"]


@pytest.mark.parametrize("kind", CODES)
def test_faiss_of_approximations_is_refused(uri, tmp_path, kind):
    index = faiss.index_factory(DIM, kind)
    index.train(vectors_of(1000))
    (index.add_with_ids(vectors_of(10), np.arange(10)) if "IDMap" in kind else index.add(vectors_of(10)))
    faiss.write_index(index, str(tmp_path / "old.index"))
    with pytest.raises(SourceError, match=r"approximations|none of FAISS's IndexFlat"):
        import_vectors(uri, tmp_path / "old.index", name="mine")


@pytest.mark.parametrize("kind", ["Flat", "HNSW8", "IVF4,Flat", "IDMap,Flat"])
def test_a_damaged_index_ends_its_reader_and_nothing_else(uri, tmp_path, kind):
    rows = vectors_of(40)
    faiss.write_index(index_of(kind, rows, np.arange(40)), str(tmp_path / "good.index"))
    good, rng = (tmp_path / "good.index").read_bytes(), np.random.default_rng(0)
    cases = [good[: len(good) // 2]]
    for _ in range(3):
        bad = bytearray(good)
        bad[4:12] = rng.bytes(8)  # the dimension and part of the count
        bad[rng.integers(12, 60)] ^= 0x40
        cases.append(bytes(bad))
    for number, content in enumerate(cases):
        (tmp_path / "bad.index").write_bytes(content)
        with pytest.raises((SourceError, GalleryError)) as caught:
            import_vectors(f"{uri}{number}", tmp_path / "bad.index", name="mine")
        assert "\n" not in str(caught.value)


def test_the_reader_can_neither_write_nor_grow(tmp_path):
    """What a file that takes the reader over could do there."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import faiss_reader\n"
        "faiss_reader.give_up_rights(1000)\n"
        "try:\n    bytearray(8 << 30)\nexcept MemoryError:\n    print('cannot grow', flush=True)\n"
        "open(sys.argv[2], 'wb', 0).write(b'x')\n"
    )
    command = [faiss_file.sys.executable, "-c", program, str(faiss_file._READER.parent), str(tmp_path / "written")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "cannot grow\n"
    assert done.returncode != 0
    assert (tmp_path / "written").stat().st_size == 0


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        ("raise SystemExit(3)", "ended with 3"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ('print(\'{"count": 1000000, "dim": 16}\')', "its size denies"),
        ('print(\'{"count": -1, "dim": 16}\')', "its size denies"),
        ('print(\'{"count": 2, "dim": 16}\')', "ended with 0"),
        ('import os; os.write(1, b\'{"count": 2, "dim": 16}\\n\' + b"\\xff" * 99)', "cannot be read"),
    ],
)
def test_what_the_reader_sends_is_not_trusted(uri, tmp_path, monkeypatch, says, complaint):
    faiss.write_index(index_of("Flat", vectors_of(40), None), str(tmp_path / "old.index"))
    (tmp_path / "reader.py").write_text(says)
    monkeypatch.setattr(faiss_file, "_READER", tmp_path / "reader.py")
    with pytest.raises(SourceError, match=complaint):
        import_vectors(uri, tmp_path / "old.index", name="mine")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 160 MB, mostly a hole, in a process that may take no more than is usual."""
    count, dim = 40_000, 1024
    header = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float32, (count, dim))
    header[:, 0] = 1
    del header
    program = (
        "import sys, resource; from pathlib import Path\n"
        "from serve.transfer.vector_file import open_vectors\n"
        "from serve.index import unit_vectors\n"
        "def peak():\n    return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0])\n"
        "before = peak()\n"
        "for block in open_vectors(Path(sys.argv[1])).blocks():\n    unit_vectors(block.vectors, 1024)\n"
        "print(peak() - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    command = [faiss_file.sys.executable, "-c", program, str(tmp_path / "v.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 60_000  # KiB


def test_json_in_a_csv_is_json_only_if_it_is(uri, tmp_path):
    cells = ["7", "7.5", "true", "null", '"7"', "007", "1e400", "Infinity", "[" * 2000, "{}", " x "]
    items = written_csv(tmp_path / "items.csv", [{"source": str(n), "v": cell} for n, cell in enumerate(cells)])
    import_vectors(uri, saved(tmp_path / "v.npy", vectors_of(len(cells))), items=items, name="mine")
    found = [item.extra.get("v", "absent") for item, _ in stored(uri).values()]
    assert found == [7, 7.5, True, None, "7", "007", "1e400", "Infinity", "[" * 2000, {}, " x "]
    assert json.dumps(found)
