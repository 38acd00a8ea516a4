"""`simclr demo` as a user types it, on pictures of several kinds, through a real Triton server where there is one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from serve.identity.calibration import Calibration


def run_demo(out, *options):
    command = [sys.executable, "cli.py", "demo", "--out", str(out), "--no-app", *options]
    environment = os.environ | {"GOMP_SPINCOUNT": "0"}  # other tests may use the cores too
    return subprocess.run(command, capture_output=True, text=True, timeout=420, env=environment)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Unlabelled pictures of mixed sizes, modes and formats in one folder, two of them broken."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    kinds = [("jpg", "RGB"), ("png", "RGBA"), ("png", "L"), ("gif", "P"), ("bmp", "RGB"), ("jpg", "CMYK")]
    for number, (suffix, mode) in enumerate(kinds * 8):
        height, width = rng.integers(20, 200, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height))).convert(mode).save(folder / f"{number:03}.{suffix}")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.mark.triton
def test_unlabelled_pictures_of_mixed_kinds_go_all_the_way(mixed, tmp_path):
    done = run_demo(tmp_path / "out", "--images", str(mixed), "--minutes", "0.05")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert report["search"]["gallery"] == 48
    assert report["search"]["found_itself"] == 1
    assert report["triton"]["running"]
    assert max(value for name, value in report["transports"].items() if name != "pictures") < 1e-5
    assert not {"head", "threshold"} & set(report)
    assert "broken.jpg" in done.stderr

    again = run_demo(tmp_path / "out", "--images", str(mixed), "--minutes", "0.05")  # what is done is not done again
    assert again.returncode == 0, again.stderr
    assert "taken as it is" in again.stderr


def test_a_demo_folder_of_other_pictures_is_refused(mixed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"images": "elsewhere"}')
    done = run_demo(tmp_path, "--images", str(mixed))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("simclr: ")
    assert "--out" in done.stderr
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.triton
def test_the_generated_set_goes_all_the_way(tmp_path):
    """Seconds of training on the real demo set: every stage runs and every figure is written; quality is not asserted here."""
    done = run_demo(tmp_path / "out", "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert report["generated"]
    assert set(report["quality"]) == {"trained", "untrained", "colour_histogram"}
    assert all({"rank1", "map_step", "map_trapezoid"} <= set(figures) for figures in report["quality"].values())
    assert report["head"]["classes"] == sorted(report["head"]["classes"])
    assert report["threshold"]["fpir"]["rate"] <= report["threshold"]["asked_fpir"] == 0.1
    assert Calibration.load(tmp_path / "out" / "threshold.json").threshold == report["threshold"]["threshold"]
    assert len(report["export"]["models"]) == 5
    assert max(value for name, value in report["transports"].items() if name != "pictures") < 1e-5
    assert report["search"]["found_itself"] == 1
