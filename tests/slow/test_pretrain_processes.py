"""Pretraining as it is started and ended in earnest: kill -9, torchrun, both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
COUNT, BATCH, EPOCHS = 32, 8, 5
STEPS = COUNT * EPOCHS // BATCH
LIMIT_S = 240
PAUSED = """
import sys, time
import train.pretrain as module
from cli import main

module.CHECKPOINT_EVERY_S = 0.3  # seconds; and steps long enough to be killed between and inside checkpoints
original = module.Trainer._one_step

def slower(trainer, batches):
    time.sleep(0.15)
    return original(trainer, batches)

module.Trainer._one_step = slower
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / f"class {number % 2}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


def options(pictures: Path, run: Path, *more: str) -> list[str]:
    fixed = [
        "--width",
        "0.125",
        "--image-size",
        "16",
        "--batch-size",
        str(BATCH),
        "--epochs",
        str(EPOCHS),
        "--precision",
        "fp32",
    ]
    return ["pretrain", "--images", str(pictures), "--run", str(run), *fixed, *more]


def environment() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def simclr(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, "-m", "--", "cli", *arguments],  # without --, Python 3.11's argparse takes our --run for torchrun's
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def finish(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def kill_at_random(script: str, arguments: list[str], run: Path, seed: int) -> int:
    """Start, kill -9 somewhere between the third and the last but one step; the step that was reached."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    at = 3 + seed % (STEPS - 5)
    deadline = time.monotonic() + LIMIT_S
    while steps_of(run) < at:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    return steps_of(run)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = load_file(run / "encoder.safetensors"), load_file(other / "encoder.safetensors")
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, other)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.mark.parametrize("more", [(), ("--workers", "2", "--chunk", "3")], ids=["in memory", "streamed, in chunks"])
def test_a_run_that_was_killed_ends_with_the_same_weights(pictures: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    finish(simclr(*options(pictures, tmp_path / "whole", *more)))
    killed = tmp_path / "killed"
    reached = kill_at_random(PAUSED, options(pictures, killed, *more), killed, seed=int.from_bytes(os.urandom(4), "big"))
    assert 0 < reached < STEPS
    assert not (killed / "encoder.json").exists()
    finish(simclr(*options(pictures, killed, *more, "--resume")))
    assert_same_weights(killed, tmp_path / "whole")


def test_two_processes_with_workers_train_stop_and_go_on(pictures: Path, tmp_path: Path) -> None:
    """SIGTERM to all, as torchrun passes it on: saved after the same step everywhere, and gone on with to the same weights."""
    done = finish(torchrun(2, *options(pictures, tmp_path / "whole", "--workers", "1")))
    assert done.stdout.split() == [str(tmp_path / "whole")], "one process speaks for both"
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["world_size"], config["pictures"], config["total_steps"]) == (2, COUNT, STEPS)

    stopped = tmp_path / "stopped"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    process = subprocess.Popen(
        [*command, sys.executable, "-c", PAUSED, *options(pictures, stopped, "--workers", "1")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + LIMIT_S
    while steps_of(stopped) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert f"of {STEPS}, saved; repeat the command to go on" in errors
    assert steps_of(stopped) < STEPS

    refused = simclr(*options(pictures, stopped, "--workers", "1", "--resume"))
    assert refused.returncode == 1
    assert "world_size 2 -> 1" in refused.stderr
    finish(torchrun(2, *options(pictures, stopped, "--workers", "1", "--resume")))
    assert_same_weights(stopped, tmp_path / "whole")
