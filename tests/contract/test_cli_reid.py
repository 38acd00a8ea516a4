"""`simclr reid` from enrolment to forgetting, as a user types it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.command_line import write_encoders

PEOPLE, STRANGERS, EACH = 5, 7, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two encoders, and pictures of people: each of one colour, a little different every time."""
    root = tmp_path_factory.mktemp("reid")
    write_encoders(root)
    rng = np.random.default_rng(0)
    for person in range(PEOPLE + STRANGERS):
        shirt = rng.integers(0, 256, (4, 2, 3))
        for number in range(2 * EACH):
            folder = root / ("probes" if number % 2 or person >= PEOPLE else "enrolled") / f"person-{person}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(shirt + rng.integers(-40, 40, shirt.shape), np.ones((8, 8, 1))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def gallery(done, world):
    done("reid", "enrol", "gallery", "--images", "enrolled", "--encoder", "toy")
    yield "gallery"
    shutil.rmtree(world / "gallery")


def test_from_enrolment_to_an_answer(done, gallery, world):
    image = "probes/person-1/1.png"
    assert done("reid", "identify", gallery, "--image", image).out.startswith("no threshold")
    told = done("reid", "calibrate", gallery, "--probes", "probes", "--fpir", 0.1, "--out", "t.json", "--plot", "t.png")
    assert "too few" in told.err
    assert "threshold 0." in told.out
    assert (world / "t.png").is_file()
    both = ("--image", image, "probes/person-1/3.png")
    answer = done("reid", "identify", gallery, *both, "--threshold-file", "t.json", "--json")
    decision = json.loads(answer.out)
    assert (decision["verdict"], decision["identity"], len(decision["candidates"])) == ("known", "person-1", 5)
    assert decision["probability"] > 0.5
    filtered = done("reid", "identify", gallery, "--image", image, "--where", "identity != person-1", "-k", 2, "--json")
    assert "person-1" not in [one["identity"] for one in json.loads(filtered.out)["candidates"]]
    assert len(json.loads(filtered.out)["candidates"]) == 2


def test_pictures_of_nobody_are_told_and_never_named(done, gallery, world):
    shutil.copytree(world / "probes" / "person-8", world / "mixed" / "0000")
    shutil.copytree(world / "probes" / "person-9", world / "mixed" / "person-9")
    told = done("reid", "enrol", gallery, "--images", "mixed")
    assert f"{2 * EACH} pictures are named 0000 or 0000others or -1: marks for nobody" in told.err
    named = done("reid", "identify", gallery, "--image", "probes/person-8/1.png", "-k", 20, "--json")
    assert {one["identity"] for one in json.loads(named.out)["candidates"]} == {*(f"person-{i}" for i in range(5)), "person-9"}


def test_all_enrolled_is_said(done, gallery):
    told = done("reid", "calibrate", gallery, "--probes", "enrolled", "--fpir", 0.1, "--out", "held.json")
    assert "each left out of the gallery in its turn" in told.out


def test_another_encoder_is_refused(done, refused, gallery, world):
    done("reid", "calibrate", gallery, "--probes", "probes", "--fpir", 0.1, "--out", "t.json")
    document = json.loads((world / "t.json").read_text())
    (world / "foreign.json").write_text(json.dumps(document | {"encoder_id": "feedfeedfeedfeed"}))
    got = refused("reid", "identify", gallery, "--image", "probes/person-1/1.png", "--threshold-file", "foreign.json")
    assert all(part in got for part in ("feedfeedfeedfeed", document["encoder_id"], "simclr reid calibrate"))


def test_rename_merge_split_forget(done, refused, gallery, world):
    assert done("reid", "rename", gallery, "person-0", "anna").out == "gallery: 4 items are anna now\n"
    merged = done("reid", "merge", gallery, "person-1", "person-2", "--into", "anna")
    assert merged.out == "gallery: 8 items more are anna now\n"
    refused("reid", "split", gallery, "anna", "--where", "source is known", "--into", "x")
    found = json.loads(done("reid", "identify", gallery, "--image", "probes/person-1/1.png", "--json").out)["candidates"][0]
    assert found["identity"] == "anna"
    split = done("reid", "split", gallery, "anna", "--ids", found["id"], "--into", "berta")
    assert split.out == "gallery: 1 items are berta now\n"
    assert done("reid", "forget", gallery, "anna").out.startswith("gallery: 11 items forgotten")
    assert b"anna" not in b"".join(path.read_bytes() for path in (world / gallery).rglob("*") if path.is_file())
    assert "nobody is called anna" in refused("reid", "forget", gallery, "anna")


def test_what_to_review(done, gallery, world):
    shutil.copy(world / "enrolled" / "person-0" / "0.png", world / "copy.png")
    done("reid", "enrol", gallery, "--image", "copy.png", "--identity", "double", "--camera", "2")
    told = json.loads(done("reid", "review", gallery, "--limit", 3, "--json").out)
    (first, *_), hardest = told["confusable"], told["hardest"]
    assert len(told["confusable"]) == len(hardest["queries"]) == 3
    assert (first["first"]["identity"], first["second"]["identity"], first["second"]["score"]) == ("person-0", "double", 1.0)
    assert hardest["asked"] == PEOPLE * EACH, "the one picture of a name has nobody to find"
    assert hardest["queries"][0]["average_precision"] <= hardest["mean_average_precision"] <= 1
    text = done("reid", "review", gallery).out
    assert "person-0 #1" in text.splitlines()[1]
    assert "simclr reid merge gallery ONE OTHER --into ONE" in text
    done("reid", "merge", gallery, "person-0", "double", "--into", "person-0")
    assert "double" not in done("reid", "review", gallery).out


def test_a_tracker_is_followed(done, refused, gallery, world):
    done("reid", "calibrate", gallery, "--probes", "probes", "--fpir", 0.1, "--out", "t.json", "--tracks")
    rows = [f"probes/person-{p}/{n}.png,{p},{1 + n % 2},{10 * p + n},person-{p}" for p in (1, 7) for n in (1, 3, 5, 7)]
    (world / "crops.csv").write_text("\n".join(["path,track,camera,time,identity", *rows]) + "\n")
    words = ("reid", "track", "crops.csv", "--threshold-file", "t.json", "--out", "tracks.jsonl", "--gallery", gallery)
    assert "IDF1" in done(*words).err
    lines = [json.loads(line) for line in (world / "tracks.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert lines[3]["identity"] == "person-1"
    assert len(done("reid", "track", "crops.csv", "--threshold-file", "t.json", "--encoder", "toy").out.splitlines()) == 8
    got = refused("reid", "track", "crops.csv", "--threshold-file", "t.json", "--encoder", "other")
    assert "simclr reid calibrate" in got


@pytest.mark.parametrize(
    "words",
    [
        ("enrol", "gallery"),
        ("enrol", "gallery", "--images", "enrolled", "--image", "a.png"),
        ("identify", "gallery"),
        ("calibrate", "gallery", "--probes", "probes", "--fpir", "1", "--out", "t.json"),
        ("review", "gallery", "--limit", "0"),
        ("split", "gallery", "anna", "--into", "berta"),
        ("track", "crops.csv", "--threshold-file", "t.json"),
        ("track", "crops.csv", "--threshold-file", "t.json", "--encoder", "toy", "--evidence", "0"),
    ],
)
def test_wrong_usage(simclr, words):
    assert simclr("reid", *words).code == 2


def test_pictures_of_nobody_are_not_enrolled(refused, world):
    assert "nobody says who it is" in refused("reid", "enrol", "gallery", "--image", "probes/person-1/1.png")
    assert not (world / "gallery").exists()
