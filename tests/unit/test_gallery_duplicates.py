"""Duplicates in a gallery: groups against a slow twin, kinds, what is kept, and the reports."""

import json
import shutil
import statistics

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from serve.contact_sheet import FRAME, save_sheet
from serve.dedup.files import Files
from serve.dedup.report import as_json, read_removals, report_lines, write_removals
from serve.dedup.sheet import duplicate_sheet
from serve.dedup.stars import members, stars
from serve.duplicates import find_duplicates, typical_threshold
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.samples import Sample

DIM = 16


def unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(count, clusters, spread, seed=0):
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(clusters, DIM))[rng.integers(clusters, size=count)] + spread * rng.normal(size=(count, DIM)))


def at_degrees(*angles):
    """Vectors in one plane."""
    vectors = np.zeros((len(angles), DIM), np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
    return vectors


def samples_of(count, labelled=()):
    return [Sample(f"gone/{i}.jpg", label="cat" if i in labelled else None) for i in range(count)]


def grouped(found):
    """Kept id -> the set of the other ids."""
    return {group.keep.item.id: {copy.item.id for copy in group.others} for group in found.groups}


def slow_groups(similarity, preference, threshold):
    """Keep, best first, whoever no kept one is near enough to; the others go to the most similar kept one."""
    kept = []
    for i in preference:
        if all(similarity[i][k] < threshold for k in kept):
            kept.append(i)
    groups = {k: set() for k in kept}
    for i in preference:
        near = [k for k in kept if k != i and similarity[i][k] >= threshold]
        if i not in groups and near:
            groups[max(near, key=lambda k: (similarity[i][k], -preference.index(k)))].add(i)
    return {k: others for k, others in groups.items() if others}


def pair_similarities(vectors):
    return [[float(np.dot(one.astype(float), other.astype(float))) for other in vectors] for one in vectors]


# Groups


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(2, 60),
    clusters=st.integers(1, 12),
    spread=st.sampled_from([0.02, 0.1, 0.3]),
    threshold=st.floats(0.5, 0.99),
    labelled=st.sets(st.integers(0, 59)),
    seed=st.integers(0, 1000),
    exact=st.booleans(),
)
def test_groups_are_those_of_the_slow_twin_and_keep_what_they_promise(
    tmp_path_factory, toy_encoder, count, clusters, spread, threshold, labelled, seed, exact
):
    vectors = clustered(count, clusters, spread, seed)
    similarity = pair_similarities(vectors)
    assume(all(abs(value - threshold) > 1e-5 for line in similarity for value in line))
    preference = sorted(range(count), key=lambda i: (i not in labelled, i))
    with Gallery.open(tmp_path_factory.mktemp("g"), toy_encoder, create=True) as gallery:
        gallery.add(samples_of(count, labelled), vectors)
        found = find_duplicates(gallery, threshold, exact=exact)
        wanted = slow_groups(similarity, preference, threshold)
        assert grouped(found) == {k + 1: {i + 1 for i in others} for k, others in wanted.items()}
        for group in found.groups:
            for copy in group.others:
                assert copy.similarity == pytest.approx(similarity[group.keep.item.id - 1][copy.item.id - 1], abs=1e-5)
                assert copy.similarity >= threshold
        removed = [copy.item.id for group in found.groups for copy in group.others]
        assert len(set(removed)) == len(removed) == found.count() == found.count("near")
        gallery.remove(removed)
        assert find_duplicates(gallery, threshold, exact=exact).groups == (), "no two of those left are near each other"


def test_a_chain_does_not_join_what_is_far_apart(gallery):
    gallery.add(samples_of(13), at_degrees(*range(0, 130, 10)))
    found = find_duplicates(gallery, np.cos(np.deg2rad(12)))
    assert grouped(found) == {1: {2}, 3: {4}, 5: {6}, 7: {8}, 9: {10}, 11: {12}}
    assert max(len(group.others) for group in found.groups) == 1


def test_a_member_belongs_to_the_most_similar_of_those_that_are_kept(gallery):
    gallery.add(samples_of(3), at_degrees(0, 15, 8))
    assert grouped(find_duplicates(gallery, np.cos(np.deg2rad(10)))) == {2: {3}}


def test_however_many_copies_there_are_all_are_found_by_few_questions(gallery, monkeypatch):
    vectors = unit(np.random.default_rng(0).normal(size=(1500, DIM)))
    vectors[300:] = vectors[299]
    gallery.add(samples_of(1500), vectors)
    asked = []
    search_many = gallery.search_many
    monkeypatch.setattr(gallery, "search_many", lambda q, k, where: asked.append(len(q)) or search_many(q, k, where))
    found = find_duplicates(gallery, 0.9999)
    assert grouped(found) == {300: set(range(301, 1501))}
    assert sum(asked) < 1510, "one question for each item, and a few for the large group"


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_the_outcome_does_not_hang_on_the_order_of_work(gallery, monkeypatch, rows):
    gallery.add(samples_of(100, labelled={7, 50}), clustered(100, 9, 0.1))
    whole = find_duplicates(gallery, 0.9)
    ((items, vectors),) = gallery.rows()
    blocks = [(items[start : start + rows], vectors[start : start + rows]) for start in range(0, 100, rows)]
    monkeypatch.setattr(gallery, "rows", lambda where: iter(blocks))
    assert find_duplicates(gallery, 0.9) == whole
    assert grouped(find_duplicates(gallery, 0.9, exact=True)) == grouped(whole)


def test_only_those_that_pass_the_filter_are_compared(gallery):
    samples = [Sample(f"{i}", camera=str(i % 2)) for i in range(6)]
    gallery.add(samples, at_degrees(0, 0, 0, 0, 0, 90))
    found = find_duplicates(gallery, 0.99, "camera = 1")
    assert (grouped(found), found.items) == ({2: {4}}, 3)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_anything_there(gallery, count, exact):
    gallery.add(samples_of(count), np.ones((count, DIM), np.float32))
    found = find_duplicates(gallery, exact=exact)
    assert (found.items, grouped(found)) == (count, {1: {2}} if count == 2 else {})
    assert duplicate_sheet(found).height > 100


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_makes_no_sense(gallery, threshold):
    with pytest.raises(GalleryError, match="wanted above 0"):
        find_duplicates(gallery, threshold)


def test_what_an_index_sees_from_one_side_only_is_no_second_keeper():
    near = {0: [], 1: [0], 2: [3], 3: []}
    kept, similarity = stars([0, 1, 2, 3], lambda row: (np.array(near[row], int), np.full(len(near[row]), 0.9, np.float32)), 4)
    assert kept.tolist() == [0, 0, 2, 2]
    assert similarity[[1, 3]] == pytest.approx(0.9)
    assert members(kept) == {0: [1], 2: [3]}


def test_items_removed_meanwhile_are_left_out(gallery, monkeypatch):
    gallery.add(samples_of(6), at_degrees(0, 0, 0, 90, 90, 45))
    read = Files.read

    def remove_then_read(*arguments, **options):
        if gallery.count() == 6:
            gallery.remove([3, 4])
        return read(*arguments, **options)

    monkeypatch.setattr(Files, "read", remove_then_read)
    assert grouped(find_duplicates(gallery, 0.99)) == {1: {2}}


# The threshold


def test_the_threshold_is_a_tenth_of_the_typical_distance():
    nearest = np.random.default_rng(0).uniform(0.2, 0.9, 101).astype(np.float32)
    slow = 1 - statistics.median(1 - float(value) for value in nearest) / 10
    assert typical_threshold(nearest) == pytest.approx(slow, abs=1e-6)
    assert typical_threshold(np.empty(0, np.float32)) == 1


def test_by_default_planted_near_copies_are_found_and_nothing_else(gallery):
    vectors = unit(np.random.default_rng(0).normal(size=(400, DIM)))
    vectors[380:] = unit(vectors[:20] + 0.002 * np.random.default_rng(1).normal(size=(20, DIM)))
    gallery.add(samples_of(400), vectors)
    found = find_duplicates(gallery)
    assert found.chosen
    assert grouped(found) == {i: {380 + i} for i in range(1, 21)}


# Files


@pytest.fixture
def photo(tmp_path):
    """A picture with some structure, as a PNG file."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    picture = Image.fromarray(noise).resize((40, 48), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def add_files(gallery, *paths, **known):
    gallery.add([Sample(str(path), **known) for path in paths])


def test_the_same_file_the_same_pixels_and_near_ones_are_told_apart(gallery, photo, tmp_path):
    shutil.copy(photo, tmp_path / "copy.png")
    with Image.open(photo) as picture:
        picture.save(tmp_path / "pixels.bmp")
        ImageEnhance.Brightness(picture).enhance(0.98).save(tmp_path / "near.png")
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.png")
    add_files(gallery, *(tmp_path / name for name in ("pixels.bmp", "near.png", "other.png", "copy.png", "photo.png")))
    (group,) = find_duplicates(gallery, 0.99).groups
    assert group.keep.item.source.endswith("pixels.bmp"), "the largest file"
    assert {copy.item.source.rsplit("/")[-1]: copy.kind for copy in group.others} == {
        "photo.png": "pixels",
        "copy.png": "pixels",
        "near.png": "near",
    }
    gallery.remove([1])
    (group,) = find_duplicates(gallery, 0.99).groups
    assert [(copy.item.source.rsplit("/")[-1], copy.kind) for copy in group.others if copy.kind != "near"] == [
        ("photo.png", "file")
    ]


def test_threshold_one_leaves_what_is_equal_though_vectors_differ_in_their_last_bits(gallery, photo, tmp_path):
    shutil.copy(photo, tmp_path / "copy.png")
    with Image.open(photo) as picture:
        ImageEnhance.Brightness(picture).enhance(0.99).save(tmp_path / "near.png")
    paths = [photo, tmp_path / "copy.png", tmp_path / "near.png"]
    gallery.add([Sample(str(path)) for path in paths], at_degrees(0, 0.5, 0.4))
    found = find_duplicates(gallery, 1)
    assert grouped(found) == {1: {2}}
    assert found.groups[0].others[0].similarity < 1


def test_only_the_files_of_near_items_are_read(gallery, pictures, monkeypatch):
    samples = pictures(8)
    gallery.add(samples, at_degrees(0, 0, 20, 40, 60, 80, 100, 120))
    opened = []
    monkeypatch.setattr("serve.sources.read_bytes", lambda source: opened.append(source) or b"")
    found = find_duplicates(gallery, 0.99)
    assert sorted(opened) == [sample.source for sample in samples[:2]]
    assert len(found.unreadable) == 2


def draw(path, size, colours=256):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8))
    noise.resize((size, size), Image.Resampling.BICUBIC).quantize(colours).convert("RGB").save(path)
    return path


def test_which_one_to_keep(gallery, tmp_path):
    """Each of these beats all that come after it; the ids run the other way."""
    large, rich = draw(tmp_path / "large.png", 60), draw(tmp_path / "rich.png", 40)
    plain = draw(tmp_path / "plain.png", 40, colours=2)
    labelled, unlabelled = shutil.copy(plain, tmp_path / "b.png"), shutil.copy(plain, tmp_path / "c.png")
    best_first = [
        Sample(str(large)),
        Sample(str(rich)),
        Sample(str(labelled), identity="7"),
        Sample(str(plain)),
        Sample(str(unlabelled)),
        Sample("gone.png", label="cat"),
        Sample("gone too.png"),
    ]
    ids = [7, 6, 5, 3, 4, 1, 2]
    order = sorted(range(7), key=lambda place: ids[place])
    gallery.add([best_first[place] for place in order], np.ones((7, DIM), np.float32))
    assert rich.stat().st_size > plain.stat().st_size
    for item_id, rest in zip(ids, range(6, 0, -1), strict=False):
        (group,) = find_duplicates(gallery, 0.99).groups
        assert (group.keep.item.id, len(group.others)) == (item_id, rest)
        gallery.remove([item_id])


def test_what_cannot_be_read_any_more_is_told_in_a_line_and_grouped_by_its_vector(gallery, photo):
    gallery.add([Sample(str(photo)), *samples_of(3)], at_degrees(0, 0, 0, 90))
    found = find_duplicates(gallery, 0.99)
    assert grouped(found) == {1: {2, 3}}
    assert [copy.kind for copy in found.groups[0].others] == ["near", "near"]
    assert len(found.unreadable) == 2
    (line,) = [line for line in report_lines(found, "g", None) if line.startswith("unreadable")]
    assert "2 files" in line
    assert "gone/0.jpg: cannot be read" in line


def test_labels_and_cameras_that_differ_within_a_group(gallery):
    known = [("cat", "1"), ("dog", "1"), (None, "1"), ("cow", "1"), ("cow", "2")]
    samples = [Sample(f"{i}", label=label, camera=camera) for i, (label, camera) in enumerate(known)]
    gallery.add(samples, at_degrees(0, 0, 0, 90, 90))
    found = find_duplicates(gallery, 0.99)
    assert [group.differing for group in found.groups] == [{"label": ["cat", "dog"]}, {"camera": ["1", "2"]}]
    lines = report_lines(found, "g", None)
    assert "label differs within 1 groups" in lines
    assert any("keep" in line and line.endswith("label differs: cat, dog") for line in lines)
    assert as_json(found)["totals"]["groups_with_different_labels"] == 1


# Reports


@pytest.fixture
def found(gallery, photo, tmp_path):
    """A large group of one photo, 30 pairs of files that are gone, and one odd name."""
    angles = [0] * 12 + [angle for i in range(30) for angle in (5 + 5 * i, 5 + 5 * i)]
    copies = [shutil.copy(photo, tmp_path / f"{i}.png") for i in range(12)]
    names = [f"gone/{i}\n77\u20285.jpg" for i in range(60)]
    gallery.add([Sample(str(name), label="cat") for name in (*copies, *names)], at_degrees(*angles))
    return find_duplicates(gallery, 0.999)


def test_json_says_all(found, gallery):
    report = json.loads(json.dumps(as_json(found)))
    assert report["totals"] == {
        "items": 72,
        "groups": 31,
        "duplicates": 41,
        "file": 11,
        "pixels": 0,
        "near": 30,
        "groups_with_different_labels": 0,
    }
    assert (report["encoder_id"], report["threshold"]) == (gallery.info().encoder_id, 0.999)
    first = report["groups"][0]
    assert (first["keep"]["id"], len(first["members"])) == (1, 11)
    assert first["members"][0] == {
        **first["keep"],
        "id": 2,
        "source": first["members"][0]["source"],
        "similarity": pytest.approx(1),
        "kind": "file",
    }
    assert (first["keep"]["pixels"], report["groups"][1]["keep"]["pixels"]) == (40 * 48, None)


def test_the_text_is_short_and_ends_with_what_to_do(found):
    lines = report_lines(found, "my-gallery", None)
    assert lines[0] == ("my-gallery: 41 of 72 items are duplicates of 31 others: 11 the same file, 0 the same pixels, 30 near")
    assert len(lines) < 50
    assert "  and 6 more" in lines
    assert "and 21 more groups" in lines[-2]
    assert lines[-1].endswith("simclr gallery remove my-gallery --ids-from FILE")
    assert report_lines(found, "my-gallery", "list.txt")[-1].endswith("my-gallery --ids-from list.txt")


def test_the_list_of_what_may_go_is_read_again_whatever_the_names_are(found, gallery, tmp_path):
    write_removals(tmp_path / "list.txt", found)
    ids = read_removals(tmp_path / "list.txt")
    assert sorted(ids) == sorted(copy.item.id for group in found.groups for copy in group.others)
    gallery.remove(ids)
    assert find_duplicates(gallery, 0.999).groups == ()
    (tmp_path / "by hand.txt").write_text("# what I chose\n\n 12  why not\n7\r\n")
    assert read_removals(tmp_path / "by hand.txt") == [12, 7]


@pytest.mark.parametrize("line", ["x12", "-3", "1.5", "1,2", "\udcff".encode("utf-8", "surrogateescape")])
def test_a_list_that_is_none(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_bytes(b"4\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(GalleryError, match=r"line 2: begins with .* wanted an id; nothing was removed"):
        read_removals(path)


def test_the_sheet_shows_the_kept_one_in_a_frame_and_stays_small(found, tmp_path):
    sheet = duplicate_sheet(found)
    assert sheet.width < 1400
    assert sheet.height < 4000
    framed = (np.asarray(sheet) == FRAME).all(axis=-1)
    left, right = np.flatnonzero(framed.any(axis=0))[[0, -1]]
    assert right - left < 130, "the first column alone"
    assert framed.sum(axis=1).max() > 100
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG")):
        save_sheet(tmp_path / name, sheet)
        with Image.open(tmp_path / name) as saved:
            assert (saved.format, saved.size) == (kind, sheet.size)


def test_nothing_is_changed(gallery):
    gallery.add(samples_of(10), np.ones((10, DIM), np.float32))
    before = gallery.items()
    find_duplicates(gallery)
    assert gallery.items() == before
    assert gallery.verify() == []
