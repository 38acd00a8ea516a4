"""Re-ID evaluation and re-ranking at Market-1501's size, and evaluation at SYSU-30k's: ours beside torchreid.

    .venv-peers/bin/python -m pip install --no-deps fastreid==1.4.0             # it asks for an old torch, and needs none here
    python benchmarks/reid.py --peer-python .venv-peers/bin/python              # about half an hour on two cores, 10 GB

Data: made-up vectors, 3,368 queries x 19,732 gallery items x 2,048 (SYSU-30k: 1,000 x 479,730, float16 in a mapped file). Each
side runs in a process of its own, and begins from the vectors; its time is the median of the repeats after a warm-up, its
memory the peak of the process (VmHWM). torchreid gets Euclidean distances for re-ranking, which it squares itself. Its compiled
ranking is that of `--torchreid PATH`, a checkout; the package on PyPI has none, then it is fast-reid's, which descends from it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import MIB, SideFailed, memory_bytes, run_side

QUERIES, GALLERY, DIM = 3368, 19_732, 2048
SYSU_QUERIES, SYSU_GALLERY = 1000, 479_730
IDENTITIES, CAMERAS, WARM_UP = 750, 6, 64
BLOCK = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--torchreid", type=Path, help="a checkout of deep-person-reid, instead of the package")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of queries and gallery items, for a try")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-repeats", type=int, default=1, help=f"for {', '.join(SLOW)}")
    parser.add_argument("--folder", type=Path, help="where the data go, and stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
    elif arguments.folder:
        compare(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            compare(arguments, Path(scratch))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the data, run every side, print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    sysu = any(side.startswith("sysu") for side in arguments.sides)
    prepare(folder, arguments.scale, sysu)
    report: dict[str, Any] = {"cores": os.cpu_count(), "scale": arguments.scale, "sides": {}}
    print(f"{'':28} {'median s':>9} {'fastest':>8} {'slowest':>8} {'CPU s':>7} {'peak MB':>8} {'load':>5}")
    for side in arguments.sides:
        found = run(arguments, side, folder)
        report["sides"][side] = found
        show(side, found)
    report["top10"] = agreement(folder)
    for line in report["top10"].items():
        print(*line)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def run(arguments: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    python = arguments.peer_python if side in PEERS else sys.executable
    repeats = arguments.slow_repeats if side in SLOW else arguments.repeats
    options = ["--folder", folder, "--repeats", repeats]
    options += ["--torchreid", arguments.torchreid] if arguments.torchreid else []
    try:
        return dict(json.loads(run_side(python, __file__, side, *options)))
    except SideFailed as failure:
        return {"failed": str(failure).splitlines()[-1][-200:]}


def show(side: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        print(f"{side:28} failed: {found['failed']}")
        return
    seconds = found["seconds"]
    figures = "  ".join(f"{name} {value:.6f}" for name, value in found["figures"].items())
    print(f"{side:28} {np.median(seconds):9.2f} {min(seconds):8.2f} {max(seconds):8.2f} {min(found['cpu_seconds']):7.2f}"
          f" {found['peak_mb']:8.0f} {found['load']:5.1f}  {figures}", flush=True)  # fmt: skip


def prepare(folder: Path, scale: float, sysu: bool) -> None:
    """market_*.npy, and sysu_*.npy if asked for."""
    sizes = {"market": (QUERIES, GALLERY, np.float32)} | ({"sysu": (SYSU_QUERIES, SYSU_GALLERY, np.float16)} if sysu else {})
    for name, (queries, gallery, kind) in sizes.items():
        counts = int(queries * scale), int(gallery * scale)
        if (folder / f"{name}_done_{scale}").exists():
            continue
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((IDENTITIES, DIM), dtype=np.float32)
        for role, count in zip(("query", "gallery"), counts, strict=True):
            identities = rng.integers(0, IDENTITIES, count)
            others = rng.random(count) > (0.66 if name == "market" else 0.002)
            if role == "gallery":  # the rest are nobody in particular
                identities[others] = -2
            cameras = rng.integers(0, CAMERAS, count)
            np.savez(folder / f"{name}_{role}.npz", identities=identities, cameras=cameras)
            vectors = np.lib.format.open_memmap(folder / f"{name}_{role}.npy", "w+", kind, (count, DIM))
            for start in range(0, count, BLOCK):
                its = identities[start : start + BLOCK]
                noise = rng.standard_normal((len(its), DIM), dtype=np.float32)
                block = np.where(its[:, None] >= 0, 0.3 * centres[its] + noise, 1.05 * noise)
                vectors[start : start + BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
            vectors.flush()
        (folder / f"{name}_done_{scale}").touch()


class Data:
    """Vectors and labels of one set. `limit`: so many queries."""

    def __init__(self, folder: Path, name: str, limit: int | None = None) -> None:
        mode = "r" if name == "sysu" else None
        self.queries = np.load(folder / f"{name}_query.npy")[:limit]
        self.gallery = np.load(folder / f"{name}_gallery.npy", mmap_mode=mode)[: None if limit is None else 40 * limit]
        query, gallery = np.load(folder / f"{name}_query.npz"), np.load(folder / f"{name}_gallery.npz")
        known = gallery["identities"][: len(self.gallery)]
        self.labels = (
            query["identities"][:limit],
            known if limit is None else np.resize(query["identities"][:limit], len(known)),  # that all have a match
            query["cameras"][:limit],
            gallery["cameras"][: len(self.gallery)],
        )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up on a few queries, repeat on all."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    name = "sysu" if arguments.side.startswith("sysu") else "market"
    side: Callable[[Data, argparse.Namespace], dict[str, Any]] = SIDES[arguments.side]
    warm = argparse.Namespace(**vars(arguments) | {"keep": False})
    with contextlib.redirect_stdout(sys.stderr):
        side(Data(arguments.folder, name, WARM_UP), warm)
        data, seconds, cpu_seconds = Data(arguments.folder, name), [], []
        for _ in range(arguments.repeats):
            started, cpu_started = time.perf_counter(), time.process_time()
            figures = side(data, argparse.Namespace(**vars(arguments) | {"keep": True}))
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": memory_bytes("VmHWM") / MIB,
        "load": os.getloadavg()[0],
        "figures": figures,
    }


def product(data: Data, _: argparse.Namespace) -> dict[str, Any]:
    """The matrix product alone, block by block as it comes from the file."""
    for start in range(0, len(data.gallery), BLOCK):
        data.queries.astype(np.float32) @ data.gallery[start : start + BLOCK].astype(np.float32).T
    return {}


def ours(data: Data, _: argparse.Namespace) -> dict[str, Any]:
    from serve.metrics import evaluate_vectors

    report = evaluate_vectors(data.queries, data.gallery, *data.labels)
    return {"rank1": report.cmc[0], "map_step": report.map_step, "map_trapezoid": report.map_trapezoid}


def torchreid_python(data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    rank = load_torchreid(arguments.torchreid, "metrics/rank.py")
    cmc, mean_ap = rank.evaluate_rank(1 - data.queries @ data.gallery.T, *data.labels, use_cython=False)
    return {"rank1": float(cmc[0]), "map_step": float(mean_ap)}


def cython(data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    compiled = load_compiled(arguments.torchreid, arguments.folder)
    distances = 1 - data.queries @ data.gallery.T
    cmc, ap, *_ = compiled.evaluate_cy(distances, *data.labels, 50, False)
    return {"rank1": float(np.asarray(cmc)[0]), "map_step": float(np.mean(ap))}


def rerank_ours(data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    return reranked("ours", data, arguments, transductive=False)


def rerank_ours_transductive(data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    return reranked("ours-transductive", data, arguments, transductive=True)


def reranked(name: str, data: Data, arguments: argparse.Namespace, transductive: bool) -> dict[str, Any]:
    from serve.rerank import k_reciprocal

    return keep(name, k_reciprocal(data.queries, data.gallery, transductive=transductive), arguments)


def rerank_torchreid(data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    rerank = load_torchreid(arguments.torchreid, "utils/rerank.py")
    pairs = ((data.queries, data.gallery), (data.queries, data.queries), (data.gallery, data.gallery))
    return keep("torchreid", rerank.re_ranking(*(euclidean(left, right) for left, right in pairs)), arguments)


def euclidean(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of unit vectors."""
    distances = left @ right.T
    np.subtract(1, distances, out=distances)
    distances *= 2
    return np.sqrt(np.maximum(distances, 0, out=distances), out=distances)


def keep(name: str, distances: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """The first ten of each query, to compare."""
    if arguments.keep:
        first = np.argsort(distances, axis=1, kind="stable")[:, :11]
        np.savez(arguments.folder / f"rerank_{name}.npz", first=first, distances=np.take_along_axis(distances, first, axis=1))
    return {}


def agreement(folder: Path) -> dict[str, float]:
    """Of queries with the same first ten in the same order as torchreid's dense matrices give, apart from ties to 1e-6."""
    files = [folder / f"rerank_{name}.npz" for name in ("torchreid", "ours-transductive")]
    if not all(file.exists() for file in files):
        return {}
    theirs, our = (np.load(file) for file in files)
    same = (theirs["first"] == our["first"])[:, :10].all(axis=1)
    gaps = np.diff(theirs["distances"], axis=1).min(axis=1)
    largest = np.abs(theirs["distances"] - our["distances"]).max()
    return {
        "same top 10": float(same.mean()),
        "same or tied": float((same | (gaps < 1e-6)).mean()),
        "largest difference": float(largest),
    }


@functools.cache
def load_torchreid(checkout: Path | None, path: str) -> Any:  # noqa: ANN401
    """One module of torchreid: its packages import half of the world, and are passed by."""
    root = checkout / "torchreid" if checkout else package("torchreid")
    file = next(iter(sorted(root.rglob(path))), None)
    if file is None:
        sys.exit(f"no {path} under {root}")
    parts = file.relative_to(root.parent).with_suffix("").parts
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        stand_in = types.ModuleType(name)
        stand_in.__path__ = [str(root.parent.joinpath(*parts[:depth]))]
        sys.modules.setdefault(name, stand_in)
    return importlib.import_module(".".join(parts))


@functools.cache
def load_compiled(checkout: Path | None, folder: Path) -> Any:  # noqa: ANN401
    """The Cython ranking, built beside the data."""
    import pyximport

    roots = [checkout] if checkout else [package("torchreid"), package("fastreid")]
    source = next((file for root in roots for file in sorted(root.rglob("rank_cy.pyx"))), None)
    if source is None:
        sys.exit(f"no rank_cy.pyx in {', '.join(map(str, roots))}")
    pyximport.install(setup_args={"include_dirs": [np.get_include()]}, build_dir=str(folder / "built"), language_level=3)
    sys.path.insert(0, str(source.parent))
    return importlib.import_module("rank_cy")


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"{name} is not installed; give --peer-python or --torchreid")
    return Path(found.origin).parent


SIDES: dict[str, Callable[[Data, argparse.Namespace], dict[str, Any]]] = {
    "product": product,
    "ours": ours,
    "cython": cython,
    "torchreid-python": torchreid_python,
    "rerank-ours": rerank_ours,
    "rerank-ours-transductive": rerank_ours_transductive,
    "rerank-torchreid": rerank_torchreid,
    "sysu-product": product,
    "sysu-ours": ours,
}
PEERS = ("cython", "torchreid-python", "rerank-torchreid")
SLOW = ("torchreid-python", "rerank-ours", "rerank-ours-transductive", "rerank-torchreid")


if __name__ == "__main__":
    main()
