"""Encoders that are none, or of others: what every verb says that takes one, and `simclr export`."""

import re

import pytest

from export.repository import write_repository
from serve.encoder import open_encoder
from serve.gallery import Gallery
from serve.ports import free_port
from tests.command_line import NO_TORCH, name_of, one_line, process, tree
from tests.thresholds import calibration
from tests.toy_encoder import write_toy_encoder

ENCODER_DOORS = [
    ("embed", "--images", "pictures", "--out", "OUT"),
    ("gallery", "add", "OUT", "--images", "pictures"),
    ("search", "--gallery", "gallery", "--image", "one/only.png"),
    ("evaluate", "--images", "pictures"),
    ("fit-head", "--images", "pictures", "--out", "OUT"),
    ("reid", "evaluate", "--images", "market"),
    ("app", "--gallery", "gallery"),
]
BAD_ENCODERS = {
    "missing": "wanted one folder NAME_encoder, found none",
    "": "wanted one folder NAME_encoder, found none",
    "empty": "wanted one folder NAME_encoder, found none",
    "text.txt": "wanted one folder NAME_encoder, found none",
    "**x": "wanted one folder NAME_encoder, found none",
    "unfinished": "has not written its encoder yet.*--resume",
    "damaged run": r"damaged run/encoder\.json: not a valid manifest",
    "grpc://127.0.0.1:9/toy": r"grpc://127\.0\.0\.1:9/toy: no Triton server answers.*simclr triton",
    "http://127.0.0.1:9/toy": r"http://127\.0\.0\.1:9/toy: no Triton server answers.*simclr triton",
    "grpc://127.0.0.1:99999/toy": "not the address of an encoder",
}


@pytest.mark.parametrize("door", ENCODER_DOORS, ids=name_of)
@pytest.mark.parametrize("encoder", BAD_ENCODERS)
def test_an_encoder_that_is_none(refused, tmp_path, monkeypatch, door, encoder):
    monkeypatch.setattr("serve.triton.endpoints.WAITS_S", (0.0, 0.01, 0.01))
    words = [str(tmp_path / "out") if word == "OUT" else word for word in door]
    assert re.search(BAD_ENCODERS[encoder], refused(*words, "--encoder", encoder))
    assert tree(tmp_path) == []


MISMATCHED = [
    ("search", "--gallery", "gallery", "--image", "one/only.png"),
    ("gallery", "add", "gallery", "--images", "one"),
    ("app", "--gallery", "gallery"),
]


@pytest.mark.parametrize("door", MISMATCHED, ids=name_of)
def test_the_gallery_of_another_encoder_is_refused_with_both_ids(refused, world, door):
    got = refused(*door, "--encoder", "other")
    for name in ("toy", "other"):
        assert open_encoder(world / name).encoder_id in got
    assert "simclr gallery reembed gallery --encoder" in got
    with Gallery.open(world / "gallery") as gallery:
        assert len(gallery) == 10


def test_the_head_of_another_encoder_or_none_at_all(refused):
    got = refused("app", "--gallery", "gallery", "--encoder", "toy", "--head", "other.npz")
    assert "simclr fit-head" in got
    assert "simclr fit-head" in refused("api", "--encoder", "toy", "--head", "other.npz")


def test_the_threshold_of_another_encoder_or_none_at_all(refused, tmp_path):
    calibration().save(tmp_path / "other.json")
    for file, told in (("other.json", "simclr reid calibrate"), ("none.json", "none.json: cannot be read")):
        for verb in ("api", "app"):
            assert told in refused(verb, "--encoder", "toy", "--gallery", "gallery", "--threshold-file", tmp_path / file)


def test_heads_that_are_none(refused):
    for head in ("broken.npz", "missing.npz"):
        assert head in refused("app", "--gallery", "gallery", "--encoder", "toy", "--head", head)
        assert head in refused("export", "--run", "unfinished", "--repository", "out", "--head", head)


@pytest.mark.parametrize("run", ["unfinished", "empty", "missing", "damaged run"])
def test_a_run_that_cannot_be_exported(refused, tmp_path, run):
    assert run in refused("export", "--run", run, "--repository", tmp_path / "repository")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".", "-x", "two words", "a\nb"])
def test_a_name_that_is_no_name_for_a_model(refused, tmp_path, name):
    got = refused("export", "--run", "unfinished", "--repository", tmp_path / "repository", f"--name={name}", code=2)
    assert "--name" in got
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), "one of --run RUN or --module M .* or --rollback"),
        (("--run", "unfinished", "--rollback"), "one of --run RUN"),
        (("--run", "unfinished", "--module", "m:n", "--preprocess", "s.json"), "one of --run RUN"),
        (("--module", "m:n", "--preprocess", "s.json", "--rollback"), "one of --run RUN"),
        (("--module", "m:n"), "--module needs --preprocess SPEC.json"),
        (("--run", "unfinished", "--preprocess", "s.json"), "--preprocess and --weights belong to --module"),
        (("--run", "unfinished", "--weights", "w.pt"), "--preprocess and --weights belong to --module"),
        (("--module", "m:n", "--preprocess", "s.json", "--precision", "int8"), "int8 needs --images SRC"),
        (("--run", "unfinished", "--dali", "--target", "cpu"), "--dali need a GPU"),
        (("--run", "unfinished", "--dali", "--name", "two-words"), "wanted no - in it"),
        (("--run", "unfinished", "--accept-loss"), "belong to --precision fp16 or int8"),
        (("--run", "unfinished", "--images", "one"), "belong to --precision fp16 or int8"),
        (("--run", "unfinished", "--tensorrt", "--target", "cpu"), "--tensorrt and --dali need a GPU"),
        (("--rollback", "--server", "grpc://127.0.0.1:8001"), "wanted http://host:8000"),
    ],
)
def test_export_options_that_do_not_go_together(refused, tmp_path, words, wanted):
    assert re.search(wanted, refused("export", "--repository", tmp_path / "repository", *words, code=2))
    assert tree(tmp_path) == []


def test_back_to_the_version_before_or_a_reason_why_not(simclr, refused, tmp_path):
    for seed in (0, 1):
        graph, manifest = write_toy_encoder(tmp_path / f"source{seed}", seed=seed)
        write_repository(tmp_path / "repo", graph=graph, manifest=manifest, head=None, target="cpu")
    words = ("export", "--repository", tmp_path / "repo", "--name", "toy", "--rollback")
    assert simclr(*words) == (0, f"{tmp_path / 'repo'}: toy serves version 1 again\n", "")
    assert "no earlier one" in refused(*words)
    nobody = f"http://127.0.0.1:{free_port()}"
    assert "wanted http://host:8000 of a Triton server" in refused(*words, "--server", nobody)


def test_going_back_needs_no_torch(tmp_path):
    done = process("export", "--repository", str(tmp_path), "--rollback", before=NO_TORCH)
    assert "holds no encoder simclr" in one_line(done.stderr)
