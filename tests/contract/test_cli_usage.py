"""Command lines that cannot work, parts that are not installed, and readers who stop: one line, and the right exit code."""

import os
import re
import subprocess
import sys

import pytest

import serve.bulk
from tests.command_line import NO_TORCH, ROOT, name_of, one_line, process, tree


@pytest.mark.parametrize(
    "words",
    [
        ("app", "--gallery", "gallery", "--encoder", "toy", "--port", "65536"),
        ("app", "--gallery", "gallery", "--encoder", "toy", "--port=-1"),
        ("api", "--encoder", "toy", "--port", "65536"),
        ("api", "--encoder", "toy", "--threshold-file", "threshold.json"),
        ("api", "--encoder", "toy", "--at-once", "0"),
        ("api", "--encoder", "toy", "--waiting=-1"),
        ("api", "--encoder", "toy", "--max-bytes", "0"),
        ("api", "--encoder", "toy", "--rate=-1"),
        ("api", "--encoder", "toy", "--burst", "0"),
        ("api", "--encoder", "toy", "--host", "0.0.0.0"),  # noqa: S104
        ("api", "--encoder", "toy", "--host", "::"),
        ("api", "--encoder", "toy", "--host", "example"),
        ("triton", "--repository", "toy", "--http-port", "99999"),
        ("triton", "--repository", "toy", "--grpc-port", "99999"),
        ("triton", "--repository", "toy", "--metrics-port", "99999"),
        ("demo", "--port", "99999"),
        ("pretrain", "--images", "pictures", "--run", "run", "--batch-size", "1"),
        ("pretrain", "--images", "pictures", "--run", "run", "--epochs", "0"),
        ("pretrain", "--images", "pictures", "--run", "run", "--epochs", "nan"),
        ("pretrain", "--images", "pictures", "--run", "run", "--temperature", "0"),
        ("embed", "--encoder", "toy", "--images", "pictures", "--out", "o", "--workers", "0"),
        ("embed", "--encoder", "toy", "--images", "pictures", "--out", "o", "--ray-address", "auto"),
        ("gallery", "remove", "gallery"),
        ("gallery", "remove", "gallery", "1", "--where", "label = a"),
        ("gallery", "remove", "gallery", "1", "--ids-from", "list.txt"),
        ("gallery", "remove", "gallery", "--where", " "),
        ("gallery", "duplicates", "gallery", "--threshold", "0"),
        ("gallery", "duplicates", "gallery", "--threshold", "1.1"),
        ("gallery", "duplicates", "gallery", "--sheet", "sheet.gif"),
        ("gallery", "relabel", "gallery", "--label", "x"),
        ("gallery", "relabel", "gallery", "--ids", "1"),
        ("gallery", "relabel", "gallery", "--ids", "1", "--extra", "{"),
        ("gallery", "relabel", "gallery", "--ids", "1", "--extra", "[1]"),
    ],
    ids=" ".join,
)
def test_values_that_cannot_work_are_refused_before_anything_starts(refused, world, words):
    before = tree(world)
    assert "wanted" in refused(*words, code=2)
    assert tree(world) == before


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("frobnicate",),
        ("gallery",),
        ("gallery", "frobnicate"),
        ("search",),
        ("search", "--gallery", "gallery", "--image", "one/only.png", "-k", "many"),
        ("search", "--gallery", "gallery", "--image", "one/only.png", "--colour", "red"),
        ("gallery", "remove", "gallery", "one"),
        ("evaluate", "--encoder", "toy", "--images", "pictures", "--protocol", "guess"),
        ("export", "--run", "run", "--repository", "r", "--target", "tpu"),
        ("key", "me", "--scope", "root", "--keys", "keys"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2(simclr, world, words):
    before = tree(world)
    code, out, err = simclr(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "help" in err
    assert tree(world) == before


def test_ctrl_c_is_one_line_and_exit_code_130(refused, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.bulk, "embed_to_parquet", interrupt)
    assert refused("embed", "--encoder", "toy", "--images", "one", "--out", tmp_path / "o", code=130) == "simclr: interrupted"


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "--images", "pictures", "--run", "OUT"),
        ("export", "--run", "unfinished", "--repository", "OUT"),
        ("evaluate", "--encoder", "toy", "--images", "pictures"),
        ("embed", "--encoder", "damaged run", "--images", "pictures", "--out", "OUT"),
        ("demo", "--out", "OUT"),
    ],
    ids=name_of,
)
def test_without_torch_it_says_what_to_install(world, tmp_path, words):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    done = process(*words, before=NO_TORCH, cwd=world)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs torch" in one_line(done.stderr)
    assert "pip install 'simclr-serve[train]'" in done.stderr
    assert tree(tmp_path) == []


def test_without_ray_it_says_what_to_install(world, tmp_path):
    words = ("embed", "--encoder", "toy", "--images", "pictures", "--out", tmp_path / "o.parquet", "--engine", "ray")
    done = process(*words, before=NO_TORCH.replace("torch", "ray"), cwd=world)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"needs ray, .*: pip install 'simclr-serve\[scale\]'", one_line(done.stderr))
    assert tree(tmp_path) == []


def test_a_reader_that_has_seen_enough(world):
    """simclr search ... | head -1"""
    reader, writer = os.pipe()
    os.close(reader)
    words = ("search", "--gallery", "gallery", "--image", "one/only.png")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cli; cli.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=world,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""


def test_a_name_with_a_line_break_stays_one_line(refused):
    assert "no such file" in refused("embed", "--encoder", "toy", "--images", "two\nlines", "--out", "out")
