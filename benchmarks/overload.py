"""The gateway under twice the load that it can take, on the real servers: in front of Triton with a ResNet-18 at 224 px.

    python benchmarks/overload.py --seconds 60

1. Capacity: a closed loop of as many clients as fit inside and in line twice over, never refused.
2. Overload: twice that, open loop. Goodput should stay within 10 % of capacity, refusals should be fast, the wait of those who
   are accepted bounded by the places before them, memory flat.
3. Recovery: how long after the last refusal the gateway is empty, and half the capacity, of which nothing should be refused.

Requests are JPEG photos of 1024 x 768. The load generator runs on the same cores and takes its share of them in all three.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.server import add_encoder  # noqa: E402
from serve.gateway.limits import Limits  # noqa: E402
from serve.triton_server import TritonServer  # noqa: E402

CLIENTS = 2 * Limits.at_once
SAMPLE_S = 0.25
"""Looking costs some milliseconds of the same cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--factor", type=float, default=2, help="times the capacity")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "models"
        add_encoder(repository, "photo", width=1.0, stem="imagenet", size_px=224)
        with (
            TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as triton,
            gateway("--encoder", f"{triton.url}/photo") as (process, url),
        ):
            report = overload(triton, process, url, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


@contextmanager
def gateway(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`simclr api` with these options, as a process of its own, and its address."""
    command = [sys.executable, str(ROOT / "cli.py"), "api", *options, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        finally:
            process.terminate()


def overload(triton: TritonServer, process: subprocess.Popen[str], url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    load(url, triton, clients=CLIENTS, seconds=5)  # everything is warm, and memory has grown to what it needs
    full = load(url, triton, clients=CLIENTS, seconds=10)
    capacity = full["images_per_s"]
    print(f"capacity      {capacity:.1f} pictures/s, mean batch {mean_batch(full):.1f}", flush=True)
    with Watch(url, process.pid, triton) as watch:
        over = load(url, triton, rate=arguments.factor * capacity, seconds=arguments.seconds)
    print(f"offered       {over['requests_per_s']:.1f} requests/s for {arguments.seconds:g} s")
    print(f"goodput       {over['images_per_s']:.1f} pictures/s, {over['images_per_s'] / capacity:.1%} of capacity")
    places_ms = (Limits.at_once + Limits.waiting) / capacity * 1e3
    print(f"accepted      {milliseconds(over['latency_ms'])}; all places at this capacity: {places_ms:.0f} ms")
    print(f"refused       {milliseconds(over['shed_ms'])}")
    print(f"other errors  {sum(over['errors'].values()) - over['errors']['shed']}")
    print(f"memory        gateway {watch.memory('gateway_mb')}; Triton {watch.memory('triton_mb')}")
    print(f"recovery      {watch.recovery_s():.1f} s from the last refusal to an empty gateway", flush=True)
    after = load(url, triton, rate=capacity / 2, seconds=10)
    print(f"half capacity {milliseconds(after['latency_ms'])}; {after['errors']['shed']} refused")
    print(f"generator     {full['generator_busy']:.1%} of a core at capacity, {over['generator_busy']:.1%} in overload")
    if over["bottleneck"]:
        print("the load generator was the bottleneck: part of these figures is its own")
    return {"capacity": full, "overload": over, "after": after, "watch": [asdict(sample) for sample in watch.samples]}


def load(url: str, triton: TritonServer, *, seconds: float, **options: float) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "cli.py"), "bench", "serve", f"{url}/v1/embed", "--json"]
    command += ["--metrics-url", triton.metrics_url, "--seconds", str(seconds)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def mean_batch(report: dict[str, Any]) -> float:
    return report["triton"]["photo_encoder"]["mean_batch"]


def milliseconds(percentiles: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {percentiles[name]:.0f} ms" for name in ("p50", "p99", "max")) if percentiles else "none"


@dataclass(frozen=True)
class Sample:
    at_s: float
    gateway_mb: float
    triton_mb: float
    held: float
    refused: float


class Watch:
    """Samples the memory of both servers, and the gateway's own count of its requests, while its block runs."""

    def __init__(self, url: str, gateway_pid: int, triton: TritonServer) -> None:
        self._url, self._gateway_pid, self._triton_pids = url, gateway_pid, group_of(triton.pid)
        self.samples: list[Sample] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample_for_ever)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(1)  # the last ones in line are answered
        self._ends.set()
        self._thread.join()

    def memory(self, name: str) -> str:
        """At its beginning, middle and end: the medians of a tenth of the samples each."""
        values = [getattr(sample, name) for sample in self.samples]
        tenth = max(1, len(values) // 10)
        parts = values[:tenth], values[len(values) // 2 :][:tenth], values[-tenth:]
        return ", ".join(f"{sorted(part)[len(part) // 2]:.0f}" for part in parts) + f" MB, at most {max(values):.0f}"

    def recovery_s(self) -> float:
        last_refusal = max(n for n in range(1, len(self.samples)) if self.samples[n].refused > self.samples[n - 1].refused)
        empty = next(sample for sample in self.samples[last_refusal:] if sample.held == 0)
        return empty.at_s - self.samples[last_refusal].at_s

    def _sample_for_ever(self) -> None:
        began_s = time.monotonic()
        while not self._ends.wait(SAMPLE_S):
            metrics = read_metrics(f"{self._url}/metrics")
            self.samples.append(
                Sample(
                    at_s=time.monotonic() - began_s,
                    gateway_mb=rss_mb(self._gateway_pid),
                    triton_mb=sum(map(rss_mb, self._triton_pids)),
                    held=metrics["simclr_requests_held"],
                    refused=metrics.get('simclr_rejections_total{reason="full"}', 0),
                )
            )


def read_metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310  # ours
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def group_of(leader: int | None) -> list[int]:
    """The processes of a process group: tritonserver and its Python stubs."""
    found = subprocess.run(["pgrep", "--pgroup", str(leader)], stdout=subprocess.PIPE, text=True, check=True)
    return list(map(int, found.stdout.split()))


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    main()
