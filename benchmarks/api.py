"""The whole API beside the encoder alone: a JPEG photo comes in, the most similar of a gallery's items go out.

    python benchmarks/api.py                             # ResNet-18 at 224 px, 100,000 items: about five minutes
    python benchmarks/api.py --small --gallery 2000 --seconds 3 --repeats 2

In turn, --repeats times:

1. Encoder: `embed` of the photos in this process, by as many threads as there are clients in 2.
2. API: POST /v1/search/image by a closed loop of clients, never refused. Gateway, encoder and gallery are one other process.
3. Overload: the same requests at twice the rate that 2 came to, open loop. Goodput should stay near 2, refusals should be fast.

Photos are of 1024 x 768 pixels. The load generator runs on the same cores and takes its share of them in 2 and 3.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.overload import gateway  # noqa: E402
from benchmarks.server import add_encoder  # noqa: E402
from serve.encoder import Encoder, open_encoder  # noqa: E402
from serve.gallery import Gallery  # noqa: E402
from serve.gateway.limits import Limits  # noqa: E402
from serve.loadtest.loops import Load, Samples, event_loop, poisson_arrivals  # noqa: E402
from serve.loadtest.report import percentiles_ms  # noqa: E402
from serve.loadtest.requests import draw_pictures, gateway_bodies  # noqa: E402
from serve.loadtest.targets import HttpTarget, Kind, Target  # noqa: E402
from serve.samples import Sample  # noqa: E402

TIMEOUT_S = 30
SIDES = ("encoder", "api", "overload")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=int, default=100_000, help="items")
    parser.add_argument("-k", type=int, default=10, help="hits wanted")
    parser.add_argument("--clients", type=int, default=Limits.at_once)
    parser.add_argument("--factor", type=float, default=2, help="overload, times the capacity")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--warmup-s", type=float, default=3, help="before each of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a small encoder at 32 px, to try this out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "models"
        kind = (
            {"width": 0.25, "stem": "small-s2", "size_px": 32}
            if arguments.small
            else {"width": 1.0, "stem": "imagenet", "size_px": 224}
        )
        add_encoder(models, "photo", **kind)
        encoder = open_encoder(models / "photo")
        fill(Path(scratch) / "gallery", encoder, arguments.gallery)
        with gateway("--encoder", str(models / "photo"), "--gallery", str(Path(scratch) / "gallery")) as (_, url):
            runs = measure(encoder, f"{url}/v1/search/image?k={arguments.k}", arguments)
    report(runs)
    if arguments.json:
        facts = {"cores": os.cpu_count(), **{name: value for name, value in vars(arguments).items() if name != "json"}}
        arguments.json.write_text(json.dumps({"asked": facts, "runs": runs}, indent=2) + "\n")


def fill(folder: Path, encoder: Encoder, count: int) -> None:
    vectors_ND = np.random.default_rng(0).standard_normal((count, encoder.manifest.embedding_dim), np.float32)
    with Gallery.open(folder, encoder, create=True) as gallery:
        gallery.add([Sample(f"{number}.jpg", label=str(number % 100)) for number in range(count)], vectors_ND, batch_size=4096)
        print(f"gallery   {gallery.info().index}", flush=True)


class InProcess:
    """The encoder as a `Target`, with a thread for each client."""

    def __init__(self, encoder: Encoder, pictures: list[bytes], clients: int) -> None:
        self._encoder, self._pictures = encoder, pictures
        self._pool = ThreadPoolExecutor(clients)

    async def send(self, number: int) -> None:
        picture = self._pictures[number % len(self._pictures)]
        await asyncio.get_running_loop().run_in_executor(self._pool, self._encoder.embed, [picture])

    async def aclose(self) -> None:
        self._pool.shutdown()


def measure(encoder: Encoder, url: str, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Side -> its figures, one of each repeat."""
    pictures = draw_pictures(0)
    here = partial(InProcess, encoder, pictures, arguments.clients)
    there = partial(HttpTarget, url, gateway_bodies(pictures), TIMEOUT_S)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with asyncio.Runner(loop_factory=event_loop) as runner:
        for seed in range(arguments.repeats):
            runs["encoder"].append(figures(runner.run(under_load(here, arguments))))
            runs["api"].append(figures(runner.run(under_load(there, arguments))))
            rate = arguments.factor * runs["api"][-1]["answered_per_s"]
            runs["overload"].append(figures(runner.run(under_load(there, arguments, rate, seed))))
            print(", ".join(f"{side} {runs[side][-1]['answered_per_s']:.1f}/s" for side in SIDES), file=sys.stderr, flush=True)
    return runs


async def under_load(
    open_target: Callable[[], Target], arguments: argparse.Namespace, rate: float | None = None, seed: int = 0
) -> Samples:
    """A closed loop of all clients; with a rate, an open one."""
    async with aclosing(open_target()) as target:
        load = Load(target.send, seconds=arguments.seconds, warmup_s=arguments.warmup_s)
        if rate is None:
            await load.closed(arguments.clients)
        else:
            await load.open(poisson_arrivals(rate, -arguments.warmup_s, arguments.seconds, seed).tolist())
        return load.samples()


def figures(samples: Samples) -> dict[str, Any]:
    meant = samples.intended_s >= 0
    kind, latency_s = samples.kind[meant], (samples.done_s - samples.intended_s)[meant]
    in_time = (samples.kind == Kind.ANSWERED) & (samples.done_s >= 0) & (samples.done_s < samples.seconds)
    return {
        "offered_per_s": len(kind) / samples.seconds,
        "answered_per_s": int(in_time.sum()) / samples.seconds,
        "latency_ms": percentiles_ms(latency_s[kind == Kind.ANSWERED]),
        "refused_ms": percentiles_ms(latency_s[kind == Kind.SHED]),
        "sent_late_ms": percentiles_ms((samples.sent_s - samples.intended_s)[meant]),
        "outcomes": {one.name.lower(): int((kind == one).sum()) for one in Kind},
        "unsent": samples.unsent,
        "first_errors": {one.name.lower(): reason for one, reason in samples.reasons.items()},
    }


def report(runs: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'':10}{'answers/s':>26}{'p50 ms':>28}{'p99 ms':>28}   (median, least to most)")
    for side, found in runs.items():
        rate = spread([run["answered_per_s"] for run in found])
        latency = [spread([run["latency_ms"][name] for run in found]) for name in ("p50", "p99")]
        print(f"{side:10}{rate:>26}{latency[0]:>28}{latency[1]:>28}")
    for name, over, under in (("API / encoder", "api", "encoder"), ("goodput / API", "overload", "api")):
        shares = [a["answered_per_s"] / b["answered_per_s"] for a, b in zip(runs[over], runs[under], strict=True)]
        print(f"{name:16}{spread([100 * share for share in shares])} %")
    for name in ("p50", "p99"):
        print(f"refused {name:8}{spread([run['refused_ms'][name] for run in runs['overload'] if run['refused_ms']])} ms")
    print(
        f"sent late p99   {spread([run['sent_late_ms']['p99'] for run in runs['overload']])} ms of both are the generator's own"
    )
    failed = {kind for found in runs.values() for run in found for kind in run["first_errors"]} - {"shed"}
    print(f"other errors    {', '.join(sorted(failed)) or 'none'}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "none"


if __name__ == "__main__":
    main()
