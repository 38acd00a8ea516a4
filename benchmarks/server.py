"""What Triton costs over the same encoder in this process: throughput, one request, and the tail, on the real server.

    python benchmarks/server.py

1. Batches of 32 prepared pictures (ResNet-18, 224 px): images/s through the server as a share of those in-process, in turn.
2. One picture at a time (a small encoder, 32 px): the median beyond that of the same call in this process.
3. The same 20,000 times in sequence: no stall of 500 ms, as a queue policy on one instance would cause.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from export.publish import publish  # noqa: E402
from serve.contract import Preprocess  # noqa: E402
from serve.encoder import Encoder, open_encoder  # noqa: E402
from serve.triton_server import TritonServer  # noqa: E402
from train.checkpoint import load_encoder, save_encoder  # noqa: E402
from train.encoder import Encoder as Network  # noqa: E402

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=16, help="batches of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "models"
        add_encoder(repository, "photo", width=1.0, stem="imagenet", size_px=224)
        add_encoder(repository, "small", width=0.25, stem="small-s2", size_px=32)
        with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
            report = {
                "throughput": throughput(server, repository, arguments),
                "single": single(server, repository, arguments.requests),
            }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def add_encoder(repository: Path, name: str, *, width: float, stem: str, size_px: int) -> None:
    torch.manual_seed(0)
    crop = 0.875 if size_px > 32 else 1.0
    size = {"height_px": size_px, "width_px": size_px, "crop": crop}
    frame = Preprocess(**size, resize="center_crop", resample="bicubic", jpeg="reduced")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / name
        run.mkdir()
        network = Network("resnet18", width, stem)
        with torch.inference_mode():
            network.train()(torch.rand(16, 3, size_px, size_px))  # batch statistics as after training: no vector is zero
        save_encoder(run, network.eval(), frame, {})
        publish(*load_encoder(run), repository, name=name, head=None, target="cpu")


def throughput(server: TritonServer, repository: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Two requests under way, as a client that decodes its next batch meanwhile has them."""
    there = open_encoder(f"{server.url}/photo")
    here = open_encoder(repository / "photo")
    pixels = list(np.random.default_rng(0).integers(0, 256, (BATCH, 224, 224, 3), dtype=np.uint8))
    rates: dict[str, list[float]] = {"in-process": [], "triton": []}
    for _ in range(arguments.repeats):
        rates["in-process"].append(rate(here, pixels, arguments.batches, at_once=1))
        rates["triton"].append(rate(there, pixels, arguments.batches, at_once=2))
    for way, found in rates.items():
        print(f"{way:11} {statistics.median(found):7.1f} img/s ({min(found):.1f} to {max(found):.1f}), batches of {BATCH}")
    share = statistics.median(rates["triton"]) / statistics.median(rates["in-process"])
    print(f"{'share':11} {share:7.0%}", flush=True)
    return {"images_per_s": rates, "share": share}


def rate(encoder: Encoder, pixels: list[np.ndarray], batches: int, *, at_once: int) -> float:
    encoder.embed(pixels)
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(encoder.embed, [pixels] * batches))
    return batches * len(pixels) / (time.perf_counter() - started)


def single(server: TritonServer, repository: Path, requests: int) -> dict[str, float]:
    picture = [np.zeros((32, 32, 3), np.uint8)]
    here_s = timed(open_encoder(repository / "small"), picture, 2000, "in-process")
    there_s = timed(open_encoder(f"{server.url}/small"), picture, requests, "one by one")
    found = {f"p{share:g}_ms": 1e3 * float(np.percentile(there_s, share)) for share in (50, 90, 99, 99.9, 100)}
    found["in_process_p50_ms"] = 1e3 * statistics.median(here_s)
    found["overhead_p50_ms"] = found["p50_ms"] - found["in_process_p50_ms"]
    found["over_100_ms"] = sum(value > 0.1 for value in there_s)
    print(f"{requests:,} requests of one picture: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    return found


def timed(encoder: Encoder, picture: list[np.ndarray], requests: int, name: str) -> list[float]:
    for _ in range(200):
        encoder.embed(picture)
    times_s = []
    for _ in tqdm(range(requests), desc=name, dynamic_ncols=True):
        started = time.perf_counter()
        encoder.embed(picture)
        times_s.append(time.perf_counter() - started)
    return times_s


if __name__ == "__main__":
    main()
