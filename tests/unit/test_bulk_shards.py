"""Shards: the plan, the part that comes of each, and how parts are joined."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from serve.engines.shards import PART_NAME, SHARD_SIZE, embed_shard, join_parts, plan_shards, read_outcome
from serve.errors import EncoderMismatch, SourceError
from serve.samples import Sample

SAMPLES = [Sample(f"/pictures/{i}.png", label=f"class {i % 3}", time=i / 2) for i in range(200)]


def names(shards):
    return [shard.part_name for shard in shards]


@pytest.mark.parametrize(("count", "size"), [(0, 64), (1, 64), (63, 64), (64, 64), (65, 64), (200, 64), (200, 1), (200, 1000)])
def test_the_plan_holds_every_picture_once_and_in_order(count, size):
    shards = plan_shards(SAMPLES[:count], "id", size)
    assert [sample for shard in shards for sample in shard.samples] == SAMPLES[:count]
    assert [len(shard.samples) for shard in shards] == [size] * (count // size) + [count % size] * (count % size > 0)
    assert len(set(names(shards))) == len(shards)
    assert names(shards) == sorted(names(shards)), "the order of the names is that of the pictures"
    assert all(PART_NAME.fullmatch(name) for name in names(shards))


def test_the_plan_is_the_same_in_every_process_and_version():
    assert plan_shards(SAMPLES, "id", 64) == plan_shards(tuple(SAMPLES), "id", 64)
    assert names(plan_shards(SAMPLES, "id", 128)) == [
        "part-000000-ade27dfb439448ad.parquet",
        "part-000001-40a70dd9b189b74b.parquet",
    ]
    assert SHARD_SIZE == 1024, "half-finished work of former versions would be done again"


@pytest.mark.parametrize("field", ["source", "label", "identity", "camera", "time"])
def test_whatever_a_row_says_is_in_the_name_of_its_part(field):
    changed = [*SAMPLES]
    changed[70] = dataclasses.replace(SAMPLES[70], **{field: 7.5 if field == "time" else "x"})
    before, after = names(plan_shards(SAMPLES, "id", 64)), names(plan_shards(changed, "id", 64))
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True]


def test_so_are_the_order_and_the_encoder():
    before = set(names(plan_shards(SAMPLES, "id", 64)))
    assert not before & set(names(plan_shards(SAMPLES, "other", 64)))
    assert not before & set(names(plan_shards(SAMPLES[::-1], "id", 64)))


def test_pictures_at_the_end_leave_full_shards_as_they_were():
    assert names(plan_shards(SAMPLES[:130], "id", 64))[:2] == names(plan_shards(SAMPLES, "id", 64))[:2]


@pytest.fixture
def shard(pictures, toy_encoder):
    samples = pictures(9)
    Path(samples[4].source).write_bytes(b"")
    return plan_shards(samples, toy_encoder.encoder_id, 9)[0]


def test_a_part_is_the_same_whenever_it_is_made(shard, toy_encoder, tmp_path):
    for folder in ("one", "two", "two"):
        embed_shard(shard, toy_encoder, tmp_path / folder)
    one, two = ((tmp_path / folder / shard.part_name).read_bytes() for folder in ("one", "two"))
    assert one == two
    assert [path.name for path in (tmp_path / "two").iterdir()] == [shard.part_name]


def test_a_part_says_what_it_holds_and_what_it_lacks(shard, toy_encoder, tmp_path):
    told = []
    embed_shard(shard, toy_encoder, tmp_path / "parts", told.append)
    assert sum(told) == 9
    rows, (bad,) = read_outcome(tmp_path / "parts" / shard.part_name)
    assert rows == 8
    assert (bad.source, bad.reason) == (shard.samples[4].source, f"{bad.source}: not a readable picture (empty file)")
    table = pq.read_table(tmp_path / "parts")
    assert table["source"].to_pylist() == [sample.source for sample in shard.samples if sample.source != bad.source]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_names_that_are_not_utf8_are_left_out(toy_encoder, tmp_path):
    shard = plan_shards([Sample(os.fsdecode(b"/pictures/caf\xe9.png"))], toy_encoder.encoder_id)[0]
    embed_shard(shard, toy_encoder, tmp_path)
    rows, (bad,) = read_outcome(tmp_path / shard.part_name)
    assert rows == 0
    assert (bad.source, "not UTF-8" in bad.reason) == ("/pictures/caf\\udce9.png", True)


def test_another_encoder_writes_nothing(shard, other_encoder, tmp_path):
    with pytest.raises(EncoderMismatch, match=f"planned for encoder {shard.encoder_id}, got {other_encoder.encoder_id}"):
        embed_shard(shard, other_encoder, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_flipped_bit_in_a_value_is_noticed(shard, toy_encoder, tmp_path):
    embed_shard(shard, toy_encoder, tmp_path)
    part, joined = tmp_path / shard.part_name, tmp_path / "out.parquet"
    join_parts([part], joined, toy_encoder.manifest, tmp_path)
    whole, wanted = part.read_bytes(), joined.read_bytes()
    footer_bytes = int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(4, len(whole) - 8 - footer_bytes, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        part.write_bytes(damaged)
        try:
            join_parts([part], joined, toy_encoder.manifest, tmp_path)
        except SourceError as error:
            refused += bool(re.search(r"part-.*: damaged \(.*\); remove it and repeat the command", str(error)))
        assert joined.read_bytes() == wanted, "a bit that means nothing, such as one of a page's statistics"
    assert refused > 0.1 * (len(whole) - footer_bytes)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all"])
def test_a_part_that_is_none_is_noticed(tmp_path, content):
    (tmp_path / "part").write_bytes(content)
    with pytest.raises(SourceError, match="part: damaged"):
        read_outcome(tmp_path / "part")
