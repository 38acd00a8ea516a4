"""The `simclr` command at every door: what it prints, what it refuses, and that nothing is lost or left behind.

A failure is one line on stderr that starts with "simclr: ", and exit code 1; a wrong command line is exit code 2.
"""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cli
import serve.bulk
from export.repository import write_repository
from serve.classify import Head
from serve.encoder import open_encoder
from serve.gallery import Gallery
from serve.ports import free_port
from serve.sources import open_source
from tests.toy_encoder import toy_head, write_toy_encoder
from tests.unit.test_calibration import calibration

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "demo": "--images --out --minutes --no-app --port",
    "pretrain": "--images --run --arch --width --image-size --batch-size --epochs --seed --resume",
    "evaluate": "--encoder --protocol --images --test --head --save --json",
    "fit-head": "--encoder --images --gallery --where --out --balanced --abstain --accuracy --json --confusion",
    "import-weights": "--weights --run --pixels --image-size",
    "distill": "--teacher --head --images --run --arch --width --temperature --resume",
    "export": "--run --module --weights --preprocess --repository --name --head --target --tensorrt --dali --precision "
    "--images --accept-loss --rollback --server",
    "triton": "--repository --host --http-port --grpc-port --metrics-port",
    "embed": "--encoder --images --out --engine --ray-address --workers",
    "gallery add": "GALLERY --images --encoder --quarantine",
    "gallery import": "GALLERY --vectors --items --encoder --name --new-ids",
    "gallery export": "GALLERY --out --where",
    "gallery reembed": "GALLERY --encoder --drop-unreadable",
    "gallery remove": "GALLERY --ids-from --where --json",
    "gallery duplicates": "GALLERY --threshold --where --exact --json --sheet --to-remove",
    "gallery relabel": "GALLERY --ids --where --label --identity --camera --time --extra --forget --json",
    "gallery copy": "GALLERY --json",
    "gallery info": "GALLERY",
    "gallery rebuild": "GALLERY",
    "gallery tune": "GALLERY --recall --latency-ms --memory-mb",
    "gallery verify": "GALLERY --repair --json",
    "search": "--gallery --image --like -k --where --threshold --offset --json --encoder",
    "reid evaluate": "--encoder --images --query --gallery --protocol --flip --rerank --transductive --vectors --seed --strict "
    "--per-query --json",
    "reid enrol": "GALLERY --images --image --identity --camera --time --encoder",
    "reid identify": "GALLERY --image --threshold-file --where -k --encoder --json",
    "reid calibrate": "GALLERY --probes --fpir --out --tracks --where --plot --encoder",
    "reid review": "GALLERY --limit --json",
    "reid rename": "GALLERY",
    "reid merge": "GALLERY --into",
    "reid split": "GALLERY --ids --where --into",
    "reid forget": "GALLERY",
    "reid track": "--threshold-file --encoder --gallery --evidence --memory-s --out",
    "api": "--encoder --head --gallery --threshold-file --keys --open --host --port --url-hosts --rate --burst --at-once "
    "--waiting --batches --max-bytes",
    "key": "NAME --scope --keys",
    "app": "--gallery --encoder --head --threshold-file --port",
    "bench serve": "URL --images --send --clients --rate --batch --seconds --warmup-s --timeout-s --metrics-url --out --json",
}
"""DESIGN.md, section 4: names that other programs rely on."""


def draw(path, seed=0, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two encoders, pictures of two classes, and every kind of wrong thing. Tests write into folders of their own."""
    root = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("toy", "other")):
        graph, manifest = write_toy_encoder(root / "source" / name, name, seed=seed)
        write_repository(root / name, graph=graph, manifest=manifest, head=None, target="cpu")
        toy_head(manifest.encoder_id).save(root / f"{name}.npz")
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
    """Runs one command line in this process, in the world's folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(world)

    def run(*words):
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(simclr):
    """Runs a command line that must fail with one line, and returns that line."""

    def run(*words, code=1):
        got, out, err = simclr(*words)
        assert (got, out) == (code, ""), err
        return one_line(err)

    return run


def one_line(err):
    """The complaint; progress bars and the pictures that were left out on the way do not count."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"(\w+: +\d+%\||left out: )", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith("simclr: ")
    assert "Traceback" not in err
    return lines[0]


def process(*words, before="", cwd=ROOT, **options):
    """`simclr` in a process of its own, after the statements `before`; -B because a full disk would spoil .pyc files."""
    code = f"import sys\n{before}\nimport cli\ncli.main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-B", "-c", code, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What works


def test_every_verb_of_the_design_is_there():
    assert set(cli.VERBS) == set(OPTIONS)


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_names_the_options(simclr, verb):
    code, out, err = simclr(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: simclr {verb}")
    for option in OPTIONS[verb].split():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", out), f"{verb} has no {option}"
    assert cli.VERBS[verb].__doc__.split(".")[0] in " ".join(out.split())


@pytest.mark.parametrize("group", ["", "gallery", "reid"])
def test_help_of_a_group_names_its_verbs(simclr, group):
    code, out, err = simclr(*group.split(), "--help")
    assert (code, err) == (0, "")
    for verb in OPTIONS:
        if verb.startswith(group):
            assert verb.removeprefix(group).strip() in out


def test_help_answers_at_once_because_it_imports_nothing_heavy():
    before = "import atexit; atexit.register(lambda: print('LOADED', *sys.modules))"
    started = time.monotonic()
    done = process("pretrain", "--help", before=before)
    assert time.monotonic() - started < 10
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.split("LOADED ")[1].split())
    assert not loaded & {"torch", "onnxruntime", "faiss", "gradio", "pyarrow", "onnx", "tritonclient"}


def test_the_script_itself_runs():
    done = subprocess.run(
        [sys.executable, "cli.py", "search", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--where" in done.stdout


def test_a_gallery_from_the_first_picture_to_the_last(simclr, tmp_path):
    gallery = tmp_path / "gallery"
    code, out, err = simclr("gallery", "add", gallery, "--images", "pictures", "--encoder", "toy")
    assert (code, out) == (0, f"{gallery}: 10 added, 0 were there, 10 in all\n")
    assert "10/10" in err
    draw(tmp_path / "more" / "new.png", 99)
    code, out, _ = simclr("gallery", "add", gallery, "--images", tmp_path / "more")  # with the encoder it knows
    assert (code, out) == (0, f"{gallery}: 1 added, 0 were there, 11 in all\n")
    assert simclr("gallery", "add", gallery, "--images", "pictures")[1] == f"{gallery}: 0 added, 10 were there, 11 in all\n"
    assert simclr("gallery", "verify", gallery)[:2] == (0, f"{gallery}: 11 items, all well\n")
    code, out, _ = simclr("gallery", "info", gallery, "--json")
    info = json.loads(out)
    assert (info["count"], info["encoder_name"], info["embedding_dim"]) == (11, "toy", 8)
    assert "encoder_id     " + info["encoder_id"] in simclr("gallery", "info", gallery)[1]
    assert simclr("gallery", "remove", gallery, 2, 3)[:2] == (0, f"{gallery}: 2 removed, 9 left\n")
    assert simclr("gallery", "rebuild", gallery)[:2] == (0, f"{gallery}: index of 9 items rebuilt\n")
    for name, there in (("a/2.png", False), ("a/4.png", False), ("a/6.png", True)):  # sorted: the second and the third
        code, out, err = simclr("search", "--gallery", gallery, "--image", f"pictures/{name}", "-k", 3)
        assert (code, err, len(out.splitlines())) == (0, "", 3)
        assert (name in out) is there


def test_search_prints_for_people_and_for_programs(simclr, world):
    query = world / "pictures" / "b" / "3.png"
    code, out, err = simclr("search", "--gallery", "gallery", "--image", query, "-k", 4)
    assert (code, err) == (0, "")
    first, *_ = lines = out.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(rf"  1  1\.0000  #\d+  {re.escape(str(query))}  label=b", first)
    code, out, _ = simclr("search", "--gallery", "gallery", "--image", query, "--k", 4, "--json", "--encoder", "toy")
    hits = json.loads(out)
    assert [hit["source"] for hit in hits] == [line.split()[3] for line in lines]
    assert set(hits[0]) == {"id", "source", "label", "identity", "camera", "time", "extra", "score"}
    code, out, _ = simclr("search", "--gallery", "gallery", "--image", query, "--where", "label = a", "--json")
    assert {hit["label"] for hit in json.loads(out)} == {"a"}
    assert simclr("search", "--gallery", "gallery", "--image", query, "--where", "label = x") == (0, "", "")


def test_search_by_page_and_by_threshold(simclr, world):
    ask = ("search", "--gallery", "gallery", "--image", world / "pictures" / "b" / "3.png")
    everything = simclr(*ask)[1].splitlines()
    assert len(everything) == 10
    assert simclr(*ask, "-k", 4, "--offset", 3)[1].splitlines() == everything[3:7]
    scores = [hit["score"] for hit in json.loads(simclr(*ask, "--json")[1])]
    assert simclr(*ask, "--threshold", scores[5] - 1e-6)[1].splitlines() == everything[:6]
    assert simclr(*ask, "--threshold", -1, "--offset", 2, "-k", 3)[1].splitlines() == everything[2:5]


@pytest.fixture
def own_gallery(world, tmp_path):
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.add(open_source(world / "pictures").everything)
    return tmp_path / "gallery"


def test_tune(simclr, own_gallery):
    code, out, _ = simclr("gallery", "tune", own_gallery, "--recall", 0.99)
    assert (code, out) == (0, f"{own_gallery}: exact; 10 vectors, 0 changes not yet in index/\n")
    assert json.loads((own_gallery / "index" / "base-000002" / "index.json").read_text())["content"]["header"]["limits"] == {
        "recall": 0.99,
        "latency_ms": 5.0,
        "memory_mb": None,
    }
    code, out, err = simclr("gallery", "tune", own_gallery, "--recall", 2)
    assert (code, out) == (1, "")
    assert "wanted recall above 0" in err


def test_relabel(simclr, own_gallery):
    said = simclr(
        "gallery", "relabel", own_gallery, "--where", "label = a", "--label", "cat", "--time", 2, "--extra", '{"x": 1}'
    )
    assert said == (0, f"{own_gallery}: 5 relabelled\n", "")
    assert simclr("gallery", "relabel", own_gallery, "--ids", 1, 2, "--forget", "label", "--json")[1] == '{"relabelled": 2}\n'
    with Gallery.open(own_gallery) as gallery:
        assert [item.label for item in gallery.items()] == [None, None, *["cat"] * 3, *["b"] * 5]
        assert (gallery.item(3).time, gallery.item(3).extra) == (2.0, {"x": 1})


def test_your_own_vectors_in_and_out_and_another_encoder(simclr, refused, world, tmp_path):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((10, 8)))
    (tmp_path / "names.txt").write_text("".join(f"{path}\n" for path in sorted((world / "pictures").rglob("*.png"))))
    load = ("gallery", "import", tmp_path / "mine", "--vectors", tmp_path / "v.npy", "--items", tmp_path / "names.txt")
    assert "--encoder ENC, or --name NAME" in refused(*load)
    assert simclr(*load, "--name", "old")[:2] == (0, f"{tmp_path}/mine: 10 added, 0 were there, 10 in all\n")
    assert simclr(*load, "--name", "old")[:2] == (0, f"{tmp_path}/mine: 0 added, 10 were there, 10 in all\n")
    code, out, _ = simclr("search", "--gallery", tmp_path / "mine", "--like", 4, "-k", 2)
    assert (code, out.splitlines()[0]) == (0, f"  1  1.0000  #4  {world}/pictures/a/6.png")
    assert "--encoder" in refused("search", "--gallery", tmp_path / "mine", "--image", "one/only.png")
    out = tmp_path / "half.parquet"
    saved = simclr("gallery", "export", tmp_path / "mine", "--out", out, "--where", "label is unknown")
    assert saved[:2] == (0, f"{out}: 10 items\n")
    assert simclr("gallery", "import", tmp_path / "copy", "--vectors", out)[0] == 0
    code, told, _ = simclr("gallery", "reembed", tmp_path / "copy", "--encoder", "other")
    identity = open_encoder(world / "other").encoder_id
    assert (code, told) == (0, f"{tmp_path}/copy: 10 items of encoder {identity}, 0 removed\n")
    assert simclr("search", "--gallery", tmp_path / "copy", "--image", "pictures/b/3.png", "-k", 1)[1].split()[2] == "#7"


def test_remove_by_filter_tells_how_many(simclr, own_gallery):
    assert simclr("gallery", "remove", own_gallery, "--where", "label = a")[:2] == (0, f"{own_gallery}: 5 removed, 5 left\n")
    assert simclr("gallery", "remove", own_gallery, "--where", "label = a")[:2] == (0, f"{own_gallery}: 0 removed, 5 left\n")
    assert json.loads(simclr("gallery", "remove", own_gallery, 7, "--json")[1]) == {"removed": 1, "left": 4}


def test_duplicates_are_found_listed_and_removed_in_two_steps(simclr, refused, own_gallery, world, tmp_path):
    pictures = tmp_path / "more"
    pictures.mkdir()
    for name in ("0.png", "2.png"):
        shutil.copy(world / "pictures" / "a" / name, pictures / name)
    simclr("gallery", "add", own_gallery, "--images", pictures, "--encoder", "toy")
    ask = ("gallery", "duplicates", own_gallery, "--threshold", 1)
    files = ("--json", tmp_path / "d.json", "--sheet", tmp_path / "d.jpg", "--to-remove", tmp_path / "d.txt")
    code, out, err = simclr(*ask, *files)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == (
        f"{own_gallery}: 2 of 12 items are duplicates of 2 others: 2 the same file, 0 the same pixels, 0 near"
    )
    assert out.splitlines()[-1] == f"nothing was removed; simclr gallery remove {own_gallery} --ids-from {tmp_path}/d.txt"
    report = json.loads((tmp_path / "d.json").read_text())
    assert [group["keep"]["id"] for group in report["groups"]] == [1, 2]
    assert [[copy["id"] for copy in group["members"]] for group in report["groups"]] == [[11], [12]]
    assert json.loads(simclr(*ask, "--json", "-")[1]) == report
    with Image.open(tmp_path / "d.jpg") as sheet:
        assert sheet.format == "JPEG"
    (tmp_path / "x.txt").write_text("11\nall of them\n")
    assert "line 2" in refused("gallery", "remove", own_gallery, "--ids-from", tmp_path / "x.txt")
    refused("gallery", "remove", own_gallery, "--ids-from", tmp_path / "no such list")
    removed = simclr("gallery", "remove", own_gallery, "--ids-from", tmp_path / "d.txt")
    assert removed[:2] == (0, f"{own_gallery}: 2 removed, 10 left\n")
    assert simclr(*ask)[1].startswith(f"{own_gallery}: 0 of 10 items are duplicates")


def test_embed_tells_what_it_left_out(simclr, world, tmp_path):
    draw(tmp_path / "mixed" / "good.png")
    for i in range(12):
        (tmp_path / "mixed" / f"bad{i:02}.png").write_text("no picture")
    code, out, err = simclr("embed", "--encoder", "toy", "--images", tmp_path / "mixed", "--out", tmp_path / "o.parquet")
    assert (code, out) == (0, f"{tmp_path}/o.parquet: 1 vectors\n")
    told = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert told[0] == f"left out: {tmp_path}/mixed/bad00.png: not a readable picture (not a picture in a known format)"
    assert len(told) == 11
    assert told[-1] == f"left out: 12 in all, listed in {tmp_path}/o.parquet.quarantine.jsonl"
    assert len((tmp_path / "o.parquet.quarantine.jsonl").read_text().splitlines()) == 12
    assert pq.read_table(tmp_path / "o.parquet")["source"].to_pylist() == [str(tmp_path / "mixed" / "good.png")]


def test_embed_into_a_folder(simclr, world, tmp_path):
    assert simclr("embed", "--encoder", "toy", "--images", "pictures", "--out", f"{tmp_path}/o/")[:2] == (
        0,
        f"{tmp_path}/o/: 10 vectors\n",
    )
    assert pq.read_table(tmp_path / "o").num_rows == 10


@pytest.mark.parametrize("words", [(), ("--quarantine", "LIST")])
def test_gallery_add_lists_what_it_left_out(simclr, world, tmp_path, words):
    draw(tmp_path / "mixed" / "good.png")
    (tmp_path / "mixed" / "bad.png").write_text("no picture")
    listed = tmp_path / ("list.jsonl" if words else "g/quarantine.jsonl")
    words = [listed if word == "LIST" else word for word in words]
    code, _, err = simclr("gallery", "add", tmp_path / "g", "--images", tmp_path / "mixed", "--encoder", "toy", *words)
    assert (code, f"left out: 1 in all, listed in {listed}" in err) == (0, True)
    assert json.loads(listed.read_text())["source"] == str(tmp_path / "mixed" / "bad.png")
    assert simclr("gallery", "verify", tmp_path / "g")[0] == 0


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


def test_api(world):
    command = [sys.executable, ROOT / "cli.py", "api", "--encoder", "toy", "--head", "toy.npz", "--port", "0", "--at-once", "3"]
    with subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            url = re.fullmatch(r"the API is at (http://127.0.0.1:\d+) \(Ctrl-C ends it\)\n", running.stdout.readline())[1]
            picture = (world / "one" / "only.png").read_bytes()
            request = urllib.request.Request(f"{url}/v1/classify", picture, {"Content-Type": "image/png"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert json.load(answer)["results"][0]["label"] in ("cat", "dog", "é cow")
            with urllib.request.urlopen(f"{url}/v1/info", timeout=20) as answer:
                assert json.load(answer)["limits"]["at_once"] == 3
        finally:
            running.terminate()
        assert running.wait(20) == 0
        assert running.stderr.read() == ""


def test_api_of_a_gallery_behind_keys(simclr, world, tmp_path):
    code, secret, err = simclr("key", "me", "--scope", "admin", "--keys", tmp_path / "keys")
    assert code == 0
    assert secret.strip() not in err
    assert secret.strip() not in (tmp_path / "keys").read_text()
    command = [sys.executable, ROOT / "cli.py", "api", "--encoder", "toy", "--gallery", "gallery", "--keys", tmp_path / "keys"]
    command += ["--port", "0", "--host", "0.0.0.0", "--threshold-file", tmp_path / "threshold.json"]  # noqa: S104
    calibration(encoder_id=Head.load(world / "toy.npz").encoder_id).save(tmp_path / "threshold.json")
    with subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, text=True) as running:
        try:
            url = f"http://127.0.0.1:{running.stdout.readline().split(':')[-1].split()[0]}"
            asked = urllib.request.Request(f"{url}/v1/items", headers={"Authorization": f"Bearer {secret.strip()}"})
            with urllib.request.urlopen(asked, timeout=20) as answer:
                assert json.load(answer)["total"] == 10
            header = {"Authorization": f"Bearer {secret.strip()}", "Content-Type": "application/json"}
            asked = urllib.request.Request(f"{url}/v1/reid/identify", b'{"id": 1}', header)
            with urllib.request.urlopen(asked, timeout=20) as answer:
                assert json.load(answer)["threshold"] == 0.7
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/v1/items", timeout=20)
        finally:
            running.terminate()
        assert running.wait(20) == 0


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


# What does not: sources


SOURCE_DOORS = [
    ("embed", "--encoder", "toy", "--out", "OUT"),
    ("gallery", "add", "OUT", "--encoder", "toy"),
    ("fit-head", "--encoder", "toy", "--out", "OUT"),
    ("evaluate", "--encoder", "toy"),
    ("reid", "evaluate", "--encoder", "toy"),
    ("pretrain", "--run", "OUT", "--batch-size", "2"),
]
BAD_SOURCES = {
    "missing": "missing: no such file or folder",
    "": "no such file or folder",
    "empty": "empty: holds no pictures",
    "text.txt": "text.txt: wanted a folder, .csv, .parquet, .zip or .tar",
    "pictures/a/0.png": "0.png: wanted a folder, .csv, .parquet, .zip or .tar",
    "nonsense.csv": r"nonsense\.csv: not a CSV file",
    "columns.csv": r"columns\.csv: columns are \['file;class'\]",
    "times.csv": r"times\.csv, line 2: .*yesterday",
    "broken.zip": r"broken\.zip: not a readable archive",
    "unreadable": "can be read",
}


@pytest.mark.parametrize(
    "door", SOURCE_DOORS, ids=lambda door: " ".join(door[:2]) if door[0] in ("gallery", "reid") else door[0]
)
@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_source_that_cannot_be_used(refused, world, tmp_path, door, source):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in door]
    assert re.search(BAD_SOURCES[source], refused(*words, "--images", source))
    if door[0] != "gallery":  # an empty gallery is a gallery
        assert tree(tmp_path) == []


NO_LABELS = [("evaluate",), ("evaluate", "--protocol", "linear"), ("fit-head", "--out", "OUT")]


@pytest.mark.parametrize("door", NO_LABELS, ids=" ".join)
def test_one_picture_without_a_label_teaches_nothing(refused, tmp_path, door):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in door]
    got = refused(*words, "--encoder", "toy", "--images", "one")
    assert "label" in got or "class" in got
    assert tree(tmp_path) == []


def test_one_picture_is_not_enough_to_pretrain(refused, tmp_path):
    assert "pictures" in refused("pretrain", "--images", "one", "--run", tmp_path / "run")


def test_one_picture_is_enough_to_embed_and_to_search(simclr, world, tmp_path):
    assert simclr("embed", "--encoder", "toy", "--images", "one", "--out", tmp_path / "o.parquet")[0] == 0
    assert simclr("gallery", "add", tmp_path / "g", "--images", "one", "--encoder", "toy")[0] == 0
    code, out, _ = simclr("search", "--gallery", tmp_path / "g", "--image", "one/only.png")
    assert (code, len(out.splitlines())) == (0, 1)


# What does not: encoders


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


def name_of(door):
    return " ".join(word for word in door[:2] if not word.startswith("-"))


@pytest.mark.parametrize("door", ENCODER_DOORS, ids=name_of)
@pytest.mark.parametrize("encoder", BAD_ENCODERS)
def test_an_encoder_that_is_none(refused, tmp_path, monkeypatch, door, encoder):
    monkeypatch.setattr("serve.triton.endpoints.WAITS_S", (0.0, 0.01, 0.01))
    words = [str(tmp_path / "out") if word == "OUT" else word for word in door]
    assert re.search(BAD_ENCODERS[encoder], refused(*words, "--encoder", encoder))
    assert tree(tmp_path) == []


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


# What does not: galleries


GALLERY_DOORS = [
    ("gallery", "info", "GALLERY"),
    ("gallery", "rebuild", "GALLERY"),
    ("gallery", "verify", "GALLERY"),
    ("gallery", "remove", "GALLERY", "1"),
    ("gallery", "relabel", "GALLERY", "--where", "camera = 1", "--label", "x"),
    ("gallery", "add", "GALLERY", "--images", "one"),
    ("search", "--gallery", "GALLERY", "--image", "one/only.png"),
    ("search", "--gallery", "GALLERY", "--image", "one/only.png", "--encoder", "toy"),
    ("app", "--gallery", "GALLERY", "--encoder", "toy"),
]


@pytest.mark.parametrize("door", GALLERY_DOORS, ids=" ".join)
@pytest.mark.parametrize("gallery", ["missing", "empty", "no gallery", "text.txt", "milvus://host:1/c"])
def test_a_gallery_that_is_none(refused, world, door, gallery):
    before = tree(world)
    assert gallery in refused(*(gallery if word == "GALLERY" else word for word in door))
    assert tree(world) == before


@pytest.mark.parametrize("gallery", ["no gallery", "text.txt", "milvus://host:1/c"])
def test_where_no_gallery_can_be_made(refused, world, gallery):
    before = tree(world)
    assert gallery in refused("gallery", "add", gallery, "--images", "one", "--encoder", "toy")
    assert tree(world) == before


def test_a_gallery_whose_encoder_is_unknown_or_gone(refused, world, tmp_path):
    got = refused("search", "--gallery", "homeless", "--image", "one/only.png")
    assert "give --encoder" in got
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.encoder_spec = "/gone"
    assert "/gone" in refused("search", "--gallery", tmp_path / "gallery", "--image", "one/only.png")


@pytest.mark.parametrize("ids", [(999,), (1, 999), (0,), (99999999999999999999,)])
def test_an_unknown_id_removes_nothing(refused, world, ids):
    assert f"no item with id {ids[-1]}; nothing was removed" in refused("gallery", "remove", "gallery", *ids)
    with Gallery.open(world / "gallery") as gallery:
        assert len(gallery) == 10


@pytest.mark.parametrize(
    "where", ["label", "label ~ a", "colour = red", "label = a xor label = b", "label < b", "time > soon", "'"]
)
def test_a_filter_that_makes_no_sense(refused, where):
    got = refused("search", "--gallery", "gallery", "--image", "one/only.png", "--where", where)
    assert "wanted conditions joined by `and`" in got


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--offset", "-1"), "offset is -1"),
        (("--threshold", "2"), "threshold is 2"),
        (("--threshold", "0.5", "-k", "0"), "k is 0"),
    ],
)
def test_a_page_that_cannot_be(refused, words, complaint):
    assert complaint in refused("search", "--gallery", "gallery", "--image", "one/only.png", *words)


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_one(refused, k):
    assert f"k is {k}" in refused("search", "--gallery", "gallery", "--image", "one/only.png", f"--k={k}")


@pytest.mark.parametrize("image", ["missing.png", "text.txt", "pictures", "unreadable/a/0.png", ""])
def test_a_query_that_is_no_picture(refused, image):
    assert "not a readable picture" in refused("search", "--gallery", "gallery", "--image", image)


def test_a_damaged_gallery(simclr, world, tmp_path):
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.add(open_source(world / "pictures").everything)
    database = sqlite3.connect(tmp_path / "gallery" / "catalog.sqlite")
    database.execute("UPDATE vectors SET vector = x'00' WHERE id < 4")
    database.commit()
    database.close()
    code, out, err = simclr("gallery", "verify", tmp_path / "gallery")
    assert code == 1
    assert [f"item {i}: vector of 1 bytes, wanted 32" in out for i in (1, 2, 3)] == [True] * 3
    problems = out.splitlines()
    assert f"{len(problems)} problems; --repair" in one_line(err)
    code, out, err = simclr("gallery", "verify", tmp_path / "gallery", "--repair", "--json")
    report = json.loads(out)
    assert (code, report["items"], report["found"]) == (1, 10, problems)
    assert f"not repaired: {report['left'][0]}" in one_line(err)
    assert simclr("gallery", "remove", tmp_path / "gallery", 1, 2, 3)[0] == 0
    assert simclr("gallery", "verify", tmp_path / "gallery")[:2] == (0, f"{tmp_path / 'gallery'}: 7 items, all well\n")


def test_an_sqlite_index_that_lost_an_item_is_repaired(simclr, own_gallery):
    with closing(sqlite3.connect(own_gallery / "catalog.sqlite")) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'items_label'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    content = bytearray((own_gallery / "catalog.sqlite").read_bytes())
    content[page * size - 2] ^= 1  # the last bytes of its page are its first entry: a label and an id
    (own_gallery / "catalog.sqlite").write_bytes(content)
    code, out, _ = simclr("gallery", "verify", own_gallery)
    assert (code, "missing from index items_label" in out) == (1, True)
    assert simclr("gallery", "verify", own_gallery, "--repair")[:2] == (0, f"{out}{own_gallery}: 10 items, repaired\n")
    assert simclr("gallery", "verify", own_gallery)[:2] == (0, f"{own_gallery}: 10 items, all well\n")


def test_a_catalog_that_is_no_database(refused, world, tmp_path):
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "catalog.sqlite").write_text("not a database, but long enough to look at" * 100)
    assert "catalog.sqlite" in refused("gallery", "info", tmp_path / "gallery")


# What does not: ports, usage, interruptions, missing parts


@pytest.fixture
def busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_busy_port(refused, busy_port):
    got = refused("app", "--gallery", "gallery", "--encoder", "toy", "--port", busy_port)
    assert f"port {busy_port}" in got
    assert "--port" in got
    assert f"port {busy_port} is busy" in refused("api", "--encoder", "toy", "--port", busy_port)
    for kind in ("http", "grpc", "metrics"):
        ports = [f"--{other}-port={busy_port if other == kind else 0}" for other in ("http", "grpc", "metrics")]
        got = refused("triton", "--repository", "toy", *ports)
        assert f"port {busy_port} cannot be used" in got
        assert f"--{kind}-port" in got


@pytest.mark.parametrize("repository", ["empty", "missing", "pictures", "text.txt"])
def test_nothing_to_serve(refused, repository):
    assert "no Triton models" in refused("triton", "--repository", repository)


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


NO_TORCH = """
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Wall())
"""


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


# A full disk


def limited(size):
    """The process may write no file beyond `size` bytes: what a full disk looks like, from inside one process."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")


@needs_limits
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_while_saving_vectors(world, tmp_path, old):
    out = tmp_path / "out.parquet"
    if old:
        out.write_text("old")
    done = process("embed", "--encoder", "toy", "--images", "pictures", "--out", out, before=limited(1000), cwd=world)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in one_line(done.stderr)
    assert tree(tmp_path) == ["out.parquet"] * old
    assert not old or out.read_text() == "old"


@needs_limits
def test_a_full_disk_while_saving_figures(world, tmp_path):
    words = ("reid", "evaluate", "--encoder", "toy", "--images", "market", "--json", tmp_path / "r.json")
    done = process(*words, before=limited(20), cwd=world)
    assert done.returncode == 1
    assert "File too large" in one_line(done.stderr)
    assert tree(tmp_path) == []


@needs_limits
def test_a_full_disk_while_adding_to_a_gallery(world, tmp_path):
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy"), create=True) as gallery:
        gallery.add(open_source(world / "pictures").everything)
        gallery.encoder_spec = str(world / "toy")
    before = tree(tmp_path / "gallery")
    data = (world / "one" / "only.png").read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(600):
        (tmp_path / "many" / f"{'x' * 150}{i}.png").write_bytes(data)
    size = max(path.stat().st_size for path in (tmp_path / "gallery").iterdir())
    done = process("gallery", "add", tmp_path / "gallery", "--images", tmp_path / "many", before=limited(size + 100_000))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is the disk full" in one_line(done.stderr)
    with Gallery.open(tmp_path / "gallery", open_encoder(world / "toy")) as gallery:
        assert len(gallery) >= 10
        assert gallery.verify() == []
        assert gallery.search(world / "pictures" / "a" / "0.png", 1)[0].score > 0.999
    assert set(tree(tmp_path / "gallery")) <= {*before, "catalog.sqlite-wal", "catalog.sqlite-shm"}


@needs_limits
def test_a_full_disk_while_making_a_gallery(world, tmp_path):
    done = process(
        "gallery", "add", tmp_path / "g", "--images", "pictures", "--encoder", "toy", before=limited(3000), cwd=world
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "is the disk full" in one_line(done.stderr)
    done = process("gallery", "add", tmp_path / "g", "--images", "pictures", "--encoder", "toy", cwd=world)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/g: 10 added, 0 were there, 10 in all\n")


def test_where_nothing_can_be_written(refused, world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "keep").touch()
    before = tree(tmp_path)
    for out in (tmp_path / "file" / "out.parquet", tmp_path / "folder", Path("/proc/none/out.parquet")):
        refused("embed", "--encoder", "toy", "--images", "one", "--out", out)
    refused("fit-head", "--encoder", "toy", "--images", "pictures", "--out", tmp_path / "folder")
    refused("gallery", "add", tmp_path / "file" / "gallery", "--images", "one", "--encoder", "toy")
    assert tree(tmp_path) == before
    assert (tmp_path / "file").read_text() == "in the way"
