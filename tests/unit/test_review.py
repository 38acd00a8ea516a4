"""What a person should review: both lists against slow twins, for galleries in folders and in Milvus."""

import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.identity import confusable
from serve.identity.confusable import confusable_pairs
from serve.identity.enrolled import Enrolled, evenly
from serve.identity.hardest import Hardest, hardest_queries
from serve.identity.review import review_lines
from serve.neighbours import rounding
from serve.reid import rank
from serve.samples import Sample
from tests.gallery_items import vectors_of


@pytest.fixture
def either(address, toy_encoder):
    """A gallery in a folder, then one in Milvus."""
    with Gallery.open(address, toy_encoder, create=True) as gallery:
        yield gallery


def add(gallery, identities, cameras, vectors):
    start = len(gallery)
    samples = [
        Sample(f"{start + i}.jpg", identity=identity, camera=camera)
        for i, (identity, camera) in enumerate(zip(identities, cameras, strict=True))
    ]
    gallery.add(samples, np.asarray(vectors, np.float32))


def fill(gallery, seed, count=70):
    """Seven identities, one of them with a single picture, junk, pictures of nobody and of unknown cameras; two removed."""
    rng = np.random.default_rng(seed)
    identities = [*rng.choice(["a", "b", "c", "d", "e", "f", "-1", None], count - 1), "g"]
    vectors = vectors_of(count, seed)
    vectors[10] = -vectors[11]  # a score of -1
    add(gallery, identities, rng.choice(["1", "2", "3", None], count), vectors)
    gallery.remove([1, 30])


def enrolled(gallery):
    return [item for item in gallery.items() if item.identity not in (None, "-1")]


def vectors_by_id(gallery):
    return {item.id: vector for items, vectors in gallery.rows() for item, vector in zip(items, vectors, strict=True)}


def slow_pairs(gallery, limit, asked):
    """Every two pictures of two identities, one of which asks; the best of each two identities."""
    best, vectors = {}, vectors_by_id(gallery)
    for one, other in combinations(enrolled(gallery), 2):
        if one.identity != other.identity and (one.id in asked or other.id in asked):
            score = float(vectors[one.id].astype(float) @ vectors[other.id].astype(float))
            key = frozenset((one.identity, other.identity))
            best[key] = min(best.get(key, (2,)), (-score, one.id, other.id))
    return sorted(best.values())[:limit]


def slow_queries(gallery, asked):
    """(AP, id, rank of the first right one) of each that has a match, the worst first."""
    found, vectors = [], vectors_by_id(gallery)
    for item in enrolled(gallery):
        if item.id in asked:
            facts = {"identity": item.identity, "camera": item.camera, "where": "identity is known", "exclude_ids": [item.id]}
            hits = rank(gallery, vectors[item.id], **facts, k=len(gallery))
            right = [place for place, hit in enumerate(hits, start=1) if hit.match]
            if right:
                found.append((sum(i / place for i, place in enumerate(right, start=1)) / len(right), item.id, right[0]))
    return sorted(found)


def told(pairs):
    return [(-pair.second.score, pair.first.id, pair.second.id) for pair in pairs]


def asked_of(hardest):
    return [(query.average_precision, query.item.id, query.first_right) for query in hardest.queries]


def same(got, wanted):
    assert [line[1:] for line in got] == [line[1:] for line in wanted]
    assert [line[0] for line in got] == pytest.approx([line[0] for line in wanted], abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_both_are_those_of_the_slow_twins(either, seed):
    fill(either, seed)
    everybody = {item.id for item in enrolled(either)}
    assert len(slow_pairs(either, 99, everybody)) == 21
    for limit in (1, 6, 99):
        same(told(confusable_pairs(Enrolled.of(either), limit)), slow_pairs(either, limit, everybody))
    hardest, wanted = hardest_queries(Enrolled.of(either), 8), slow_queries(either, everybody)
    same(asked_of(hardest), wanted[:8])
    assert hardest.asked == len(wanted) < len(everybody)
    assert hardest.mean_average_precision == pytest.approx(np.mean([line[0] for line in wanted]))
    assert hardest.rank1 == pytest.approx(np.mean([line[2] == 1 for line in wanted]))


def test_the_pictures_are_told_whole(gallery):
    fill(gallery, 0)
    pair, query = confusable_pairs(Enrolled.of(gallery), 1)[0], hardest_queries(Enrolled.of(gallery), 1).queries[0]
    assert pair.first == gallery.item(pair.first.id)
    assert {**vars(pair.second)} == {**vars(gallery.item(pair.second.id)), "score": pair.second.score}
    assert query.item == gallery.item(query.item.id)


@pytest.mark.parametrize("sample", [1, 30])
def test_of_many_an_even_sample_asks_all(either, sample):
    fill(either, 4)
    ids, groups = [item.id for item in enrolled(either)], {}
    for item in enrolled(either):
        groups.setdefault(item.identity, []).append(item.id)
    by_identity = [item_id for group in groups.values() for item_id in group]
    asked = {by_identity[place * len(ids) // sample] for place in range(sample)}
    same(told(confusable_pairs(Enrolled.of(either), 5, sample)), slow_pairs(either, 5, asked))
    matched = sorted(item_id for _, item_id, _ in slow_queries(either, set(ids)))
    asked = {matched[place * len(matched) // sample] for place in range(sample)}
    hardest = hardest_queries(Enrolled.of(either), 99, sample)
    same(asked_of(hardest), slow_queries(either, asked))
    assert hardest.asked == sample


def test_an_even_sample_is_spread_over_all():
    assert evenly(np.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert evenly(np.array([3, 5, 8]), 5).tolist() == [3, 5, 8]
    assert evenly(np.arange(0), 5).tolist() == []


@pytest.mark.parametrize("scores", [1, 500, 2000])
def test_the_size_of_a_tile_changes_nothing(gallery, monkeypatch, scores):
    fill(gallery, 5)
    whole = confusable_pairs(Enrolled.of(gallery), 6)
    monkeypatch.setattr(confusable, "_TILE_SCORES", scores)
    assert confusable_pairs(Enrolled.of(gallery), 6) == whole


def test_equals_stand_in_the_order_of_their_ids(gallery):
    add(gallery, [str(i % 20) for i in range(40)], [str(i % 3) for i in range(40)], vectors_of(1).repeat(40, axis=0))
    assert told(confusable_pairs(Enrolled.of(gallery), 5)) == [(-1.0, 1, other) for other in range(2, 7)]
    hardest = hardest_queries(Enrolled.of(gallery), 5)
    assert [query.item.id for query in hardest.queries] == [1, 2, 3, 4, 5]
    assert {query.average_precision for query in hardest.queries} == {1 / 39}, "ties count against"


@pytest.mark.parametrize(("scores", "limit"), [(100, 4), (100, 150), (1 << 20, 4)])
def test_the_rounding_of_a_product_decides_nothing(gallery, monkeypatch, scores, limit):
    vectors = vectors_of(6)[np.random.default_rng(0).integers(6, size=120)]
    add(gallery, [str(i % 30) for i in range(120)], ["1"] * 120, vectors)
    monkeypatch.setattr(confusable, "_TILE_SCORES", scores)
    whole, tiles, rng = confusable_pairs(Enrolled.of(gallery), limit), confusable._tiles, np.random.default_rng(1)

    def rounded(enrolled, sample):
        for tile in tiles(enrolled, sample):
            error = rng.uniform(-1, 1, tile.scores.shape) * 0.8 * rounding(16)
            yield replace(tile, scores=(tile.scores + error).astype(np.float32))

    monkeypatch.setattr(confusable, "_tiles", rounded)
    for _ in range(5):
        assert confusable_pairs(Enrolled.of(gallery), limit) == whole


def test_copies_of_pictures_under_other_names_come_first_wherever_they_stand(gallery):
    vectors = vectors_of(300, dim=16)
    vectors[[290, 17, 123]] = vectors[[4, 250, 60]]
    add(gallery, [str(i % 100) for i in range(300)], ["1"] * 300, vectors)
    assert told(confusable_pairs(Enrolled.of(gallery), 3)) == [(-1.0, 5, 291), (-1.0, 18, 251), (-1.0, 61, 124)]


def test_a_collapsed_encoder_gets_an_answer(gallery):
    add(gallery, [str(i) for i in range(60)], [None] * 60, vectors_of(1).repeat(60, axis=0))
    pairs = confusable_pairs(Enrolled.of(gallery), 5)
    assert [pair.second.score for pair in pairs] == [1.0] * 5
    assert len({(pair.first.identity, pair.second.identity) for pair in pairs}) == 5


def test_who_is_nobody_in_particular_is_wrong_for_everybody_and_never_asked(gallery):
    vectors = np.zeros((6, 16))
    vectors[:, 0], vectors[:, 1] = np.cos([0, 0.3, 0.1, 1, 1, 2]), np.sin([0, 0.3, 0.1, 1, 1, 2])
    add(gallery, ["a", "a", "0000", "0000", "0000", "b"], ["1", "2"] * 3, vectors)
    assert [line[1:] for line in told(confusable_pairs(Enrolled.of(gallery)))] == [(2, 6)]
    assert asked_of(hardest_queries(Enrolled.of(gallery))) == [(0.5, 1, 2), (0.5, 2, 2)], "0000 is between the two of a"


def test_nobody_and_one_identity_are_told_in_a_sentence(gallery):
    nothing = Hardest(0, 0.0, 0.0, [])
    assert (confusable_pairs(Enrolled.of(gallery)), hardest_queries(Enrolled.of(gallery))) == ([], nothing)
    add(gallery, ["a", "a", "-1", None], ["1", "1", "1", "2"], vectors_of(4))
    assert (confusable_pairs(Enrolled.of(gallery)), hardest_queries(Enrolled.of(gallery))) == ([], nothing)
    text = review_lines("people", [], nothing)
    assert text[0] == "people: fewer than two identities are enrolled, so none can be confused"
    assert text[1].startswith("people: no identity has two pictures")
    add(gallery, ["a"], ["2"], vectors_of(1, 9))
    assert asked_of(hardest_queries(Enrolled.of(gallery))) == [(1.0, 1, 1), (1.0, 2, 1), (1.0, 5, 1)]


def test_what_is_removed_meanwhile_is_left_out(gallery, monkeypatch):
    fill(gallery, 8)
    enrolled, rows = Enrolled.of(gallery), gallery.rows
    pair, query = confusable_pairs(enrolled, 1)[0], hardest_queries(enrolled, 1).queries[0]
    removed = [pair.first.id, query.item.id]

    def then_removed(where):
        yield from rows(where)
        gallery.remove([removed.pop(0)])

    monkeypatch.setattr(gallery, "rows", then_removed)
    assert confusable_pairs(Enrolled.of(gallery), 1) == []
    assert query.item.id not in [query.item.id for query in hardest_queries(Enrolled.of(gallery)).queries]


def test_the_text_says_what_to_do(gallery):
    fill(gallery, 6)
    pairs, hardest = confusable_pairs(Enrolled.of(gallery), 2), hardest_queries(Enrolled.of(gallery), 3)
    text = review_lines("people", pairs, hardest)
    assert f"#{pairs[0].first.id} {pairs[0].first.source}" in text[1]
    assert sum(" ~ " in line for line in text) == 2
    assert sum(" AP " in line for line in text) == 3
    for verb in ("reid merge people", "reid split people", "gallery relabel people"):
        assert any(verb in line for line in text)


def test_what_cannot_be_asked_is_refused(gallery):
    for review in (confusable_pairs, hardest_queries):
        with pytest.raises(GalleryError, match="limit is 0"):
            review(Enrolled.of(gallery), 0)
        with pytest.raises(GalleryError, match="sample is 0"):
            review(Enrolled.of(gallery), 1, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told(gallery, monkeypatch):
    fill(gallery, 7)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: PTH123, SIM115
    with pytest.raises(GalleryError, match="TMPDIR"):
        confusable_pairs(Enrolled.of(gallery))
