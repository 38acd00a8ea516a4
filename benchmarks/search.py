"""Vector search at a million items: ours, with all of them durable in a gallery, beside plain libraries and local databases.

    python benchmarks/search.py --peer-python .venv-peers/bin/python            # about an hour and a half on two cores
    python benchmarks/search.py --peer-python .venv-peers/bin/python --count 20000 --vectors embeddings.parquet

Data: a mixture of Gaussians on the sphere, or the vectors of `simclr embed`. Each side builds in one process, and opens and
searches in a fresh one. Of those with a parameter, the fastest setting with recall@10 of 0.95 counts. Then ours alone: filters,
and adding, removing and searching at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.search_sides import OURS_ENVIRONMENT, SIDES, SLOW, Side
from benchmarks.sides import MIB, memory_bytes, run_side, seconds

DIM, ROWS_PER_CLUSTER, K, RECALL = 256, 250, 10, 0.95
QUERIES, TIMED = 1000, 500
SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--slow-count", type=int, default=20_000, help=f"rows for {' and '.join(SLOW)}")
    parser.add_argument("--vectors", type=Path, help="a parquet of `simclr embed` instead of made-up rows")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--folder", type=Path, help="where the data and indexes go, and stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(PHASES[arguments.phase](arguments.side, arguments.folder)))
    elif arguments.folder:
        compare(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            compare(arguments, Path(scratch))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the data, run every side, print the tables."""
    report: dict[str, Any] = {"cores": os.cpu_count(), "sides": {}}
    sizes = {side: arguments.slow_count if side in SLOW else arguments.count for side in arguments.sides}
    print(f"{'':13} {'rows':>9} {'recall':>7} {'build s':>8} {'open s':>7} {'MB own':>7} {'MB mapped':>9} {'p50 ms':>7}"
          f" {'p99 ms':>7} {'QPS x2':>7} {'QPS batch':>9}")  # fmt: skip
    for side, count in sizes.items():
        data = prepare(folder / f"{count}", count, arguments.vectors)
        python = sys.executable if side in OURS_ENVIRONMENT else arguments.peer_python
        found = {"rows": len(np.load(data / "rows.npy", mmap_mode="r"))}
        for phase in ("fill", "build", "search") if side == "ours" else ("build", "search"):
            found |= run(python, phase, side, data)
        report["sides"][side] = found
        show(side, found)
    if "ours" in sizes:
        data = folder / f"{arguments.count}"
        report["filters"] = run(sys.executable, "filter", "ours", data)
        report["live"] = run(sys.executable, "live", "ours", data)
        show_ours(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def run(python: str, phase: str, side: str, data: Path) -> dict[str, Any]:
    """One phase of one side in a process of its own."""
    return dict(json.loads(run_side(python, __file__, side, "--phase", phase, "--folder", data, part=phase)))


def prepare(data: Path, count: int, parquet: Path | None) -> Path:
    """rows.npy, queries.npy and truth.npy."""
    import faiss

    if (data / "truth.npy").exists():
        return data
    data.mkdir(parents=True, exist_ok=True)
    rows, clusters = mixture(count + QUERIES) if parquet is None else embeddings(parquet, count + QUERIES)
    rows, queries = rows[:-QUERIES], rows[-QUERIES:]
    np.save(data / "rows.npy", rows)
    np.save(data / "queries.npy", queries)
    np.save(data / "clusters.npy", clusters[:-QUERIES])
    np.save(data / "truth.npy", faiss.knn(queries, rows, K, metric=faiss.METRIC_INNER_PRODUCT)[1])
    return data


def mixture(count: int, dim: int = DIM, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (N, `dim`) and their clusters (N,): Gaussians of different size, width and direction that overlap.

    Half of a point's neighbours lie in other cells of an index than its own.
    """
    rng, number = np.random.default_rng(seed), max(20, count // ROWS_PER_CLUSTER)
    scale = (1 / np.sqrt(np.arange(1, dim + 1))).astype(np.float32)  # embeddings spread in few directions
    scale /= np.linalg.norm(scale)
    centres = rng.standard_normal((number, dim), dtype=np.float32) * scale
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    widths = rng.uniform(0.7, 1.4, number).astype(np.float32)
    directions = np.stack([rng.permutation(dim) for _ in range(number)])
    weights = rng.gamma(2, size=number)
    clusters = rng.choice(number, count, p=weights / weights.sum())
    rows = np.empty((count, dim), np.float32)
    for start in range(0, count, 8192):
        some = clusters[start : start + 8192]
        noise = rng.standard_normal((len(some), dim), dtype=np.float32) * scale[directions[some]] * widths[some, None]
        rows[start : start + 8192] = centres[some] + noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, clusters


def embeddings(parquet: Path, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a parquet in random order, and their labels as numbers."""
    import pyarrow.parquet as pq

    table = pq.read_table(parquet, columns=["vector", "label"])
    rows = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(rows))[:most]
    labels = np.unique([str(label) for label in table["label"].to_pylist()], return_inverse=True)[1]
    return rows[order] / np.linalg.norm(rows[order], axis=1, keepdims=True), labels[order]


def fill(_: str, data: Path) -> dict[str, Any]:
    """Put the rows into a gallery: durable, in batches, with the index growing beside."""
    from serve.gallery import Gallery
    from serve.samples import Sample
    from serve.transfer.declared import Declared, foreign_manifest

    rows, clusters = np.load(data / "rows.npy", mmap_mode="r"), np.load(data / "clusters.npy")
    maker = Declared(foreign_manifest("benchmark", rows.shape[1]))
    times = np.random.default_rng(1).random(len(rows))
    samples = [Sample(f"pictures/{i:08}.jpg", label=str(clusters[i]), time=float(times[i])) for i in range(len(rows))]
    started = time.perf_counter()
    with Gallery.open(data / "gallery", maker, create=True) as gallery:
        for start in range(0, len(rows), 10_000):
            gallery.add(samples[start : start + 10_000], np.asarray(rows[start : start + 10_000]), batch_size=1000)
    size = (data / "gallery" / "catalog.sqlite").stat().st_size
    return {"fill_s": time.perf_counter() - started, "catalog_bytes_per_item": size / len(rows) - 4 * rows.shape[1]}


def build(side: str, data: Path) -> dict[str, Any]:
    rows = np.load(data / "rows.npy")
    started = time.perf_counter()
    SIDES[side]().build(rows, data)
    return {"build_s": time.perf_counter() - started}


def search(side: str, data: Path) -> dict[str, Any]:
    """Open, find the setting, measure."""
    queries, truth = np.load(data / "queries.npy"), np.load(data / "truth.npy")
    asked, before = SIDES[side](), memory_mb()
    started = time.perf_counter()
    asked.open(np.load(data / "rows.npy", mmap_mode="r"), data)
    asked.set(asked.settings[-1])
    asked.search(queries[:1], K)
    opened = time.perf_counter() - started
    for setting in asked.settings:
        asked.set(setting)
        recall = recall_of(asked.search(queries, K), truth)
        if recall >= RECALL:
            break
    own, mapped = (after - earlier for after, earlier in zip(memory_mb(), before, strict=True))
    found = {"open_s": opened, "setting": setting, "recall": recall, "own_mb": own, "mapped_mb": mapped}
    return found | latency(asked, queries) | {"qps_two": throughput(asked, queries), "qps_batch": batched(asked, queries)}


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    return float((truth[:, :, None] == found[:, None, :]).any(axis=2).mean())


def memory_mb() -> tuple[float, float]:
    """What this process has to itself, and what it maps of files."""
    return memory_bytes("RssAnon") / MIB, memory_bytes("RssFile") / MIB


def latency(asked: Side, queries: np.ndarray) -> dict[str, float]:
    """Of one query at a time."""
    took = [seconds(lambda query=query: asked.search(query[None], K)) for query in queries[:TIMED]]
    return {"p50_ms": 1e3 * float(np.median(took)), "p99_ms": 1e3 * float(np.percentile(took, 99))}


def throughput(asked: Side, queries: np.ndarray, threads: int = 2, at_least_s: float = 2) -> float:
    """Queries per second, one at a time, from two threads."""
    counts, stop_at = [0] * threads, time.perf_counter() + at_least_s

    def work(number: int) -> None:
        while time.perf_counter() < stop_at:
            place = (counts[number] * threads + number) % len(queries)
            asked.search(queries[place : place + 1], K)
            counts[number] += 1

    workers = [threading.Thread(target=work, args=[number]) for number in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - started)


def batched(asked: Side, queries: np.ndarray) -> float:
    """Queries per second, all at once; the best of five."""
    return len(queries) / min(seconds(lambda: asked.search(queries, K)) for _ in range(5))


def filtered(_: str, data: Path) -> dict[str, Any]:
    """Recall and time under filters: of items anywhere, and of a few clusters."""
    import faiss

    from serve.gallery import Gallery

    rows, clusters, queries = (np.load(data / f"{name}.npy") for name in ("rows", "clusters", "queries"))
    times = np.random.default_rng(1).random(len(rows))
    kinds = sorted(set(clusters.tolist()))
    some = kinds[: max(1, len(kinds) // 10)]
    filters = {f"time < {share}": times < share for share in SELECTIVITIES}
    filters[f"label in ({', '.join(map(str, some))})"] = np.isin(clusters, some)
    found: dict[str, Any] = {}
    with Gallery.open(data / "gallery") as gallery:
        for where, passes in filters.items():
            wanted = np.flatnonzero(passes)
            truth = wanted[faiss.knn(queries, rows[wanted], K, metric=faiss.METRIC_INNER_PRODUCT)[1]]
            first = seconds(lambda where=where: gallery.search_many(queries[:1], K, where))
            result = gallery.search_many(queries, K, where)[1] - 1
            took = [seconds(lambda q=q, where=where: gallery.search_many(q[None], K, where)) for q in queries[:TIMED]]
            name = where if len(where) < 30 else f"label in ({len(some)} of {len(kinds)})"
            found[name] = {
                "share": float(passes.mean()),
                "recall": recall_of(result, truth),
                "fewest": int((result >= 0).sum(axis=1).min()),
                "p50_ms": 1e3 * float(np.median(took)),
                "first_ms": 1e3 * first,
            }
    return found


def live(_: str, data: Path) -> dict[str, Any]:
    """Adding and removing, and what that does to searches."""
    from serve.gallery import Gallery
    from serve.samples import Sample

    queries = np.load(data / "queries.npy")
    fresh, _ = mixture(20_000, queries.shape[1], seed=7)
    with Gallery.open(data / "gallery") as gallery:
        quiet = searches(gallery, queries, lambda: time.sleep(3))
        ids: list[int] = []

        def add(start: int, stop: int, batch: int) -> float:
            samples = [Sample(f"fresh/{i}") for i in range(start, stop)]
            return (stop - start) / seconds(lambda: ids.extend(gallery.add(samples, fresh[start:stop], batch_size=batch).ids))

        found = {"adds_per_s_of_1": add(0, 1000, 1), "adds_per_s_of_1000": add(1000, 10_000, 1000)}
        took = [seconds(lambda item_id=item_id: gallery.remove([item_id])) for item_id in ids[:300]]
        busy = searches(gallery, queries, lambda: add(10_000, 20_000, 100))
        return found | {"remove_ms": 1e3 * float(np.median(took)), "quiet_ms": quiet, "while_adding_ms": busy}


def searches(gallery: Any, queries: np.ndarray, work: Callable[[], object]) -> list[float]:  # noqa: ANN401
    """p50 and p99 of searches for one vector while something else goes on, in ms."""
    worker, took = threading.Thread(target=work), list[float]()
    worker.start()
    while worker.is_alive():
        query = queries[len(took) % len(queries)]
        took.append(seconds(lambda query=query: gallery.search_many(query[None], K)))
        time.sleep(0.001)
    return [1e3 * float(np.percentile(took, share)) for share in (50, 99)]


PHASES: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "fill": fill,
    "build": build,
    "search": search,
    "filter": filtered,
    "live": live,
}


def show(side: str, found: dict[str, Any]) -> None:
    print(
        f"{side:13} {found['rows']:9,} {found['recall']:7.4f} {found['build_s']:8.1f} {found['open_s']:7.2f}"
        f" {found['own_mb']:7.0f} {found['mapped_mb']:9.0f} {found['p50_ms']:7.3f} {found['p99_ms']:7.3f}"
        f" {found['qps_two']:7,.0f} {found['qps_batch']:9,.0f}" + (f"  ef {found['setting']}" if found["setting"] else ""),
        flush=True,
    )


def show_ours(report: dict[str, Any]) -> None:
    ours, live_ = report["sides"]["ours"], report["live"]
    print(f"\nours: filled in {ours['fill_s']:.0f} s, {ours['catalog_bytes_per_item']:.0f} bytes per item beside its vector")
    for where, found in report["filters"].items():
        print(f"  {where:28} {found['share']:7.2%} of the items: recall {found['recall']:.4f}, {found['fewest']} or more,"
              f" p50 {found['p50_ms']:.2f} ms, the first {found['first_ms']:.0f} ms")  # fmt: skip
    print(f"  added one by one {live_['adds_per_s_of_1']:,.0f}/s, by 1000 {live_['adds_per_s_of_1000']:,.0f}/s; "
          f"removed in {live_['remove_ms']:.2f} ms; search p50/p99: {live_['quiet_ms'][0]:.2f}, {live_['quiet_ms'][1]:.2f} ms, "
          f"while adding {live_['while_adding_ms'][0]:.2f}, {live_['while_adding_ms'][1]:.2f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
