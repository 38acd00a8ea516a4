"""`simclr embed` killed with -9 at random moments and repeated: the outcome is that of a run that nobody disturbed."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.repository import write_repository
from tests.toy_encoder import write_toy_encoder

ROOT = Path(__file__).parents[2]
ROWS, SHARD = 12_000, 1024


@pytest.fixture
def world(tmp_path):
    """An encoder, and a list that names 40 pictures again and again, two of which cannot be read."""
    root = tmp_path
    graph, manifest = write_toy_encoder(root / "source")
    write_repository(root / "toy", graph=graph, manifest=manifest, head=None, target="cpu")
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    for i in (7, 31):
        (root / f"{i}.png").write_bytes(b"no picture")
    (root / "list.csv").write_text("path,label\n" + "".join(f"{i % 40}.png,row {i}\n" for i in range(ROWS)))
    return root


def start(world, out):
    command = [sys.executable, ROOT / "cli.py", "embed", "--encoder", "toy", "--images", "list.csv", "--out", out]
    return subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(world, out):
    with start(world, out) as run:
        said, bar = run.communicate(timeout=300)
    assert (run.returncode, said) == (0, f"{out}: {ROWS - 2 * ROWS // 40} vectors\n"), bar
    return bar


def kill(world, out, folder, parts, pause_s):
    """Kill a run some time after so many parts are there. Returns: whether it was done before that."""
    with start(world, out) as run:
        while run.poll() is None and len(list(folder.glob("part-*"))) < parts:
            time.sleep(0.002)
        time.sleep(pause_s)
        run.kill()
    assert run.returncode in (0, -9)
    return run.returncode == 0


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("out", ["out.parquet", "parts/"])
def test_killed_and_repeated_it_is_as_if_undisturbed(world, out, full):
    finish(world, f"whole/{out}")
    rng = random.Random(out)  # noqa: S311
    folder = world / "broken" / ("parts" if out == "parts/" else "out.parquet.parts")
    done = {}
    for _ in range(60 if full else 4):
        if kill(world, f"broken/{out}", folder, len(done) + rng.randrange(3), rng.uniform(0, 0.2)):
            check(world, out)
            shutil.rmtree(world / "broken")
        parts = {part.name: part.stat().st_mtime_ns for part in folder.glob("part-*")}
        assert done.items() <= parts.items() or not parts, "what is finished is never made again"
        done = parts
    bar = finish(world, f"broken/{out}")
    assert f" {min(len(done) * SHARD, ROWS)}/{ROWS} " in bar.splitlines()[1], "the bar goes on where it was"
    check(world, out)


def check(world, out):
    quarantine = f"{Path(out).name}.quarantine.jsonl"
    assert contents(world / "broken" / out) == contents(world / "whole" / out)
    assert contents(world / "broken" / quarantine) == contents(world / "whole" / quarantine)
    assert {path.name for path in (world / "broken").iterdir()} == {Path(out).name, quarantine}, "nothing else is left behind"
