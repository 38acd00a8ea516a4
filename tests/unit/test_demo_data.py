"""The built-in demo set: its layout, that it is the same every time, and that colours alone do not solve it."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.samples import ImageSet, Sample
from serve.sources import open_source
from train import demo_data
from train.demo_data import DemoSet, draw_demo_set
from train.demo_figure import PATTERNS, Look, Pen, draw_person, look_of

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
SMALL = DemoSet(train_identities=5, test_identities=4, train_images=2, gallery_images=2, distractors=5, junk=4)
NAME = re.compile(r"(-1|\d{4})_c([1-4])s([1-6])_(\d{6})_(\d{2})\.jpg")


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def identity_and_camera(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match, path.name
    return int(match[1]), int(match[2])


def identities(folder: Path) -> set[int]:
    return {identity_and_camera(path)[0] for path in folder.glob("*.jpg")}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_demo_set(tmp_path_factory.mktemp("demo") / "set", SMALL, progress=False)


@pytest.fixture(scope="module")
def search_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = DemoSet(train_identities=1, train_images=1, test_identities=24, gallery_images=2, distractors=20, junk=4)
    return draw_demo_set(tmp_path_factory.mktemp("search") / "set", spec, progress=False)


def test_same_seed_same_bytes(small_set: Path, tmp_path: Path) -> None:
    again = draw_demo_set(tmp_path / "again", SMALL, progress=False)
    assert digests(again) == digests(small_set)


def test_another_seed_draws_other_pictures(small_set: Path, tmp_path: Path) -> None:
    other = draw_demo_set(tmp_path / "other", DemoSet(**{**vars(SMALL), "seed": 1}), progress=False)
    ours, theirs = digests(small_set), digests(other)
    pictures = {digest for name, digest in ours.items() if name.endswith(".jpg")}
    assert len(pictures) == sum(name.endswith(".jpg") for name in ours), "no two pictures are alike"
    assert pictures.isdisjoint(theirs.values())


def test_a_picture_does_not_depend_on_how_many_others_are_drawn(small_set: Path, tmp_path: Path) -> None:
    fewer = draw_demo_set(tmp_path / "fewer", DemoSet(**{**vars(SMALL), "train_images": 1, "junk": 0}), progress=False)
    shared = {name: digest for name, digest in digests(fewer).items() if name.endswith(".jpg")}
    assert shared.items() <= digests(small_set).items()


def test_counts_names_and_sizes(small_set: Path) -> None:
    assert [len(list((small_set / name).iterdir())) for name in FOLDERS] == [5 * 4 * 2, 4 * 4, 4 * 4 * 2 + 5 + 4]
    for path in small_set.glob("*/*"):
        identity_and_camera(path)
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))


def test_train_and_test_identities_are_disjoint(small_set: Path) -> None:
    train, query, gallery = (identities(small_set / name) for name in FOLDERS)
    assert (len(train), len(query)) == (SMALL.train_identities, SMALL.test_identities)
    assert train.isdisjoint(query | gallery)
    assert train | query == set(range(1, 10))


def test_every_query_has_a_match_in_another_camera(small_set: Path) -> None:
    gallery = {identity_and_camera(path) for path in (small_set / "bounding_box_test").iterdir()}
    for query in (small_set / "query").iterdir():
        identity, camera = identity_and_camera(query)
        assert any(found == identity and elsewhere != camera for found, elsewhere in gallery)


def test_junk_and_distractors_are_in_the_gallery_only(small_set: Path) -> None:
    assert all(min(identities(small_set / name)) > 0 for name in ("bounding_box_train", "query"))
    assert {-1, 0} < identities(small_set / "bounding_box_test")


def test_a_complete_set_is_reused(small_set: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    assert draw_demo_set(small_set, SMALL, progress=False) == small_set
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob("*")} == before


def test_a_set_of_another_spec_is_refused(small_set: Path) -> None:
    with pytest.raises(FileExistsError, match="wanted a new folder"):
        draw_demo_set(small_set, DemoSet(**{**vars(SMALL), "seed": 7}), progress=False)


@pytest.mark.parametrize("missing", ["query/*.jpg", "patterns_train.csv", "tracks.csv"])
def test_a_set_with_a_missing_file_is_refused(tmp_path: Path, missing: str) -> None:
    out = draw_demo_set(tmp_path / "set", SMALL, progress=False)
    next(out.glob(missing)).unlink()
    with pytest.raises(FileExistsError, match="complete set"):
        draw_demo_set(out, SMALL, progress=False)


@pytest.mark.parametrize("description", [None, "{}", "not json"])
def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path, description: str | None) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "beach.jpg").write_bytes(b"mine")
    if description is not None:
        (out / "demo_set.json").write_text(description)
    before = digests(out)
    with pytest.raises(FileExistsError, match="holiday") as refusal:
        draw_demo_set(out, SMALL, progress=False)
    assert "\n" not in str(refusal.value)
    assert digests(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    draw_demo_set(tmp_path, SMALL, progress=False)
    assert json.loads((tmp_path / "demo_set.json").read_text())["seed"] == 0


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_half_written_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    save, saved = Image.Image.save, []

    def save_ten(image: Image.Image, path: Path, **options: int) -> None:
        if len(saved) == 10:
            raise failure
        saved.append(path)
        save(image, path, **options)

    monkeypatch.setattr(demo_data.Image.Image, "save", save_ten)
    with pytest.raises(type(failure)):
        draw_demo_set(tmp_path / "set", SMALL, progress=False)
    assert len(saved) == 10
    assert list(tmp_path.iterdir()) == []


def test_what_appears_while_the_set_is_drawn_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, out = Image.Image.save, tmp_path / "set"

    def save_beside_another(image: Image.Image, path: Path, **options: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "beach.jpg").write_bytes(b"mine")
        save(image, path, **options)

    monkeypatch.setattr(demo_data.Image.Image, "save", save_beside_another)
    with pytest.raises(FileExistsError, match="holds something else"):
        draw_demo_set(out, SMALL, progress=False)
    assert list(tmp_path.iterdir()) == [out]
    assert [path.name for path in out.iterdir()] == ["beach.jpg"]


@pytest.mark.parametrize("wrong", [{"test_identities": 0}, {"junk": -1}, {"seed": -1}, {"train_identities": 9900}])
def test_impossible_counts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"demo set: got .*, wanted"):
        DemoSet(**wrong)


def patterns(root: Path, part: str) -> tuple[Sample, ...]:
    return open_source(root / f"patterns_{part}.csv").everything


def test_pattern_files_name_the_pictures_as_the_folder_does(small_set: Path) -> None:
    folder: ImageSet = open_source(small_set)
    asked_for = [sample for sample in folder.query + folder.gallery if sample.identity not in ("0000", "-1")]
    for part, samples in (("train", folder.train), ("test", asked_for)):
        listed = patterns(small_set, part)
        assert {replace(sample, label=None) for sample in listed} == set(samples)
        assert len(listed) == len(samples)
        assert all(sample.label in PATTERNS for sample in listed)


def test_pattern_files_name_pictures_relative_to_themselves(small_set: Path) -> None:
    for name in ("patterns_train.csv", "patterns_test.csv"):
        header, *rows = (small_set / name).read_text().splitlines()
        assert header == "path,label,identity,camera,time"
        assert all(row.startswith(FOLDERS) for row in rows)


def test_tracks_are_those_of_a_tracker_and_tell_nobodys_identity(small_set: Path) -> None:
    listed, known = open_source(small_set / "tracks.csv").train, open_source(small_set).train
    assert {replace(sample, identity=None) for sample in known} == {replace(sample, track=None) for sample in listed}
    identity = {sample.source: sample.identity for sample in known}
    tracks: dict[str | None, set[tuple[str | None, str | None]]] = {}
    for sample in listed:
        tracks.setdefault(sample.track, set()).add((identity[sample.source], sample.camera))
    assert len(tracks) == SMALL.train_identities * 4
    assert all(len(who_and_where) == 1 for who_and_where in tracks.values())


def test_an_identity_wears_one_pattern_and_is_in_one_pattern_file(small_set: Path) -> None:
    train, test = ({(s.identity, s.label) for s in patterns(small_set, part)} for part in ("train", "test"))
    assert len(train) == SMALL.train_identities
    assert len(test) == SMALL.test_identities
    assert {identity for identity, _ in train}.isdisjoint(identity for identity, _ in test)


def test_patterns_of_the_default_set_are_balanced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "_draw_boxes", lambda *_: None)  # the pictures take a while, and the labels are enough
    root = draw_demo_set(tmp_path / "set", progress=False)
    for part, least in (("train", 0.08), ("test", 0.05)):
        people = {sample.identity: sample.label for sample in patterns(root, part)}
        shares = {label: count / len(people) for label, count in Counter(people.values()).items()}
        assert set(shares) == set(PATTERNS)
        assert min(shares.values()) >= least


def test_every_pattern_looks_different() -> None:
    look: Look = look_of(np.random.default_rng(0))
    drawn = []
    for pattern in PATTERNS:
        canvas = Image.new("RGB", (96, 192))
        pen = Pen(canvas, foot=(48, 190), height=185, shear=0, taper=0, mirror=False)
        draw_person(pen, replace(look, pattern=pattern), "front", 0.0)
        drawn.append(np.asarray(canvas))
    for k, one in enumerate(drawn):
        for other in drawn[:k]:
            assert (one != other).any(-1).mean() > 0.02  # of all pixels; the torso is about a tenth of them


def pictures(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pictures, identities and cameras of a folder, junk left out."""
    paths = [path for path in sorted(folder.iterdir()) if identity_and_camera(path)[0] >= 0]
    known = np.array([identity_and_camera(path) for path in paths])
    return np.stack([np.asarray(Image.open(path)) for path in paths]), known[:, 0], known[:, 1]


def rank1(root: Path, describe) -> float:
    """Share of queries whose nearest picture (L1), same identity in the same camera left out, is of that identity."""
    query, query_ids, query_cameras = pictures(root / "query")
    gallery, gallery_ids, gallery_cameras = pictures(root / "bounding_box_test")
    distances = np.abs(describe(query)[:, None] - describe(gallery)[None]).sum(-1)
    same = query_ids[:, None] == gallery_ids
    distances[same & (query_cameras[:, None] == gallery_cameras)] = np.inf
    return float(np.mean(gallery_ids[distances.argmin(1)] == query_ids))


def colour_histogram(images: np.ndarray) -> np.ndarray:
    bins = (images // 32).astype(int) @ (64, 8, 1)
    return np.stack([np.bincount(image.ravel(), minlength=512) / image.size for image in bins])


def coarse_layout(images: np.ndarray) -> np.ndarray:
    """16 x 8 pixels, each channel to mean 0 and variance 1: what is where, without the camera's colour cast."""
    coarse = images.reshape(-1, 16, 8, 8, 8, 3).mean((2, 4))
    scaled = (coarse - coarse.mean((1, 2), keepdims=True)) / coarse.std((1, 2), keepdims=True)
    return scaled.reshape(len(images), -1)


def test_colours_alone_do_not_solve_it_but_layout_helps(search_set: Path) -> None:
    by_colour, by_layout = rank1(search_set, colour_histogram), rank1(search_set, coarse_layout)
    assert by_colour < 0.3
    assert by_layout > by_colour + 0.1
