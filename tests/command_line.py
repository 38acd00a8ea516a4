"""For tests of the `simclr` command: pictures and encoders for it, a process of its own, what it says and leaves behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from export.repository import write_repository
from tests.toy_encoder import toy_head, write_toy_encoder

ROOT = Path(__file__).parents[1]
NO_TORCH = """
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Wall())
"""
"""Statements for `process`: torch is not installed."""


def draw(path, seed=0, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def write_encoders(root):
    """Repositories of two encoders, ROOT/toy and ROOT/other, each with a head, NAME.npz."""
    for seed, name in enumerate(("toy", "other")):
        graph, manifest = write_toy_encoder(root / "source" / name, name, seed=seed)
        write_repository(root / name, graph=graph, manifest=manifest, head=None, target="cpu")
        toy_head(manifest.encoder_id).save(root / f"{name}.npz")


def process(*words, before="", cwd=ROOT, **options):
    """`simclr` in a process of its own, after the statements `before`; -B because a full disk would spoil .pyc files."""
    code = f"import sys\n{before}\nimport cli\ncli.main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-B", "-c", code, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )


def one_line(err):
    """The complaint; progress bars and the pictures that were left out on the way do not count."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"(\w+: +\d+%\||left out: )", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith("simclr: ")
    assert "Traceback" not in err
    return lines[0]


def name_of(door):
    """The verb that a command line begins with: what its test is called."""
    return " ".join(word for word in door[:2] if not word.startswith("-"))


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
