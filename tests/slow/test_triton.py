"""The whole way through a real tritonserver: export, serve, ask over gRPC and HTTP, break it."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from export.repository import write_repository
from serve.aio import open_async_encoder
from serve.encoder import open_encoder
from serve.errors import ContractError, EncoderUnavailable, TritonStartError
from serve.preprocess import ImageError
from serve.triton.client import TritonEncoder
from serve.triton.runtime import find_runtime, runtime_folder
from serve.triton_server import TritonServer
from tests.toy_encoder import HEIGHT, WIDTH, toy_head, write_toy_encoder

pytestmark = pytest.mark.triton
ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A graph, its manifest and a head that fits."""
    graph, manifest = write_toy_encoder(tmp_path_factory.mktemp("source"))
    return {"graph": graph, "manifest": manifest, "head": toy_head(manifest.encoder_id)}


@pytest.fixture(scope="module")
def server(sources, tmp_path_factory):
    repository = tmp_path_factory.mktemp("served") / "repo"
    write_repository(repository, **sources, target="cpu")
    with TritonServer(repository, **ANY_PORTS) as running:
        yield running


def pictures(count, seed=0):
    """Encoded PNG pictures of many sizes."""
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        height, width = rng.integers(20, 80, 2)
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
        encoded.append(stream.getvalue())
    return encoded


def cosines(a, b):
    assert a.shape == b.shape
    return np.sum(a.astype(np.float64) * b, axis=1)


def stats(server, model):
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/stats", timeout=5) as response:
        found = json.load(response)["model_stats"][0]
    return found["inference_count"], found["execution_count"]


def processes_of(group):
    """Processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(stat.parent.name)
    return found


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("*triton*")}  # noqa: S108


def no_process_left(group, within_s=10.0):
    deadline = time.monotonic() + within_s
    while processes_of(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return processes_of(group) == []


@pytest.mark.parametrize("with_name", [True, False])
def test_every_road_gives_the_same_vectors(server, with_name):
    images = pictures(70)  # more than two batches of 32
    here = open_encoder(server.repository)
    wanted = here.embed(images)
    np.testing.assert_allclose(np.linalg.norm(wanted, axis=1), 1, atol=1e-5)
    for url in (server.url, server.http_url):
        there = open_encoder(url + "/toy" * with_name)
        assert there.manifest == here.manifest
        assert there.encoder_id == here.encoder_id
        for vectors in (there.embed(images), there.embed_bytes(images)):
            assert vectors.dtype == np.float32
            assert cosines(vectors, wanted).min() > 1 - 1e-5
        assert there.embed([]).shape == there.embed_bytes([]).shape == (0, 8)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_asyncio_gives_the_same_answers(server, scheme):
    url = server.url if scheme == "grpc" else server.http_url
    images = pictures(64)

    async def ask():
        async with await open_async_encoder(f"{url}/toy") as encoder:
            pixels = asyncio.gather(*(encoder.embed([image]) for image in images))
            encoded = asyncio.gather(*(encoder.embed_bytes([image]) for image in images))
            classified = asyncio.gather(*(encoder.classify_bytes([image]) for image in images))
            with pytest.raises(ImageError, match="not a readable picture"):
                await encoder.embed_bytes([b"no picture"])
            return [np.concatenate(vectors) for vectors in (await pixels, await encoded, *zip(*await classified, strict=True))]

    there = TritonEncoder(f"{url}/toy")
    for found, wanted in zip(asyncio.run(ask()), [there.embed(images)] * 2 + list(there.classify_bytes(images)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_paths_and_arrays_go_in_too(server, tmp_path):
    data = pictures(1)[0]
    (tmp_path / "a.png").write_bytes(data)
    encoder = open_encoder(server.url)
    prepared = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    vectors = encoder.embed([tmp_path / "a.png", data, prepared])
    assert cosines(vectors[:1], vectors[1:2]) > 1 - 1e-6
    with pytest.raises(ImageError, match=r"missing\.png"):
        encoder.embed([tmp_path / "missing.png"])


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_bad_image_in_one_request_is_named(server, scheme):
    encoder = TritonEncoder(server.url if scheme == "grpc" else server.http_url)
    images = pictures(40)
    with pytest.raises(ImageError, match=r"^image: not a readable picture \(empty file\)$"):
        encoder.embed_bytes([b""])
    images[5] = b"not a picture"
    with pytest.raises(ImageError, match=r"^item 5 of 32: image: not a readable picture"):
        encoder.embed_bytes(images)
    images[5], images[35] = images[0], images[1][:60]
    with pytest.raises(ImageError, match=r"^item 3 of 8: .*\(counted from 32\)$"):
        encoder.classify_bytes(images)
    assert encoder.embed_bytes(images[:5]).shape == (5, 8)


def test_bad_images_among_concurrent_requests_hurt_nobody_else(server):
    encoder = TritonEncoder(server.url)
    images = pictures(60)
    wanted = open_encoder(server.repository).embed(images)
    for bad in range(0, 60, 5):
        images[bad] = b"junk %d" % bad

    def ask(image):
        try:
            return encoder.embed_bytes([image])[0]
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, images))
    for number, answer in enumerate(answers):
        if number % 5 == 0:
            assert "not a readable picture" in answer
        else:
            assert cosines(answer[None], wanted[number : number + 1]) > 1 - 1e-5


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_classification_equals_numpy(server, sources, scheme):
    encoder = TritonEncoder(server.url if scheme == "grpc" else server.http_url)
    images = pictures(40)
    vectors, probabilities = encoder.classify_bytes(images)
    wanted = open_encoder(server.repository).embed(images)
    assert cosines(vectors, wanted).min() > 1 - 1e-5
    np.testing.assert_allclose(probabilities, sources["head"].probabilities(vectors), atol=1e-6)


@pytest.mark.parametrize("module", [tritonclient.grpc, tritonclient.http])
def test_plain_clients_get_labels_from_the_classification_extension(server, sources, module):
    """Asking for a part of the outputs is what NVIDIA's image clients do."""
    kind = "grpc" if module is tritonclient.grpc else "http"
    client = module.InferenceServerClient(f"127.0.0.1:{server.ports[kind]}")
    tensor = module.InferInput("bytes", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([pictures(1)], dtype=np.object_))
    answer = client.infer("toy_classify", [tensor], outputs=[module.InferRequestedOutput("probabilities", class_count=2)])
    best = answer.as_numpy("probabilities")[0, 0].decode().split(":")
    probabilities = sources["head"].probabilities(open_encoder(server.repository).embed(pictures(1)))[0]
    assert float(best[0]) == pytest.approx(probabilities.max(), abs=1e-4)
    assert best[2] == sources["head"].classes[probabilities.argmax()]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_sixteen_threads_get_their_own_answers_in_shared_batches(server, scheme):
    encoder = TritonEncoder(server.url if scheme == "grpc" else server.http_url)
    images = np.random.default_rng(3).integers(0, 256, (16, HEIGHT, WIDTH, 3), dtype=np.uint8)
    wanted = open_encoder(server.repository).embed(list(images))
    start = threading.Barrier(16)

    def ask(number):
        start.wait()
        return min(float(cosines(encoder.embed([images[number]]), wanted[number : number + 1])[0]) for _ in range(40))

    inferences, executions = stats(server, "toy_encoder")
    with ThreadPoolExecutor(16) as pool:
        assert min(pool.map(ask, range(16))) > 1 - 1e-5
    deadline = time.monotonic() + 2
    while stats(server, "toy_encoder")[0] - inferences < 640 and time.monotonic() < deadline:
        time.sleep(0.05)  # Triton answers first and counts then
    now_inferences, now_executions = stats(server, "toy_encoder")
    mean_batch = (now_inferences - inferences) / (now_executions - executions)
    print(f"{scheme}: mean batch {mean_batch:.2f}")
    assert now_inferences - inferences == 640
    assert mean_batch > 1


def test_sequential_requests_do_not_stall(server):
    """A queue policy would stall 1-4 % of these for 500 ms."""
    encoder = TritonEncoder(server.url)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    times_s = []
    for _ in range(1000):
        started = time.perf_counter()
        encoder.embed([image])
        times_s.append(time.perf_counter() - started)
    print(
        f"p50 {1e3 * np.median(times_s):.2f} ms, p99 {1e3 * np.quantile(times_s, 0.99):.2f} ms, max {1e3 * max(times_s):.1f} ms"
    )
    assert np.quantile(times_s, 0.99) < 0.1


def test_a_second_server_on_a_busy_port_is_refused(server):
    with pytest.raises(TritonStartError, match=f"port {server.ports['grpc']} cannot be used.*--grpc-port"):
        TritonServer(server.repository, http_port=0, grpc_port=server.ports["grpc"], metrics_port=0).start()
    assert TritonEncoder(server.url).embed(pictures(1)).shape == (1, 8)


def test_only_this_machine_can_reach_it(server):
    listening = set()
    for table, any_address in (("/proc/net/tcp", "00000000"), ("/proc/net/tcp6", "0" * 32)):
        for line in Path(table).read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if address == any_address and line.split()[3] == "0A":
                listening.add(int(port, 16))
    assert not listening & set(server.ports.values())


def test_metrics_are_there(server):
    with urllib.request.urlopen(server.metrics_url, timeout=5) as response:
        assert re.search(r'nv_inference_count\{model="toy_encoder"', response.read().decode())


def test_without_a_head_and_a_clean_stop(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = shared_memory()
    write_repository(tmp_path / "repo", **(sources | {"head": None}), target="cpu")
    with TritonServer(tmp_path / "repo", **ANY_PORTS) as server:
        group = server.pid
        encoder = TritonEncoder(server.url)
        assert encoder.embed_bytes(pictures(2)).shape == (2, 8)
        with pytest.raises(ContractError, match=r"unknown model.*toy_classify.*--head"):
            encoder.classify_bytes(pictures(1))
        assert processes_of(group)
    assert processes_of(group) == []
    assert not list(tmp_path.glob("simclr-triton-*"))
    assert shared_memory() <= before


def test_kill_9_is_an_error_in_bounded_time_and_a_new_server_is_found_again(sources, tmp_path):
    write_repository(tmp_path / "repo", **sources, target="cpu")
    with TritonServer(tmp_path / "repo", **ANY_PORTS) as server:
        encoders = [TritonEncoder(server.url), TritonEncoder(server.http_url)]
        for encoder in encoders:
            encoder.embed(pictures(1))
        group, ports = server.pid, server.ports
        os.kill(group, signal.SIGKILL)
        for encoder in encoders * 4:  # gRPC waits longer between attempts the more of them fail
            started = time.monotonic()
            with pytest.raises(EncoderUnavailable, match="no Triton server answers"):
                encoder.embed(pictures(1))
            assert time.monotonic() - started < 5
        with pytest.raises(TritonStartError, match=r"ended by itself \(exit status -9\)"):
            server.wait()
    assert no_process_left(group), "its Python stubs end too"
    with TritonServer(tmp_path / "repo", **{f"{kind}_port": port for kind, port in ports.items()}):
        for encoder in encoders:
            assert encoder.embed(pictures(1)).shape == (1, 8)


def test_a_frozen_server_costs_one_timeout(sources, tmp_path):
    before = shared_memory()
    write_repository(tmp_path / "repo", **sources, target="cpu")
    with TritonServer(tmp_path / "repo", **ANY_PORTS) as server:
        encoders = [TritonEncoder(url, timeout_s=1) for url in (server.url, server.http_url)]
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for encoder in encoders:
                started = time.monotonic()
                with pytest.raises(EncoderUnavailable, match="no answer within 1 s"):
                    encoder.embed(pictures(1))
                assert time.monotonic() - started < 4
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for encoder in encoders:
            assert encoder.embed(pictures(1)).shape == (1, 8)
        assert shared_memory() > before
    assert shared_memory() <= before, "a client that is still connected makes Triton leave it behind"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_the_program_that_started_it(sources, tmp_path, number):
    write_repository(tmp_path / "repo", **sources, target="cpu")
    program = (
        "from pathlib import Path; from serve.triton_server import *; "
        f"server = TritonServer(Path({str(tmp_path / 'repo')!r}), http_port=0, grpc_port=0, metrics_port=0); "
        "server.start(); print(server.pid); server.wait()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        group = int(process.stdout.readline())
        assert processes_of(group)
    finally:
        process.send_signal(number)
        process.wait(10)
        process.stdout.close()
    assert no_process_left(group)


def test_a_model_that_does_not_load_is_named(sources, tmp_path):
    write_repository(tmp_path / "repo", **sources, target="cpu")
    (tmp_path / "repo" / "toy_encoder" / "1" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(TritonStartError, match=r"model toy_encoder does not load \(.*\); export the run again") as caught:
        TritonServer(tmp_path / "repo", **ANY_PORTS).start()
    assert "\n" not in str(caught.value)


def test_a_gpu_repository_on_a_machine_without_one(sources, tmp_path):
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    write_repository(tmp_path / "repo", **sources, target="gpu")
    with pytest.raises(TritonStartError, match="export again with --target cpu"):
        TritonServer(tmp_path / "repo", **ANY_PORTS).start()


def test_the_runtime_is_one_that_works():
    if shutil.which("tritonserver"):
        pytest.skip("a tritonserver on PATH is used")
    assert find_runtime(runtime_folder()).server.is_file()


def test_busy_port_of_somebody_else(sources, tmp_path):
    write_repository(tmp_path / "repo", **sources, target="cpu")
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(TritonStartError, match="--http-port"):
        TritonServer(tmp_path / "repo", http_port=busy.getsockname()[1], grpc_port=0, metrics_port=0).start()
