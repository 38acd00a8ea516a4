"""`simclr embed --engine ray` on a real Ray cluster of this machine: whatever dies, the outcome is the local engine's."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.repository import write_repository
from serve.bulk import embed_to_parquet
from serve.encoder import open_encoder
from serve.engines.local import embed_here
from serve.errors import EncoderMismatch, SimclrError
from tests.toy_encoder import write_toy_encoder

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
CLUSTER = """
import ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, logging_level="error")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
PICTURES, SHARD = 400, 20


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")  # for all of our processes, and none of it in the home folder
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        yield pytest.importorskip("ray", reason="Ray is not installed (the extra `scale`)")


@pytest.fixture(scope="module")
def cluster(ray):
    """Two CPUs. Its address, and the process that all its processes descend from; it ends with its standard input."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        yield process.stdout.readline().strip(), process.pid
        process.communicate(timeout=60)
        watchdog.cancel()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("toy", "other")):
        graph, manifest = write_toy_encoder(root / "source" / name, name, seed=seed)
        write_repository(root / name, graph=graph, manifest=manifest, head=None, target="cpu")
    (root / "pictures").mkdir()
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 12, 3), np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{i:03}.png")
    (root / "pictures" / "107.png").write_bytes(b"no picture")
    encoder = open_encoder(root / "toy")
    run(root, root / "local.parquet", partial(embed_here, encoder=encoder, workers=2))
    return root


def run(world, out, engine):
    return embed_to_parquet(open_encoder(world / "toy").manifest, str(world / "pictures"), str(out), engine, SHARD)


def on_ray(world, address, opener=open_encoder):
    from serve.engines.ray_cluster import embed_on_ray

    return partial(embed_on_ray, open_encoder=opener, spec=str(world / "toy"), address=address, workers=2)


def descendants(ancestor):
    """Process id -> command line."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    found, wave = {}, {ancestor}
    while wave:
        wave = {child for child, parent in parents.items() if parent in wave}
        found.update((child, names.get(child, "")) for child in wave)
    return found


def busy_workers(ancestor):
    return [process for process, name in descendants(ancestor).items() if name.startswith("ray::_embed")]


def wait_for(found, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return answer


def slow_opener(spec):
    """Long enough for a worker to be met at its work."""
    time.sleep(0.3)
    return open_encoder(spec)


@pytest.fixture
def by_value(ray):
    """Workers need not find this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_costs_nothing(world, cluster, by_value, tmp_path):
    address, ancestor = cluster
    killed = []

    def kill_some():
        for parts in (2, 9):
            wait_for(lambda parts=parts: len(list((tmp_path / "out.parquet.parts").glob("part-*"))) >= parts)
            killed.append(wait_for(lambda: busy_workers(ancestor))[0])
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_some)
    killer.start()
    report = run(world, tmp_path / "out.parquet", on_ray(world, address, slow_opener))
    killer.join()
    assert len(set(killed)) == 2
    assert not set(killed) & descendants(ancestor).keys()
    assert report.count == PICTURES - 1
    assert (tmp_path / "out.parquet").read_bytes() == (world / "local.parquet").read_bytes()
    wanted, got = (folder / f"{name}.parquet.quarantine.jsonl" for folder, name in ((world, "local"), (tmp_path, "out")))
    assert got.read_bytes() == wanted.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out.parquet", "out.parquet.quarantine.jsonl"}


def test_a_killed_driver_costs_no_finished_shard(world, cluster, by_value, tmp_path):
    """The command line, which is killed and repeated; a cluster that is there, and one that is started for it."""
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{world}/pictures/{i % PICTURES:03}.png\n" for i in range(6000)))
    words = ("embed", "--encoder", world / "toy", "--images", tmp_path / "list.csv", "--engine", "ray", "--out")

    def simclr(out, *more):
        command = [sys.executable, ROOT / "cli.py", *words, out, *more]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    with simclr("out/", "--ray-address", cluster[0]) as first:
        wait_for(lambda: list((tmp_path / "out").glob("part-*")))
        first.kill()
    done = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "out").glob("part-*")}
    with simclr("out/") as second:
        assert second.wait(120) == 0, second.stderr.read()
    parts = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "out").iterdir()}
    assert done.items() <= parts.items()
    embed_to_parquet(
        open_encoder(world / "toy").manifest,
        str(tmp_path / "list.csv"),
        f"{tmp_path}/local/",
        partial(embed_here, encoder=open_encoder(world / "toy"), workers=1),
    )
    local = {part.name: part.read_bytes() for part in (tmp_path / "local").iterdir()}
    assert local == {part.name: part.read_bytes() for part in (tmp_path / "out").iterdir()}


def test_a_shard_that_kills_every_worker_is_named(world, cluster, by_value, tmp_path):
    def deadly(_spec):
        os._exit(1)

    with pytest.raises(
        SimclrError, match=r"part-0000\d\d-.*: its worker died 4 times, at one of the 20 pictures from .*\.png on"
    ):
        run(world, tmp_path / "out.parquet", on_ray(world, cluster[0], deadly))
    assert list(tmp_path.iterdir()) == []


def test_a_workers_complaint_is_handed_on(world, cluster, by_value, tmp_path):
    def other(_spec):
        return open_encoder(world / "other")

    with pytest.raises(EncoderMismatch) as caught:
        run(world, tmp_path / "out.parquet", on_ray(world, cluster[0], other))
    assert re.fullmatch(r".*/out\.parquet\.parts: planned for encoder \w+, got \w+ \(other\); .*", str(caught.value))


def test_where_there_is_no_cluster_it_says_so(ray, world, tmp_path):
    with pytest.raises(SimclrError, match=r"127\.0\.0\.1:9: no cluster to work on \(.* refused\); give its HOST:PORT, or auto"):
        run(world, tmp_path / "out.parquet", on_ray(world, "127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cpus", "workers", "share"),
    [([2], 2, 1), ([1], 2, 0.5), ([0, 16, 4], 2, 2), ([16], 3, 5), ([1], 3, 0.3333), ([0], 2, 0.5), ([2.5], 1, 2)],
)
def test_so_many_shards_fit_on_the_smallest_machine(ray, monkeypatch, cpus, workers, share):
    from serve.engines.ray_cluster import _cpus_per_shard

    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in cpus] + [{"Alive": False, "Resources": {"CPU": 0.1}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert _cpus_per_shard(workers) == share
