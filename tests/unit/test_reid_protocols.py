"""Each protocol on toys whose answers are worked out by hand, and what is told of them."""

import itertools
import json

import numpy as np
import pytest

from serve.errors import SourceError
from serve.protocols.choice import settle
from serve.protocols.flip import Mirrored, combine
from serve.protocols.report import figures, lines, write_per_query
from serve.protocols.score import Rerank, score
from serve.protocols.single_shot import expected_cmc
from serve.protocols.vectors import Vectors, pool_tracks
from serve.rerank import k_reciprocal
from serve.samples import Sample


def at_angles(*rows):
    """Vectors (identity, camera[, track]) at so many degrees from the query, which is at 0."""
    samples = [
        Sample(f"{place}.png", None, *row[1:3], track=row[3] if len(row) > 3 else None) for place, row in enumerate(rows)
    ]
    degrees = np.deg2rad([row[0] for row in rows])
    return Vectors(samples, np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32), "toy")


def scored(name, queries, gallery=None, **options):
    return score(settle(name, queries.samples, (gallery or queries).samples), queries, gallery, **options)


def report_of(name, queries, gallery=None, **options):
    (draw,) = scored(name, queries, gallery, **options).draws
    return draw.report


QUERY = at_angles((0, "a", "1"))
RANKED = [
    (1, "a", "1"),  # the query's own camera: junk
    (2, "b", "1"),  # wrong, and of the same camera: stays
    (3, "a", "2"),  # right, rank 2
    (4, "0000", "2"),  # distractor: wrong
    (5, "a", "3"),  # right, rank 4
]


@pytest.mark.parametrize("name", ["market", "duke", "msmt17", "cuhk03", "veri", "sysu30k", "cross-camera"])
def test_the_same_camera_rule_by_hand(name):
    """Right at ranks 2 and 4: step (1/2 + 2/4) / 2; trapezoid ((0/1 + 1/2) / 2 + (1/3 + 2/4) / 2) / 2; mINP 2/4; MRR 1/2."""
    report = report_of(name, QUERY, at_angles(*RANKED))
    assert report.cmc[:3].tolist() == [0, 1, 1]
    assert report.map_step == pytest.approx(1 / 2, abs=1e-6)
    assert report.map_trapezoid == pytest.approx((1 / 4 + 5 / 12) / 2, abs=1e-6)
    assert (report.minp, report.mrr) == (1 / 2, 1 / 2)


def test_sysu30ks_one_match_is_worth_half_in_the_official_form():
    gallery = at_angles(*((i, "0000others", "1") for i in range(1, 4)), (4, "a", "2"))
    report = report_of("sysu30k", QUERY, gallery)
    assert (report.map_step, report.map_trapezoid) == (pytest.approx(1 / 4), pytest.approx(1 / 8))


def test_mars_by_hand_a_track_is_the_mean_of_its_frames():
    queries = at_angles((-3, "a", "1", "q"), (3, "a", "1", "q"))
    gallery = at_angles(
        (0, "b", "2", "b1"), (30, "b", "2", "b1"), (-10, "a", "2", "a1"), (14, "a", "2", "a1"), (1, "a", "1", "q2")
    )
    (draw,) = scored("mars", queries, gallery).draws
    assert (len(draw.queries), draw.gallery_size) == (1, 3)
    assert draw.report.first_match_rank.tolist() == [1]  # a1 is at 2 degrees, b1 at 15, q2 is of the query's camera
    assert draw.queries[0].track == "q"


def test_tracks_of_one_name_in_two_cameras_are_two():
    pooled = pool_tracks(at_angles((0, "a", "1", "t"), (10, "a", "1", "t"), (20, "a", "2", "t")))
    assert [sample.camera for sample in pooled.samples] == ["1", "2"]
    with pytest.raises(SourceError, match=r"0.png: names no track"):
        pool_tracks(QUERY)


def test_a_track_that_is_asked_for_is_not_its_own_answer():
    """Not even without cameras; but pictures of other identities in it stay in the list."""
    everyone = at_angles(
        (0, "a", None, "t1"), (1, "a", None, "t1"), (2, "b", None, "t1"), (3, "a", None, "t2"), (90, "b", None, "t3")
    )
    report = report_of("single-camera", everyone)
    assert report.first_match_rank[0] == 2  # b at 2 degrees, then a's other track


def test_without_roles_each_picture_asks_all_others():
    everyone = at_angles((0, "a", "1"), (1, "a", "1"), (5.5, "b", "1"), (7, "a", "2"), (9, "b", "2"))
    single, cross = (report_of(name, everyone) for name in ("single-camera", "cross-camera"))
    assert single.first_match_rank.tolist() == [1, 1, 2, 3, 2]
    assert cross.first_match_rank.tolist() == [2, 2, 2, 3, 2]


@pytest.mark.parametrize("camera", ["1", None])
def test_a_single_camera_gets_a_sentence_and_another_protocol(camera):
    """Where others assert that all query identities do not appear in the gallery."""
    found = scored("market", at_angles((0, "a", camera)), at_angles((1, "b", camera), (2, "a", camera)))
    assert (found.choice.name, found.choice.asked) == ("single-camera", "market")
    assert "scored without the same-camera rule" in found.choice.note
    assert found.draws[0].report.first_match_rank.tolist() == [2]


def test_queries_without_a_match_are_counted_and_named():
    queries = at_angles((0, "a", "1"), (0, "c", "1"))
    told = figures(scored("market", queries, at_angles((1, "a", "2"), (2, "b", "2"))))
    assert (told["rank1"], told["queries"], told["without_match"]) == (1, 2, 1)
    assert told["over_all_queries"]["rank1"] == 0.5
    assert "counting those as 0: rank-1 50.00%" in "\n".join(lines(told))


@pytest.mark.parametrize(
    ("queries", "gallery", "complaint"),
    [
        (at_angles((0, None, "1")), at_angles((1, "a", "2")), "0.png: a query without identity"),
        (at_angles((0, "a", "1")), at_angles((1, "a", None)), "0.png: names no camera, others do"),
        (at_angles((0, "a", "1")), at_angles((1, "b", "2")), "no identity of the queries is in the gallery"),
    ],
)
def test_missing_facts_are_named(queries, gallery, complaint):
    with pytest.raises(SourceError, match=complaint):
        settle("market", queries.samples, gallery.samples)


@pytest.mark.parametrize("rerank", [None, Rerank(transductive=True)])
@pytest.mark.parametrize("name", ["market", "cuhk03-classic"])
def test_numbers_that_are_none_are_refused(name, rerank):
    for value in (np.nan, np.inf, 0):
        gallery = at_angles((1, "a", "2"), (2, "b", "2"))
        gallery.values[1] = value
        with pytest.raises(SourceError, match="not a number"):
            scored(name, QUERY, gallery, rerank=rerank)


def test_equal_vectors_rank_the_same_wherever_they_stand():
    rng = np.random.default_rng(0)
    query = Vectors([Sample("q", identity="a", camera="1")], rng.standard_normal((1, 333)).astype(np.float32), "toy")
    twins = np.repeat(rng.standard_normal((1, 333)).astype(np.float32), 101, axis=0)
    for place in (0, 50, 100):
        samples = [Sample(str(i), identity="a" if i == place else "b", camera="2") for i in range(101)]
        assert report_of("market", query, Vectors(samples, twins, "toy")).first_match_rank.tolist() == [101]


# Drawn queries and galleries


def test_vehicleid_draws_one_picture_of_each_and_is_seeded():
    rng = np.random.default_rng(0)
    samples = [Sample(f"{i:02}", identity=str(i % 5)) for i in range(23)]
    vectors = Vectors(samples, rng.standard_normal((23, 4)).astype(np.float32), "toy")
    runs = [scored("vehicleid", vectors, seed=seed) for seed in (3, 3, 4)]
    for draw in runs[0].draws:
        assert (draw.report.n_queries, draw.gallery_size, draw.report.n_without_match) == (18, 5, 0)
    assert len(runs[0].draws) == 10
    first, again, other = ([draw.report.map_step for draw in run.draws] for run in runs)
    assert first == again != other
    assert len(set(first)) > 1
    assert figures(runs[0])["map_step"] == pytest.approx(np.mean(first))
    assert figures(runs[0])["deviation"]["map_step"] == pytest.approx(np.std(first, ddof=1))


def test_vehicleid_by_hand():
    """Vehicle a at 0 and 1 degrees, b at 90 and 91: whichever is drawn, the match is nearest."""
    report = figures(scored("vehicleid", at_angles(*((d, v, None) for d, v in ((0, "a"), (1, "a"), (90, "b"), (91, "b"))))))
    assert (report["rank1"], report["map_step"], report["map_trapezoid"]) == (1, 1, 1)


def test_as_many_identities_as_pictures_leave_no_query():
    with pytest.raises(SourceError, match="none is left to ask with"):
        scored("vehicleid", at_angles((0, "a", None), (1, "b", None)))


def slow_single_shot(distances, ids, cameras, ranks):
    """Every gallery that can be drawn, one picture of each identity; the match is one of another camera."""
    total, queries = np.zeros(ranks), 0
    for q in range(len(ids)):
        good = [i for i in range(len(ids)) if ids[i] == ids[q] and cameras[i] != cameras[q]]
        if not good:
            continue
        others = [[i for i in range(len(ids)) if ids[i] == name] for name in sorted(set(ids) - {ids[q]})]
        drawn = list(itertools.product(good, *others))
        queries += 1
        for match, *rest in drawn:
            rank = 1 + sum(distances[q, i] <= distances[q, match] for i in rest)
            total[rank - 1 :] += 1 / len(drawn)
    return total / queries


def test_the_closed_form_is_the_mean_over_all_galleries_that_can_be_drawn():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        ids, cameras = [str(i) for i in rng.integers(0, 4, 11)], [str(i) for i in rng.integers(0, 2, 11)]
        distances = rng.integers(0, 5, (11, 11)).astype(np.float32)  # with ties
        found = expected_cmc(distances, ids, ids, cameras, cameras, max_rank=6)
        np.testing.assert_allclose(found, slow_single_shot(distances, ids, cameras, 6), atol=1e-12)


def test_cuhk03_classic_never_falls_and_ends_at_one():
    """Elsewhere its CMC is 0 beyond the number of identities, and hangs on an unseeded draw."""
    rng = np.random.default_rng(1)
    samples = [Sample(f"{i:03}", identity=f"1_{i % 30:03}", camera=str(1 + i // 30 % 2)) for i in range(120)]
    vectors = Vectors(samples, rng.standard_normal((120, 8)).astype(np.float32), "toy")
    (first, *_), (again, *_) = (scored("cuhk03-classic", vectors).draws for _ in range(2))
    assert np.array_equal(first.cmc, again.cmc)
    assert (np.diff(first.cmc) >= 0).all()
    np.testing.assert_allclose(first.cmc[29:], 1)
    assert first.cmc[0] > first.report.cmc[0]  # one picture of each is easier than all of them


def test_cuhk03_classic_draws_a_hundred_people_twenty_times():
    samples = [Sample(f"{i:04}", identity=f"1_{i % 130:03}", camera=str(1 + i // 130)) for i in range(260)]
    vectors = Vectors(samples, np.random.default_rng(0).standard_normal((260, 3)).astype(np.float32), "toy")
    found = scored("cuhk03-classic", vectors).draws
    assert len(found) == 20
    assert {len({sample.identity for sample in draw.queries}) for draw in found} == {100}
    assert len({frozenset(sample.identity for sample in draw.queries) for draw in found}) == 20


# Mirrored pictures and re-ranking


def test_flip_modes_by_hand():
    """sysu-official normalises before it adds: the mirrored vector, of length 10, outweighs the first."""
    vectors, mirrored = np.array([[30.0, 40.0]], np.float32), np.array([[10.0, 0.0]], np.float32)
    np.testing.assert_allclose(combine(vectors.copy(), mirrored, "sum"), [[40, 40]])
    np.testing.assert_allclose(combine(vectors.copy(), mirrored, "sysu-official"), [[10.6, 0.8]], rtol=1e-6)


def test_the_mirror_turns_left_to_right(toy_encoder):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(Mirrored(toy_encoder).embed([picture]), toy_encoder.embed([picture[:, ::-1]]))
    assert Mirrored(toy_encoder).encoder_id != toy_encoder.encoder_id


def crowd(people=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((people, 8))
    samples = [Sample(f"{i:03}", identity=str(i % people), camera=str(i // people % 3)) for i in range(people * 9)]
    values = np.array([centres[i % people] + 0.8 * rng.standard_normal(8) for i in range(len(samples))], np.float32)
    queries, gallery = np.arange(people), np.arange(people, len(samples))
    vectors = Vectors(samples, values, "toy")
    return vectors.at(queries), vectors.at(gallery)


@pytest.mark.parametrize("transductive", [True, False])
def test_reranking_is_k_reciprocal_of_unit_vectors(transductive):
    queries, gallery = crowd()
    unit = [side.values / np.linalg.norm(side.values.astype(np.float64), axis=1, keepdims=True) for side in (queries, gallery)]
    distances = k_reciprocal(*unit, transductive=transductive)
    wanted = [
        np.sort(row[[s.identity == q.identity and s.camera != q.camera for s in gallery.samples]])[0]
        for row, q in zip(distances, queries.samples, strict=True)
    ]
    report = report_of("market", queries, gallery, rerank=Rerank(transductive))
    for row, near, rank, query in zip(distances, wanted, report.first_match_rank, queries.samples, strict=True):
        assert rank == 1 + sum(row[[s.identity != query.identity for s in gallery.samples]] <= near)


# What is told


def test_each_query_is_a_line(tmp_path):
    queries = at_angles((0, "a", "1", "t"), (0, "c", "1"))
    found = scored("market", queries, at_angles(*RANKED))
    write_per_query(found, tmp_path / "q.jsonl")
    first, second = map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    assert first == {
        "draw": 0,
        "source": "0.png",
        "identity": "a",
        "camera": "1",
        "track": "t",
        "first_match_rank": 2,
        "ap_step": pytest.approx(1 / 2),
        "ap_trapezoid": pytest.approx(1 / 3),
        "inp": pytest.approx(1 / 2),
    }
    assert {second[key] for key in ("first_match_rank", "ap_step", "ap_trapezoid", "inp")} == {None}


def test_the_figures_come_with_intervals_and_by_camera():
    told = figures(scored("market", *crowd()))
    assert {"rank1", "rank5", "rank10", "map_step", "map_trapezoid", "minp", "mrr"} == set(told["interval"])
    for name, (low, high) in told["interval"].items():
        assert low <= told[name] <= high
    assert [(row["camera"], row["n_queries"]) for row in told["cameras"]] == [("0", 6)]
    text = "\n".join(lines(told))
    assert "mAP, step (torchreid, fast-reid)" in text
    assert "mAP, trapezoid (official)" in text
    assert "camera 0: 6 queries" in text


# Against the others' own definitions


def torchreid_scores(distances, q_ids, g_ids, q_cameras, g_cameras):
    """evaluate_rank's Market metric in its own words: sort, remove, cumulate; CMC and step AP."""
    order = np.argsort(distances, axis=1, kind="stable")
    cmc, aps = [], []
    for q in range(len(q_ids)):
        keep = [g for g in order[q] if not (g_ids[g] == q_ids[q] and g_cameras[g] == q_cameras[q])]
        hits = np.array([g_ids[g] == q_ids[q] for g in keep])
        if not hits.any():
            continue
        cmc.append(np.minimum(hits.cumsum(), 1)[:10])
        aps.append(sum(hits.cumsum()[hits] / (np.flatnonzero(hits) + 1)) / hits.sum())
    return np.mean(cmc, axis=0), np.mean(aps)


def matlab_ap(distances, q_ids, g_ids, q_cameras, g_cameras):
    """compute_AP.m: walk down the list, average the precisions on both sides of every step of recall."""
    aps = []
    for q in range(len(q_ids)):
        good = {g for g in range(len(g_ids)) if g_ids[g] == q_ids[q] and g_cameras[g] != q_cameras[q]}
        junk = {g for g in range(len(g_ids)) if g_ids[g] == q_ids[q] and g_cameras[g] == q_cameras[q]}
        old_recall, old_precision, ap, found, place = 0.0, 1.0, 0.0, 0, 0
        for g in np.argsort(distances[q], kind="stable"):
            if g in junk:
                continue
            place += 1
            found += g in good
            recall, precision = found / len(good), found / place
            ap += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
            if found == len(good):
                break
        aps.append(ap)
    return np.mean(aps)


def test_the_figures_are_torchreids_and_matlabs():
    queries, gallery = crowd(people=12, seed=3)
    unit = [side.values / np.linalg.norm(side.values, axis=1, keepdims=True) for side in (queries, gallery)]
    labels = [[s.identity for s in side.samples] for side in (queries, gallery)]
    labels += [[s.camera for s in side.samples] for side in (queries, gallery)]
    report = report_of("market", queries, gallery)
    cmc, map_step = torchreid_scores(-(unit[0] @ unit[1].T), *labels)
    np.testing.assert_allclose(report.cmc[:10], cmc, atol=1e-6)
    assert report.map_step == pytest.approx(map_step, abs=1e-6)
    assert report.map_trapezoid == pytest.approx(matlab_ap(-(unit[0] @ unit[1].T), *labels), abs=1e-6)
    assert report.map_trapezoid < report.map_step
