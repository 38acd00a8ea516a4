import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.metrics import by_camera, confidence_intervals, evaluate_ranking, evaluate_vectors


def slow_scores(distances, query_ids, gallery_ids, query_cameras, gallery_cameras):
    """The definitions of Market-1501, one loop per word of them. Returns one (ranks of matches) list per query."""
    all_ranks = []
    for q in range(len(query_ids)):
        listed = []
        for g in range(len(gallery_ids)):
            same_camera = query_cameras is not None and gallery_cameras[g] == query_cameras[q]
            junk = gallery_ids[g] == "-1" or (gallery_ids[g] == query_ids[q] and same_camera)
            if not junk:
                good = gallery_ids[g] == query_ids[q]
                listed.append((distances[q][g], good))  # False sorts before True: a bad one goes first among equals
        listed.sort()
        all_ranks.append([place + 1 for place, (_, good) in enumerate(listed) if good])
    return all_ranks


def slow_report(all_ranks, max_rank=50):
    step, trapezoid, minp, mrr, cmc = [], [], [], [], [0] * max_rank
    matched = [ranks for ranks in all_ranks if ranks]
    for ranks in matched:
        step_sum = trapezoid_sum = 0.0
        old_recall, old_precision = 0.0, 1.0
        good_so_far = 0
        for rank in range(1, ranks[-1] + 1):  # compute_AP.m walks down the list
            good_so_far += rank in ranks
            recall, precision = good_so_far / len(ranks), good_so_far / rank
            trapezoid_sum += (recall - old_recall) * (old_precision + precision) / 2
            step_sum += (recall - old_recall) * precision
            old_recall, old_precision = recall, precision
        step.append(step_sum)
        trapezoid.append(trapezoid_sum)
        minp.append(len(ranks) / ranks[-1])
        mrr.append(1 / ranks[0])
        for k in range(max_rank):
            cmc[k] += ranks[0] <= k + 1
    mean = [sum(values) / len(matched) for values in (step, trapezoid, minp, mrr)]
    return [*mean, [count / len(matched) for count in cmc]]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.integers(1, 40))
def test_every_figure_equals_the_slow_definition(seed, with_cameras, gallery_size):
    rng = np.random.default_rng(seed)
    queries = int(rng.integers(1, 7))
    distances = rng.integers(0, 6, (queries, gallery_size)).astype(np.float32)  # many ties
    query_ids, gallery_ids = rng.integers(0, 4, queries).astype(str), rng.integers(-1, 4, gallery_size).astype(str)
    cameras = (
        (rng.integers(0, 3, queries).astype(str), rng.integers(0, 3, gallery_size).astype(str))
        if with_cameras
        else (None, None)
    )
    all_ranks = slow_scores(distances, query_ids, gallery_ids, *cameras)
    if not any(all_ranks):
        with pytest.raises(ValueError, match="has a match"):
            evaluate_ranking(distances, query_ids, gallery_ids, *cameras)
        return
    report = evaluate_ranking(distances, query_ids, gallery_ids, *cameras)
    step, trapezoid, minp, mrr, cmc = slow_report(all_ranks)
    np.testing.assert_allclose([report.map_step, report.map_trapezoid, report.minp, report.mrr], [step, trapezoid, minp, mrr])
    np.testing.assert_allclose(report.cmc, cmc)
    assert report.n_queries == queries
    assert report.n_without_match == sum(not ranks for ranks in all_ranks)
    assert report.first_match_rank.tolist() == [ranks[0] if ranks else 0 for ranks in all_ranks]
    order = rng.permutation(gallery_size)
    shuffled_cameras = (cameras[0], cameras[1][order]) if with_cameras else (None, None)
    shuffled = evaluate_ranking(distances[:, order], query_ids, gallery_ids[order], *shuffled_cameras)
    for name in ("map_step", "map_trapezoid", "minp", "mrr"):  # ties never depend on the order of the gallery
        assert getattr(shuffled, name) == getattr(report, name)
    np.testing.assert_array_equal(shuffled.first_match_rank, report.first_match_rank)
    assert (np.diff(report.cmc) >= 0).all()
    assert report.map_trapezoid <= report.map_step + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["noise", "narrow", "twins"]), st.booleans())
def test_vectors_in_blocks_score_as_their_distances(seed, kind, with_cameras):
    rng = np.random.default_rng(seed)
    queries, gallery = rng.standard_normal((9, 20)), rng.standard_normal((70, 20))
    if kind == "narrow":  # all within float32's error of each other
        queries, gallery = 1 + 1e-7 * queries, 1 + 1e-7 * gallery
    if kind == "twins":
        gallery[rng.integers(70, size=35)] = gallery[rng.integers(70, size=35)]
        queries[:3] = gallery[:3]
    queries, gallery = queries.astype(np.float32), gallery.astype(np.float32)
    ids = rng.integers(0, 5, 9), rng.integers(-1, 5, 70)
    cameras = (rng.integers(0, 3, 9), rng.integers(0, 3, 70)) if with_cameras else (None, None)
    unit_Q, unit_G = (v / np.sqrt(np.einsum("nd,nd->n", v, v))[:, None] for v in (queries, gallery))
    distances = ((unit_Q[:, None].astype(np.float64) - unit_G[None]) ** 2).sum(-1)
    wanted = evaluate_ranking(distances, *ids, *cameras)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.ranking._BLOCK_QUERIES", 4)
        patch.setattr("serve.ranking._CHUNK_GALLERY", 16)
        found = evaluate_vectors(queries, gallery, *ids, *cameras)
        order = rng.permutation(70)
        moved = evaluate_vectors(
            queries, gallery[order], ids[0], ids[1][order], cameras[0], cameras[1] if cameras[1] is None else cameras[1][order]
        )
    np.testing.assert_array_equal(found.average_precision_step, moved.average_precision_step)
    if kind != "narrow":  # there the slow sum differs in its last bits
        np.testing.assert_array_equal(found.average_precision_step, wanted.average_precision_step)
        np.testing.assert_array_equal(found.first_match_rank, wanted.first_match_rank)


def test_a_mapped_half_precision_gallery_scores_as_one_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    queries, gallery = rng.standard_normal((5, 16)), rng.standard_normal((50, 16)).astype(np.float16)
    np.save(tmp_path / "gallery.npy", gallery)
    ids = list("abcde"), list("abcdefghij") * 5
    mapped = evaluate_vectors(queries, np.load(tmp_path / "gallery.npy", mmap_mode="r"), *ids)
    in_memory = evaluate_vectors(queries, gallery.astype(np.float32), *ids)
    np.testing.assert_array_equal(mapped.average_precision_step, in_memory.average_precision_step)


def test_twins_of_a_match_count_before_it_wherever_they_stand():
    rng = np.random.default_rng(0)
    twins, query = np.repeat(rng.standard_normal((1, 333)), 101, axis=0), rng.standard_normal((1, 333))
    for place in (0, 50, 100):
        ids = ["a" if i == place else "b" for i in range(101)]
        assert evaluate_vectors(query, twins, ["a"], ids).first_match_rank.tolist() == [101]


def slow_intervals(report, ids, draws, level):
    """The same draws of identities, their queries written out one by one."""
    names = sorted({name for name, rank in zip(ids, report.first_match_rank, strict=True) if rank})
    values = []
    for draw in draws:
        queries = [
            q
            for name, times in zip(names, draw, strict=True)
            for _ in range(times)
            for q in np.flatnonzero(np.array(ids) == name)
        ]
        queries = [q for q in queries if report.first_match_rank[q]]
        values.append(np.mean(report.average_precision_step[queries]))
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2])


def test_intervals_draw_identities_not_queries():
    rng = np.random.default_rng(0)
    query_ids, gallery_ids = list("aaabbccccdez"), list("abcdefghij") * 6
    report = evaluate_ranking(rng.random((12, 60)), query_ids, gallery_ids)
    found = confidence_intervals(report, query_ids, level=0.8, resamples=200, seed=3)
    draws = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), 200)
    np.testing.assert_allclose(found["map_step"], slow_intervals(report, query_ids, draws, 0.8))
    assert found == confidence_intervals(report, query_ids, level=0.8, resamples=200, seed=3)
    for name in ("map_step", "map_trapezoid", "minp", "mrr"):
        assert found[name][0] <= getattr(report, name) <= found[name][1]
    assert found["rank1"][0] <= report.cmc[0] <= found["rank1"][1]
    assert found["rank10"][0] <= report.cmc[9] <= found["rank10"][1]


def test_one_identity_has_no_spread_however_many_queries():
    report = evaluate_ranking(np.random.default_rng(0).random((8, 9)), ["a"] * 8, list("aabbbbbbb"))
    low, high = confidence_intervals(report, ["a"] * 8)["map_step"]
    assert low == pytest.approx(high) == pytest.approx(report.map_step)


def test_the_table_of_cameras():
    distances = np.array([[0.1, 0.2], [0.2, 0.1], [0.1, 0.2]])
    report = evaluate_ranking(distances, ["a", "a", "z"], ["a", "b"], [1, 2, 2], [3, 3])
    first, second = by_camera(report, [1, 2, 2])
    assert (first.camera, first.n_queries, first.n_without_match, first.rank1, first.map_step) == ("1", 1, 0, 1.0, 1.0)
    assert (second.camera, second.n_queries, second.n_without_match, second.rank1) == ("2", 2, 1, 0.0)
    assert (second.map_step, second.map_trapezoid) == (0.5, 0.25)
    assert np.isnan(by_camera(report, [1, 1, 9])[1].rank1)


def test_known_answers():
    report = evaluate_ranking(np.array([[0.1, 0.2, 0.3, 0.4]]), ["a"], ["b", "a", "b", "a"])
    assert report.map_step == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert report.map_trapezoid == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
    assert report.minp == pytest.approx(2 / 4)
    assert report.mrr == pytest.approx(1 / 2)
    assert report.cmc[:3].tolist() == [0, 1, 1]


def test_one_match_at_rank_r_halves_under_the_official_definition():
    report = evaluate_ranking(np.array([[1.0, 2.0, 3.0]]), ["a"], ["x", "y", "a"])
    assert (report.map_step, report.map_trapezoid) == (pytest.approx(1 / 3), pytest.approx(1 / 6))


def test_same_camera_and_junk_are_taken_out_before_ranking_but_distractors_stay():
    distances = np.array([[0.0, 0.1, 0.2, 0.3]])
    report = evaluate_ranking(distances, [7], [7, -1, 0, 7], [1], [1, 2, 2, 2])
    assert report.first_match_rank.tolist() == [2]  # identity 0 ranks before it, the other two are gone


def test_a_collapsed_encoder_scores_lowest_not_by_luck():
    report = evaluate_ranking(np.zeros((1, 10)), ["a"], ["a", *"bcdefghij"])
    assert report.first_match_rank.tolist() == [10]


def test_cmc_has_max_rank_entries_and_stays_level_beyond_the_gallery():
    report = evaluate_ranking(np.array([[0.5, 0.1]]), ["a"], ["a", "b"])
    assert report.cmc.dtype == np.float64
    assert report.cmc.tolist() == [0.0] + [1.0] * 49
    assert len(evaluate_ranking(np.array([[0.5]]), ["a"], ["a"], max_rank=5).cmc) == 5


def test_queries_without_match_are_told_and_left_out_of_the_averages():
    report = evaluate_ranking(np.array([[0.1, 0.2], [0.1, 0.2]]), ["a", "z"], ["a", "b"])
    assert (report.n_queries, report.n_without_match, report.map_step) == (2, 1, 1.0)
    assert report.without_match.tolist() == [1]
    assert np.isnan(report.average_precision_step[1])
    assert np.isnan(report.average_precision_trapezoid[1])


def test_numbers_and_texts_name_the_same_things():
    distances = np.random.default_rng(0).random((3, 8))
    as_int = evaluate_ranking(distances, [1, 2, 3], [1, 2, 3, 1, 2, 3, -1, 2], [1, 1, 1], [2] * 8)
    as_text = evaluate_ranking(distances, list("123"), ["1", "2", "3", "1", "2", "3", "-1", "2"], ["1"] * 3, ["2"] * 8)
    assert as_int.map_step == as_text.map_step


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((np.array([[0.0, np.nan]]), ["a"], ["a", "b"]), "NaN"),
        ((np.zeros((1, 3)), ["a"], ["a", "b"]), "wanted (1, 2)"),
        ((np.zeros(2), ["a"], ["a", "b"]), "wanted (1, 2)"),
        ((np.zeros((1, 2)), ["a"], ["b", "c"]), "none of 1 queries has a match: no identity of theirs is in the gallery"),
        ((np.zeros((1, 2)), ["a"], ["a", "a"], ["1"], ["1", "1"]), "of a single camera"),
        ((np.zeros((1, 2)), ["a"], ["a", "b"], ["1"], None), "none at all"),
        ((np.zeros((1, 2)), ["a"], ["a", "b"], ["1"], ["1"]), "one camera for each"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, complaint):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        evaluate_ranking(*arguments)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("queries", "gallery", "complaint"),
    [
        (np.ones((1, 3)), np.ones((2, 4)), "another encoder"),
        (np.ones((1, 3)), np.ones((3, 3)), "wanted 1 queries and 2 gallery items"),
        (np.ones((1, 3)), np.array([[1, 1, 1], [0, 0, 0]]), "gallery vector 1 is zero"),
        (np.array([[1, np.nan, 1]]), np.ones((2, 3)), "query vector 0 is zero, infinite or not a number"),
    ],
)
def test_vectors_that_cannot_be_ranked_are_refused(queries, gallery, complaint):
    with pytest.raises(ValueError, match=complaint):
        evaluate_vectors(queries, gallery, ["a"], ["a", "b"])


def test_what_does_not_belong_to_the_report_is_refused():
    report = evaluate_ranking(np.zeros((1, 1)), ["a"], ["a"])
    with pytest.raises(ValueError, match="wanted 1, a level between 0 and 1"):
        confidence_intervals(report, ["a", "b"])
    with pytest.raises(ValueError, match="one for each"):
        by_camera(report, [])
