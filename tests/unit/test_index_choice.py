"""Choosing an index: what is measured is true, and the knee is taken, within the limits."""

import json
from dataclasses import replace

import faiss
import numpy as np
import pytest

from serve.ann.cells import find_centres
from serve.ann.choice import IndexLimits, Measured, Report, Trial, Work, by_promise, knee, try_kinds, undominated
from serve.ann.method import Method, cells_for, keys_for, trained
from serve.ann.report import draw, table
from serve.ann.tuning import build_best, check
from serve.errors import GalleryError
from tests.gallery_items import clustered

DIM = 16
WORK = Work(threads=1, proceed=lambda: None)
LIMITS = IndexLimits(recall=0.9, latency_ms=5)


def made_up(recall, latency_ms, size=100, key="IVF1,Flat"):
    return Measured(Method(key, 1, 1), recall, latency_ms, size)


def test_what_no_other_beats():
    good = made_up(0.5, 1), made_up(0.8, 2), made_up(0.9, 4)
    beaten = made_up(0.7, 2), made_up(0.8, 3), made_up(0.5, 1.5)
    assert undominated([*beaten, *good[::-1]]) == good


@pytest.mark.parametrize(
    ("candidates", "limits", "chosen"),
    [
        ([(0.80, 1), (0.92, 2), (0.99, 2.5), (1, 4.9)], IndexLimits(recall=0.9), 2),  # the knee, not all of the budget
        ([(0.80, 1), (0.95, 2), (0.99, 3)], IndexLimits(recall=0.9, latency_ms=2.5), 1),
        ([(0.80, 1), (0.95, 2), (0.99, 6)], IndexLimits(recall=0.98, latency_ms=5), 2),  # none keeps both: recall counts
        ([(0.80, 1, 100), (0.95, 2, 2_000_000)], IndexLimits(recall=0.9, memory_mb=1), 0),
    ],
)
def test_the_knee(candidates, limits, chosen):
    measured = [made_up(*one) for one in candidates]
    assert knee(measured, limits) is measured[chosen]


def test_of_kinds_that_are_nearly_as_good_the_smallest_is_the_most_promising():
    quick, small, slow, poor = (
        (made_up(0.97, 1.0, 1000),),
        (made_up(0.97, 1.2, 10),),
        (made_up(0.97, 4.0, 1),),
        (made_up(0.5, 0.1, 1),),
    )
    assert by_promise([poor, slow, quick, small], LIMITS) == [small, quick, slow, poor]
    assert by_promise([poor, (made_up(0.8, 9),)], LIMITS)[0][0].recall == 0.8


@pytest.mark.parametrize(
    "wrong", [{"recall": 0}, {"recall": 1.1}, {"latency_ms": 0}, {"memory_mb": 0}, {"latency_ms": float("nan")}]
)
def test_limits_that_cannot_be(wrong):
    with pytest.raises(GalleryError, match="wanted recall above 0"):
        IndexLimits(**wrong)


@pytest.mark.parametrize("key", keys_for(128, DIM))
def test_measured_recall_is_that_of_a_search(key):
    """Against the same index asked by hand and scored by numpy."""
    rows, queries = clustered(2000), clustered(100, seed=1)
    index = trained(key, find_centres(rows, 128), rows)
    index.add(rows)
    trial = Trial.of(rows, queries, WORK)
    swept = trial.sweep(key, index, LIMITS)
    assert [one.recall for one in swept] == sorted(one.recall for one in swept)
    for one in (swept[0], swept[-1]):
        assert one.latency_ms > 0
        parameter = "efSearch" if key.startswith("HNSW") else "nprobe"
        faiss.ParameterSpace().set_index_parameter(index, parameter, one.method.effort)
        found = []
        for query in queries:
            candidates = index.search(query[None], 10 * one.method.fetch)[1][0]
            candidates = candidates[candidates >= 0]
            best = candidates[np.argsort(-(rows[candidates] @ query))[:10]]
            found.append(len(set(best) & set(np.argsort(-(rows @ query))[:10])) / 10)
        assert one.recall == pytest.approx(np.mean(found), abs=0.02)


def test_memory_is_measured_as_it_is():
    rows = clustered(2000)
    for key in keys_for(128, DIM):
        index = trained(key, find_centres(rows, 128), rows)
        index.add(rows)
        size = Trial.of(rows, rows[:20], WORK).measured(index, Method(key, 16, 1)).bytes
        assert size == pytest.approx(faiss.serialize_index(index).nbytes, rel=0.3), key


def test_all_kinds_are_tried_and_the_best_is_built():
    vectors = clustered(4000)
    kinds = try_kinds(Trial.of(vectors[:-300], vectors[-300:], WORK), 8000, LIMITS)
    assert sorted(swept[0].method.key for swept in kinds) == sorted(keys_for(cells_for(8000) * 3700 // 8000, DIM))
    index, cells, report = build_best(vectors, LIMITS, WORK, exact_ms=1)
    assert index.ntotal == len(cells.of_rows) == 4000
    assert [swept[0].method.key.split(",")[-1] for swept in report.tuned] == [
        swept[0].method.key.split(",")[-1] for swept in report.sample[:2]
    ]
    assert report.chosen == knee(by_promise(report.tuned, LIMITS)[0], LIMITS)
    assert report.chosen.keeps(LIMITS)
    impossible = IndexLimits(recall=1, latency_ms=1e-6)
    _, _, report = build_best(vectors, impossible, WORK, exact_ms=1)
    assert report.chosen.recall == max(one.recall for swept in report.tuned for one in swept)


def test_new_items_of_another_sort_make_it_look_harder():
    vectors = clustered(4000)
    index, _, report = build_best(vectors, LIMITS, WORK, exact_ms=1)
    same = check(index, report, vectors, clustered(200, seed=5), LIMITS, WORK)
    assert same.chosen.method == report.chosen.method
    assert same.checked >= 0.9
    odd = np.random.default_rng(0).standard_normal((200, DIM)).astype(np.float32)
    hard = replace(report, chosen=replace(report.chosen, method=replace(report.chosen.method, effort=1)))
    other = check(index, hard, vectors, odd / np.linalg.norm(odd, axis=1, keepdims=True), LIMITS, WORK)
    assert other.chosen.method.effort > 1


def test_the_choice_can_be_stopped():
    class Enough(Exception):
        pass

    def stop():
        raise Enough

    with pytest.raises(Enough):
        build_best(clustered(4000), LIMITS, Work(1, stop), exact_ms=1)


def test_table_and_picture(tmp_path):
    swept = (made_up(0.9, 1), made_up(0.95, 2))
    report = Report(
        exact_ms=3, sample_rows=5, sample=(swept, (made_up(0.8, 1, key="HNSW16"),)), tuned=(swept,), chosen=swept[1]
    )
    lines = table(report, LIMITS).splitlines()
    assert len(lines) == 5
    assert "0.9500" in lines[-1]
    assert "IVF1,Flat, nprobe 1" in lines[-1]
    assert table(Report(exact_ms=1), LIMITS) == ""
    draw(report, LIMITS, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(str(report))
