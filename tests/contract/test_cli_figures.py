"""`simclr evaluate`, `reid evaluate` and `fit-head`: what they print, write and refuse."""

import json
import re

import pytest

from serve.classify import Head
from serve.encoder import open_encoder
from tests.command_line import NO_TORCH, draw, process
from tests.toy_encoder import toy_head


def test_reid_evaluate_prints_and_writes_its_figures(simclr, tmp_path):
    code, out, _ = simclr("reid", "evaluate", "--encoder", "toy", "--images", "market", "--json", tmp_path / "new" / "r.json")
    assert code == 0
    figures = json.loads((tmp_path / "new" / "r.json").read_text())
    assert (figures["queries"], figures["gallery"]) == (3, 6)
    assert re.search(rf"^rank-1 +{figures['rank1']:.2%}  \(95 %", out, re.MULTILINE)


def test_reid_evaluate_takes_vectors_and_tells_each_query(simclr, tmp_path):
    for part in ("query", "bounding_box_test"):
        assert simclr("embed", "--encoder", "toy", "--images", f"market/{part}", "--out", tmp_path / f"{part}.parquet")[0] == 0
    words = ("--query", tmp_path / "query.parquet", "--gallery", tmp_path / "bounding_box_test.parquet", "--rerank")
    code, out, _ = simclr("reid", "evaluate", *words, "--protocol", "market", "--per-query", tmp_path / "q.jsonl")
    assert (code, len((tmp_path / "q.jsonl").read_text().splitlines())) == (0, 3)
    assert out.startswith("market: Market-1501\n")


def test_reid_evaluate_tells_of_other_counts_and_of_another_protocol(simclr, refused, tmp_path):
    words = ("reid", "evaluate", "--encoder", "toy", "--images")
    assert "not the published Market-1501: query 3 (published 3,368)" in simclr(*words, "market")[2]
    assert "--strict wants the counts as published" in refused(*words, "market", "--strict")
    for i in range(4):
        draw(tmp_path / "one" / "query" / f"{i % 2}" / f"{i}.png", i)
        draw(tmp_path / "one" / "gallery" / f"{i % 2}" / f"{i + 4}.png", i + 4)
    code, out, err = simclr(*words, tmp_path / "one", "--protocol", "market")
    assert (code, out.splitlines()[0].split(":")[0]) == (0, "single-camera")
    assert "no camera is named; scored without the same-camera rule" in err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "wanted either --images, or --query and --gallery"),
        (("--images", "market", "--query", "q.parquet"), "wanted either"),
        (("--query", "q.parquet"), "wanted either"),
        (("--images", "market"), "--images needs --encoder"),
        (("--query", "q", "--gallery", "g", "--strict"), "--strict belongs to --images"),
    ],
)
def test_reid_evaluate_wants_one_kind_of_data(refused, words, complaint):
    assert complaint in refused("reid", "evaluate", *words, code=2)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_evaluate(simclr, tmp_path, protocol):
    code, out, _ = simclr(
        "evaluate", "--encoder", "toy", "--images", "pictures", "--protocol", protocol, "--json", tmp_path / "r.json"
    )
    assert code == 0
    assert out.startswith(f"{protocol} accuracy ")
    assert json.loads((tmp_path / "r.json").read_text())["protocol"] == protocol


def test_evaluate_shape_bias(simclr, refused, world, tmp_path):
    for i, name in enumerate(("cat/cat1-dog2.png", "dog/dog2-cat1.png", "dog/dog1-dog2.png")):
        draw(tmp_path / "cue" / name, i)
    head = toy_head(Head.load(world / "toy.npz").encoder_id, tuple(map(str, range(1000))))
    head.save(tmp_path / "head.npz")
    words = ("evaluate", "--encoder", "toy", "--images", tmp_path / "cue", "--protocol", "shape-bias")
    code, out, _ = simclr(*words, "--head", tmp_path / "head.npz", "--json", tmp_path / "r.json")
    assert code == 0
    assert "of 2 conflicts" in out.splitlines()[0]
    assert "differs from the literature: 3 pictures, not 1,280" in out
    assert json.loads((tmp_path / "r.json").read_text())["protocol"] == "shape-bias"
    assert "belong together" in refused(*words, code=2)
    assert "the head has 3 classes" in refused(*words, "--head", "toy.npz", code=1)


def test_fit_head(simclr, world, tmp_path):
    code, out, _ = simclr("fit-head", "--encoder", "toy", "--images", "pictures", "--out", tmp_path / "head.npz")
    assert code == 0
    assert out.startswith(f"{tmp_path}/head.npz: 2 classes, ")
    assert "held-back accuracy " in out.splitlines()[0]
    assert "takes the calibration error from" in out
    Head.load(tmp_path / "head.npz").require(open_encoder(world / "toy").encoder_id)


def test_fit_head_on_the_labels_of_a_gallery(simclr, world, tmp_path):
    words = ["--abstain", "0.4", "--balanced", "--json", tmp_path / "f.json", "--confusion", tmp_path / "c.png"]
    code, out, _ = simclr("fit-head", "--gallery", "gallery", "--where", "label != c", "--out", tmp_path / "head.npz", *words)
    assert code == 0
    assert out.startswith(f"{tmp_path}/head.npz: 2 classes, ")
    head = Head.load(tmp_path / "head.npz")
    head.require(open_encoder(world / "toy").encoder_id)
    assert head.abstain_below == 0.4
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures == {"classes": list(head.classes), **head.report}
    assert figures["balanced"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "abstains below 0.4" in out


def test_fit_head_needs_no_torch(world, tmp_path):
    done = process("fit-head", "--gallery", "gallery", "--out", tmp_path / "head.npz", before=NO_TORCH, cwd=world)
    assert done.returncode == 0, done.stderr
    assert Head.load(tmp_path / "head.npz").classes == ("a", "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "either --encoder ENC and --images SRC, or --gallery"),
        (("--encoder", "toy"), "either --encoder ENC and --images SRC, or --gallery"),
        (("--encoder", "toy", "--images", "pictures", "--gallery", "gallery"), "either --encoder"),
        (("--encoder", "toy", "--images", "pictures", "--where", "id > 1"), "--where belongs to --gallery"),
        (("--gallery", "gallery", "--abstain", "1.2"), "--abstain is 1.2, wanted 0 to 1"),
        (("--gallery", "gallery", "--accuracy", "0"), "--accuracy wants more than 0"),
        (("--gallery", "gallery", "--accuracy", "0.9", "--abstain", "0.5"), "no --abstain beside it"),
    ],
)
def test_fit_head_refuses_what_does_not_go_together(simclr, tmp_path, words, said):
    code, out, err = simclr("fit-head", *words, "--out", tmp_path / "head.npz")
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "head.npz").exists()
