"""`simclr reid evaluate` on miniatures of every layout, plain folders, lists, and vectors in place of pictures."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve.bulk import embed_to_parquet
from serve.engines.local import embed_here
from serve.engines.shards import plan_shards
from serve.errors import EncoderMismatch, SourceError
from serve.protocols.known import PROTOCOLS, default_name, roles
from serve.protocols.report import lines
from serve.protocols.run import Options, evaluate_files, evaluate_pictures
from serve.protocols.vectors import has_vectors, read_vectors
from serve.samples import ImageSet, Sample
from serve.sources import open_source
from tests import reid_sets
from tests.drawn_sources import fill
from tests.reid_sets import text

PLAIN = Options()


@pytest.mark.parametrize("name", ["market", "duke", "msmt17", "cuhk03", "veri", "mars", "sysu30k"])
def test_one_command_for_every_layout(tmp_path, toy_encoder, name):
    root = getattr(reid_sets, name)(tmp_path)
    told = evaluate_pictures(toy_encoder, str(root), PLAIN).figures()
    assert (told["protocol"], told["asked_protocol"], told["unreadable"]) == (name, name, 0)
    assert 0 < told["map_trapezoid"] <= told["map_step"] <= 1
    assert told["data"].startswith("not the published")
    assert json.loads(json.dumps(told)) == told
    assert list(lines(told))


def test_vehicleid_as_one_command(tmp_path, toy_encoder):
    told = evaluate_pictures(toy_encoder, str(reid_sets.vehicleid(tmp_path)), PLAIN).figures()
    assert (told["protocol"], told["draws"], told["gallery"], told["queries"]) == ("vehicleid", 10, 2, 3)


def test_cuhk03_classic_as_one_command(tmp_path, toy_encoder):
    fill(tmp_path / "images_detected", *reid_sets.CUHK03)
    told = evaluate_pictures(toy_encoder, str(tmp_path), PLAIN).figures()
    assert (told["protocol"], told["draws"], told["rank5"]) == ("cuhk03-classic", 20, 1)


def test_sysu30k_stands_beside_what_is_published(tmp_path, toy_encoder):
    told = evaluate_pictures(toy_encoder, str(reid_sets.sysu30k(tmp_path)), PLAIN).figures()
    simclr = told["published_rank1"]["SimCLR"]
    assert simclr["percent"] == 10.9
    assert simclr["difference"] == pytest.approx(100 * told["rank1"] - 10.9)
    assert told["flip"] == "sysu-official"
    assert any("published rank-1, SimCLR: 10.9 %" in line for line in lines(told))


def test_counts_that_differ_are_fatal_only_if_asked(tmp_path, toy_encoder):
    root = reid_sets.market(tmp_path)
    with pytest.raises(SourceError, match=r"not the published Market-1501: .*query 1 \(published 3,368\).*--strict"):
        evaluate_pictures(toy_encoder, str(root), Options(strict=True))


def test_plain_folders_and_lists(tmp_path, toy_encoder):
    fill(tmp_path / "folders", "ann/cam1/1.png", "ann/cam2/2.png", "bob/cam1/3.png", "bob/cam2/4.png")
    assert evaluate_pictures(toy_encoder, str(tmp_path / "folders"), PLAIN).figures()["protocol"] == "cross-camera"
    fill(tmp_path / "plain", "ann/1.png", "ann/2.png", "bob/3.png", "bob/4.png")
    told = evaluate_pictures(toy_encoder, str(tmp_path / "plain"), PLAIN).figures()
    assert (told["protocol"], told["queries"], told["note"]) == ("single-camera", 4, None)
    fill(tmp_path / "flat", "1.png", "2.png")
    with pytest.raises(SourceError, match="no re-ID set; wanted a known data set"):
        evaluate_pictures(toy_encoder, str(tmp_path / "flat"), PLAIN)


def test_nobody_asks_for_distractors(tmp_path):
    names = [f"{person}_c{camera}s1_000001_00.jpg" for person in ("0001", "0000", "-1") for camera in (1, 2)]
    who = roles(PROTOCOLS["cross-camera"], open_source(fill(tmp_path, *names)))
    assert [sample.identity for sample in who.queries] == ["0001", "0001"]
    assert [sample.identity for sample in who.gallery] == ["0000", "0000", "0001", "0001"]


def test_the_default_is_the_layouts_or_what_the_cameras_allow():
    assert default_name(ImageSet(layout="mars")) == "mars"
    assert default_name(ImageSet(train=(Sample("a", camera="1"), Sample("b", camera="2")))) == "cross-camera"
    assert default_name(ImageSet(train=(Sample("a", camera="1"), Sample("b", camera="1")))) == "single-camera"


def test_unreadable_pictures_are_counted(tmp_path, toy_encoder):
    root = fill(reid_sets.market(tmp_path), "query/0001_c3s1_000001_00.jpg", "bounding_box_test/0001_c4s1_000001_00.jpg")
    (root / "query/0001_c3s1_000001_00.jpg").write_text("no picture")
    (root / "bounding_box_test/0001_c4s1_000001_00.jpg").write_bytes(b"")
    for parts in (None, tmp_path / "parts"):
        told = evaluate_pictures(toy_encoder, str(root), Options(parts=parts)).figures()
        assert (told["queries"], told["gallery"], told["unreadable"]) == (1, 2, 2)
    (root / "query/0001_c1s1_001051_00.jpg").write_text("no picture")
    for parts in (None, tmp_path / "others"):
        with pytest.raises(SourceError, match=r"none of 2 pictures can be read; the first: .*0001_c1s1_001051_00\.jpg"):
            evaluate_pictures(toy_encoder, str(root), Options(parts=parts))


def test_a_run_that_broke_goes_on_and_a_repeated_one_embeds_nothing(tmp_path, toy_encoder, monkeypatch):
    root = fill(reid_sets.market(tmp_path / "set"), *(f"bounding_box_test/0001_c3s1_00{i:04}_00.jpg" for i in range(9)))
    monkeypatch.setattr("serve.protocols.vectors.plan_shards", lambda samples, id_: plan_shards(samples, id_, 4))
    options = Options(parts=tmp_path / "parts", flip="sum")
    seen = []
    embed = type(toy_encoder).embed

    def counting(self, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(type(toy_encoder), "embed", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pictures(toy_encoder, str(root), options)
    monkeypatch.setattr(type(toy_encoder), "embed", lambda self, images: seen.append(len(images)) or embed(self, images))
    told = evaluate_pictures(toy_encoder, str(root), options).figures()
    assert sum(seen) == 2 * (1 + 2 + 9)  # each picture and its mirror image once
    assert evaluate_pictures(toy_encoder, str(root), options).figures() == told
    assert sum(seen) == 2 * (1 + 2 + 9)
    monkeypatch.setattr(type(toy_encoder), "embed", embed)
    assert evaluate_pictures(toy_encoder, str(root), Options(flip="sum")).figures() == told


def embedded(encoder, source, out):
    embed_to_parquet(encoder.manifest, str(source), str(out), lambda *work: embed_here(*work, encoder=encoder, workers=1))
    return str(out)


def test_vectors_of_simclr_embed_in_place_of_pictures(tmp_path, toy_encoder, other_encoder):
    root = reid_sets.market(tmp_path / "set")
    fill(root, "query/0001_c3s1_000001_00.jpg")
    query = embedded(toy_encoder, root / "query", tmp_path / "q.parquet")
    gallery = embedded(toy_encoder, root / "bounding_box_test", tmp_path / "g.parquet")
    wanted = evaluate_pictures(toy_encoder, str(root), PLAIN).figures()
    market = Options(protocol="market")
    found = evaluate_files(query, gallery, None, market).figures()
    assert found == {**wanted, "data": None}
    mixed = evaluate_files(query, str(root / "bounding_box_test"), toy_encoder, market).figures()
    assert mixed == found
    other = embedded(other_encoder, root / "bounding_box_test", tmp_path / "o.parquet")
    with pytest.raises(EncoderMismatch, match="embed both with one"):
        evaluate_files(query, other, None, market)
    with pytest.raises(SourceError, match="holds pictures; give --encoder"):
        evaluate_files(query, str(root / "bounding_box_test"), None, market)
    with pytest.raises(SourceError, match="cannot be mirrored"):
        evaluate_files(query, gallery, None, Options(flip="sum"))
    with pytest.raises(SourceError, match="draws queries and gallery itself"):
        evaluate_files(query, gallery, None, Options(protocol="vehicleid"))


def test_vectors_made_elsewhere_need_no_source(tmp_path):
    table = {"identity": [7, 8], "camera": [1, 1], "vector": [[1.0, 0.0], [0.0, 1.0]]}
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    vectors = read_vectors(tmp_path / "v.parquet")
    assert [(s.identity, s.camera) for s in vectors.samples] == [("7", "1"), ("8", "1")]
    assert vectors.samples[1].source == "v.parquet#1"
    assert (vectors.values.tolist(), vectors.encoder_id) == ([[1, 0], [0, 1]], "")


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        ({"vector": [[1.0], [1.0, 2.0]]}, "row 1 has a vector of 2, wanted one of 1"),
        ({"vector": ["a", "b"]}, "wanted one of lists of floats"),
        ({"vector": [[1.0], None]}, "row 1 has no vector"),
    ],
)
def test_parquet_files_without_usable_vectors(tmp_path, column, complaint):
    pq.write_table(pa.table({"identity": ["a", "b"], **column}), tmp_path / "v.parquet")
    with pytest.raises(SourceError, match=complaint):
        read_vectors(tmp_path / "v.parquet")


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "v.parquet").write_text("nothing")
    for read in (read_vectors, lambda path: has_vectors(str(path))):
        with pytest.raises(SourceError, match="Parquet"):
            read(tmp_path / "v.parquet")


def test_flips_of_pictures_are_the_sum_of_both_views(tmp_path, toy_encoder, caplog):
    root = reid_sets.market(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = {
            flip: evaluate_pictures(toy_encoder, str(root), Options(flip=flip)) for flip in ("none", "sum", "sysu-official")
        }
    assert found["sum"].figures()["map_step"] == found["sysu-official"].figures()["map_step"]
    assert "this encoder gives unit vectors, of which sysu-official is sum" in caplog.text
    assert {flip: outcome.figures()["flip"] for flip, outcome in found.items()} == {flip: flip for flip in found}


def test_a_list_with_tracks_is_scored_by_track(tmp_path, toy_encoder):
    fill(tmp_path, *(f"{i}.png" for i in range(6)))
    rows = [f"{i}.png,{'ab'[i // 3]},{1 + (i % 3 > 1)},t{i // 2}" for i in range(6)]
    text(tmp_path / "list.csv", "path,identity,camera,track", *rows)
    told = evaluate_pictures(toy_encoder, str(tmp_path / "list.csv"), Options(protocol="mars")).figures()
    assert told["queries"] == 5  # a track of one name is another one for another identity or camera
