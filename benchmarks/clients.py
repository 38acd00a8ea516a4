"""Ways to ask Triton, side by side on one real server: asyncio on threads or native, tensors in shared memory or sent.

    python benchmarks/clients.py

1. Requests of one picture from 1, 16 and 64 tasks: `AsyncEncoder` (threads, failover, identity checks) against nothing but
   tritonclient.grpc.aio. The toy encoder takes no time, so this is the client's own; ResNet-18 at 224 px shows its share.
2. System shared memory against the tensor in the request, one picture and 32 (4.8 MB): a graph that only glances at its input
   shows the transport, ResNet-18 the share it has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.utils.shared_memory as system_memory
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.server import add_encoder  # noqa: E402
from export.repository import write_repository  # noqa: E402
from serve.aio import open_async_encoder  # noqa: E402
from serve.contract import TensorSpec  # noqa: E402
from serve.triton.model_control import KEY_NAME  # noqa: E402
from serve.triton_server import TritonServer  # noqa: E402
from tests.bad_images import good  # noqa: E402
from tests.toy_encoder import HEIGHT, WIDTH, write_toy_encoder  # noqa: E402

SIZE = 224
TASKS = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph, manifest = write_toy_encoder(folder / "toy")
        write_repository(folder / "models", graph=graph, manifest=manifest, head=None, target="cpu")
        add_glance(folder)
        add_encoder(folder / "models", "photo", width=1.0, stem="imagenet", size_px=SIZE)
        with TritonServer(folder / "models", http_port=0, grpc_port=0, metrics_port=0) as server:
            report = {
                "asyncio": asyncio.run(compare_asyncio(server, arguments.seconds, arguments.repeats)),
                "shared_memory": compare_memory(server, arguments.seconds, arguments.repeats),
            }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def add_glance(folder: Path) -> None:
    """The toy encoder, of the upper left corner of a large picture."""
    graph, manifest = write_toy_encoder(folder / "glance", "glance")
    model = onnx.load(graph)
    corner = {"begin": [0, 0], "end": [HEIGHT, WIDTH], "sides": [1, 2]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in corner.items())
    model.graph.node[0].input[0] = "corner"
    model.graph.node.insert(0, helper.make_node("Slice", ["image", *corner], ["corner"]))
    for dim in (1, 2):
        model.graph.input[0].type.tensor_type.shape.dim[dim].dim_value = SIZE
    onnx.save(model, graph)
    whole = TensorSpec(name="image", shape=(SIZE, SIZE, 3), dtype="uint8")
    manifest = manifest.model_copy(update={"input": whole})
    write_repository(folder / "models", graph=graph, manifest=manifest, head=None, target="cpu")


async def compare_asyncio(server: TritonServer, seconds: float, repeats: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    native = tritonclient.grpc.aio.InferenceServerClient(server.url.partition("://")[2])
    pixels = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    photo = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    picture = good()
    encoded = np.array([[picture]], dtype=np.object_)
    async with (
        await open_async_encoder(f"{server.url}/toy") as toy,
        await open_async_encoder(f"{server.url}/photo") as resnet,
    ):
        pairs: dict[str, tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]] = {
            "toy, prepared": (lambda: toy.embed(list(pixels)), lambda: ask_natively(native, "toy_encoder", "image", pixels)),
            "toy, encoded": (lambda: toy.embed_bytes([picture]), lambda: ask_natively(native, "toy_embed", "bytes", encoded)),
            "ResNet-18": (lambda: resnet.embed(list(photo)), lambda: ask_natively(native, "photo_encoder", "image", photo)),
        }
        for name, (threads, awaited) in pairs.items():
            for tasks in TASKS:
                found: dict[str, list[list[float]]] = {"threads": [], "native": []}
                for _ in range(repeats):
                    for way, ask in (("threads", threads), ("native", awaited)):
                        await load(ask, tasks, seconds / 8)
                        found[way].append(await load(ask, tasks, seconds))
                report[f"{name}, {tasks} at once"] = found
                tell_asyncio(f"{name}, {tasks} at once", found)
    await native.close()
    return report


async def ask_natively(
    client: tritonclient.grpc.aio.InferenceServerClient, model: str, name: str, array: np.ndarray
) -> np.ndarray:
    tensor = tritonclient.grpc.InferInput(name, array.shape, "BYTES" if array.dtype == np.object_ else "UINT8")
    tensor.set_data_from_numpy(array)
    answer = await client.infer(model, [tensor], client_timeout=10)
    found: np.ndarray = answer.as_numpy("embedding")
    return found


async def load(ask: Callable[[], Awaitable[object]], tasks: int, seconds: float) -> list[float]:
    """Requests/s, p50 and p99 in ms, the client's processor time per request in ms."""
    times_s: list[float] = []
    started, worked = time.perf_counter(), time.process_time()

    async def one() -> None:
        while (begun := time.perf_counter()) < started + seconds:
            await ask()
            times_s.append(time.perf_counter() - begun)

    await asyncio.gather(*(one() for _ in range(tasks)))
    rate = len(times_s) / (time.perf_counter() - started)
    p50_ms, p99_ms = (1e3 * float(np.percentile(times_s, share)) for share in (50, 99))
    return [rate, p50_ms, p99_ms, 1e3 * (time.process_time() - worked) / len(times_s)]


def tell_asyncio(name: str, found: dict[str, list[list[float]]]) -> None:
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    ways = (
        f"{way} {rate:7.0f}/s p50 {p50:6.2f} p99 {p99:6.2f} cpu {cpu:.2f} ms" for way, (rate, p50, p99, cpu) in medians.items()
    )
    print(f"{name:27} {' | '.join(ways)} | share {medians['threads'][0] / medians['native'][0]:.0%}", flush=True)


def compare_memory(server: TritonServer, seconds: float, repeats: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    pictures = np.random.default_rng(0).integers(0, 256, (32, SIZE, SIZE, 3), dtype=np.uint8)
    for model in ("glance", "photo"):
        for batch in (pictures[:1], pictures):
            with ways_to_send(server, f"{model}_encoder", batch) as ways:
                found: dict[str, list[float]] = {way: [] for way in ways}
                for ask in ways.values():
                    median_ms(ask, seconds / 8)
                for _ in range(repeats):
                    for way, ask in ways.items():
                        found[way].append(median_ms(ask, seconds))
            report[f"{model}, {len(batch)}"] = found
            tell_memory(f"{model}, {len(batch)}", found)
    return report


@contextmanager
def ways_to_send(server: TritonServer, model: str, batch: np.ndarray) -> Iterator[dict[str, Callable[[], object]]]:
    """The batch is written into the shared region for every request, as a client with new pictures must."""
    grpc = tritonclient.grpc.InferenceServerClient(
        server.url.partition("://")[2], channel_args=[("grpc.max_receive_message_length", -1)]
    )
    http = tritonclient.http.InferenceServerClient(server.http_url.partition("://")[2])
    key = {f"triton-grpc-protocol-{KEY_NAME}": server.key}
    region = system_memory.create_shared_memory_region("batch", f"/simclr-{server.pid}-{model}", batch.nbytes)
    grpc.register_system_shared_memory("batch", f"/simclr-{server.pid}-{model}", batch.nbytes, headers=key)

    def send(module: ModuleType, client: Any) -> object:  # noqa: ANN401
        tensor = module.InferInput("image", batch.shape, "UINT8")
        tensor.set_data_from_numpy(batch)
        return client.infer(model, [tensor]).as_numpy("embedding")

    def share(module: ModuleType, client: Any) -> object:  # noqa: ANN401
        system_memory.set_shared_memory_region(region, [batch])
        tensor = module.InferInput("image", batch.shape, "UINT8")
        tensor.set_shared_memory("batch", batch.nbytes)
        return client.infer(model, [tensor]).as_numpy("embedding")

    try:
        yield {
            "gRPC": lambda: send(tritonclient.grpc, grpc),
            "gRPC, shared": lambda: share(tritonclient.grpc, grpc),
            "HTTP": lambda: send(tritonclient.http, http),
            "HTTP, shared": lambda: share(tritonclient.http, http),
        }
    finally:
        grpc.unregister_system_shared_memory("batch", headers=key)
        system_memory.destroy_shared_memory_region(region)


def median_ms(ask: Callable[[], object], seconds: float) -> float:
    times_s: list[float] = []
    started = time.perf_counter()
    while not times_s or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        ask()
        times_s.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times_s)


def tell_memory(name: str, found: dict[str, list[float]]) -> None:
    for plain in ("gRPC", "HTTP"):
        sent, shared = found[plain], found[f"{plain}, shared"]
        gains = [1 - less / more for more, less in zip(sent, shared, strict=True)]
        times = f"{spread(sent, '{:.2f}')} ms, shared {spread(shared, '{:.2f}')} ms"
        print(f"{name:12} {plain} {times}, gain {spread(gains, '{:.1%}')}", flush=True)


def spread(values: list[float], form: str) -> str:
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    main()
