import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.metrics import evaluate_ranking


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
        with pytest.raises(ValueError, match="single camera"):
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
    assert shuffled.map_step == report.map_step  # ties never depend on the order of the gallery


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
        ((np.zeros((1, 2)), ["a"], ["b", "c"]), "none of 1 queries has a match"),
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
