"""The `simclr` command at every door: what it prints, what it refuses, and that nothing is lost or left behind.

A failure is one line on stderr that starts with "simclr: ", and exit code 1; a wrong command line is exit code 2.
"""

from typing import NamedTuple

import pytest

import cli
from serve.encoder import open_encoder
from serve.gallery import Gallery
from serve.sources import open_source
from tests.command_line import draw, one_line, write_encoders


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two encoders, pictures of two classes, and every kind of wrong thing. Tests write into folders of their own."""
    root = tmp_path_factory.mktemp("world")
    write_encoders(root)
    for i in range(10):
        draw(root / "pictures" / "ab"[i % 2] / f"{i}.png", i)
    draw(root / "one" / "only.png")
    (root / "empty").mkdir()
    (root / "unfinished").mkdir()
    (root / "unfinished" / "config.json").write_text("{}")
    (root / "damaged run").mkdir()
    (root / "damaged run" / "encoder.json").write_text("{}")
    for i in range(12):
        path = root / "unreadable" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no picture" if i else "")
    (root / "nonsense.csv").write_bytes(b"\x00\xff\xfe nonsense\n\x80,,,\n")
    (root / "columns.csv").write_text("file;class\na.png;cat\n")
    (root / "times.csv").write_text("path,time\npictures/a/0.png,yesterday\n")
    (root / "text.txt").write_text("no picture")
    (root / "broken.zip").write_text("no archive")
    (root / "broken.npz").write_text("no head")
    for person in range(1, 4):
        for camera in (1, 2):
            draw(root / "market" / "bounding_box_test" / f"000{person}_c{camera}s1_000001_00.jpg", 10 * person + camera)
        draw(root / "market" / "query" / f"000{person}_c1s1_000002_00.jpg", person)
    encoder = open_encoder(root / "toy")
    with Gallery.open(root / "gallery", encoder, create=True) as gallery:
        gallery.add(open_source(root / "pictures").everything)
        gallery.encoder_spec = str(root / "toy")
    with Gallery.open(root / "homeless", encoder, create=True):
        pass
    (root / "no gallery").mkdir()
    (root / "no gallery" / "thesis.txt").write_text("all I have")
    return root


@pytest.fixture
def simclr(capsys, world, monkeypatch):
    """Runs one command line in this process, in the world's folder; returns what it said."""
    monkeypatch.chdir(world)

    def run(*words):
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def done(simclr):
    """Runs a command line that must succeed, and returns what it said."""

    def run(*words):
        said = simclr(*words)
        assert said.code == 0, said.err
        return said

    return run


@pytest.fixture
def refused(simclr):
    """Runs a command line that must fail with one line, and returns that line."""

    def run(*words, code=1):
        got, out, err = simclr(*words)
        assert (got, out) == (code, ""), err
        return one_line(err)

    return run
