"""The callbacks of the tab Identities; tests/browser looks at the tab itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.gallery import Gallery
from serve.identity import audit, people
from serve.page.desk import Desk
from serve.page.identify import IDENTIFY_HINT, decide, enrol_probe
from serve.page.people import (
    MAX_LISTED,
    MAX_PICTURES,
    forget_chosen,
    listing,
    merge_chosen,
    portrait,
    rename_chosen,
    split_chosen,
)
from serve.page.review import pairs, ranked, worst
from serve.samples import Sample
from tests.thresholds import calibration

HOSTILE = """</p><img src=x onerror=alert(1)>{{x}}${1}"' """


@pytest.fixture
def upload(tmp_path) -> str:
    path = tmp_path / "up" / "no <b>body.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def empty(tmp_path, toy_encoder, toasts) -> Iterator[Desk]:
    with Gallery.open(tmp_path / "empty", toy_encoder, create=True) as gallery:
        yield Desk(gallery, toy_encoder)


def counts(desk: Desk) -> dict[str, int]:
    return {name: desk.gallery.count(f'identity = "{name}"') for name in people.names(desk.gallery)}


def test_known_unknown_and_undecided(desk, upload):
    item = desk.gallery.items()[5]
    decided = calibration(encoder_id=desk.encoder.encoder_id, threshold=0.999)
    known = decide(desk, decided, item.source, None, None)
    assert 'sc-known" role="status"><b>1</b>' in known
    assert "score 1.000 · threshold 0.999" in known
    assert known.count("sc-card") == 4
    assert "UNKNOWN" in decide(desk, decided, item.id, None, None)  # it does not find itself
    assert "UNKNOWN" in decide(desk, decided, upload, None, None)
    undecided = decide(desk, None, upload, None, None)
    assert "Undecided" in undecided
    assert "simclr app --threshold-file FILE" in undecided
    assert undecided.count("sc-card") == 4


def test_condition_and_more_pictures(desk, upload):
    item = desk.gallery.items()[5]
    decided = calibration(encoder_id=desk.encoder.encoder_id, threshold=0.9)
    assert "UNKNOWN" in decide(desk, decided, item.source, None, "identity = nobody")
    assert "nobody enrolled is left" in decide(desk, decided, item.source, None, "identity = nobody")
    assert "sc-problem" in decide(desk, decided, item.source, None, "colour = red")
    assert "<b>1</b>" in decide(desk, decided, None, [item.source], None)
    mixed = decide(desk, decided, item.source, [upload], None)
    assert "score 1.000" not in mixed
    assert decide(desk, decided, None, None, None).count(IDENTIFY_HINT) == 1


def test_a_bad_picture_goes_by_its_name(desk, tmp_path, toasts):
    bad = tmp_path / "bad<i>.png"
    bad.write_bytes(b"not a picture")
    for answer in (decide(desk, None, str(bad), None, None), enrol_probe(desk, str(bad), None, "anna", None, None, 0)[0]):
        assert "sc-problem" in answer
        assert str(tmp_path) not in answer
    assert len(toasts) == 2
    assert not (desk.gallery.folder / "pictures").exists()


def test_a_gallery_that_outgrew_its_threshold_says_so(desk, upload):
    assert "sc-notice" not in decide(desk, calibration(encoder_id=desk.encoder.encoder_id, threshold=0.9), upload, None, None)
    grown = decide(desk, calibration(encoder_id=desk.encoder.encoder_id, threshold=0.9, identities=2), upload, None, None)
    assert "was chosen among 2 identities, now there are 4" in grown


def test_enrolling_an_upload_and_the_first_of_all(empty, upload):
    assert "nobody enrolled is left" in decide(empty, None, upload, None, None)
    said, changes = enrol_probe(empty, upload, None, f" {HOSTILE}", "2", "1970-01-01T00:01:00", 4)
    assert changes == 5
    assert "no &lt;b&gt;body.png" in said
    assert "<img" not in said
    (item,) = empty.gallery.items()
    assert (item.identity, item.camera, item.time) == (HOSTILE.strip(), "2", 60)
    assert Path(item.source).parent == empty.gallery.folder / "pictures"
    Path(upload).unlink()  # as Gradio does after a day
    for page in (decide(empty, None, item.id, None, None), listing(empty, "", None), *portrait(empty, item.identity)):
        assert "<img src=x" not in page
        assert "picture not found" not in page


def test_enrolling_an_item_of_the_gallery(desk):
    item = desk.gallery.items()[0]
    desk.gallery.relabel([item.id], identity=None)
    said, changes = enrol_probe(desk, item.id, None, "anna", "", "", 0)
    assert "enrolled as <b>anna</b>" in said
    assert (changes, desk.gallery.item(item.id).identity, desk.gallery.item(item.id).camera) == (1, "anna", item.camera)
    said, _ = enrol_probe(desk, item.id, None, "berta", "", "", 1)
    assert "is enrolled as anna, not berta; nothing was changed" in said


def test_what_is_missing_is_said(desk, upload):
    for arguments in (
        (None, None, "anna", None, None, 3),
        (upload, None, "  ", None, None, 3),
        (upload, None, None, None, None, 3),
    ):
        said, changes = enrol_probe(desk, *arguments)
        assert "sc-problem" in said
        assert changes == 3
    assert "nothing was changed" in enrol_probe(desk, upload, None, "anna", None, "noon", 3)[0]
    assert "cannot be anybody&#x27;s name" in enrol_probe(desk, upload, None, "-1", None, None, 3)[0]
    assert len(desk.gallery) == 20


@pytest.mark.milvus
def test_a_gallery_without_a_folder_says_where_to_enrol(milvus_address, toy_encoder, pictures, upload, toasts):
    (sample, *_) = pictures(1)
    with Gallery.open(milvus_address, toy_encoder, create=True) as gallery:
        (item_id,) = gallery.add([Sample(sample.source)]).ids
        desk = Desk(gallery, toy_encoder)
        said, changes = enrol_probe(desk, upload, None, "anna", None, None, 0)
        assert "simclr reid enrol" in said
        assert (changes, len(gallery)) == (0, 1)
        assert "enrolled as" in enrol_probe(desk, item_id, None, "anna", None, None, 0)[0]
        assert gallery.item(item_id).identity == "anna"


def test_the_list_is_filtered_and_bounded(desk):
    page = listing(desk, "", "2")
    assert page.count("data-name") == 4
    assert 'data-name="2" aria-current="true"' in page
    assert "5 pictures · camera 0" in page
    assert listing(desk, "2", None).count("data-name") == 1
    assert "Nobody is called so" in listing(desk, "x", None)
    names = [f"Person {i}" for i in range(MAX_LISTED + 5)]
    vectors = np.random.default_rng(0).standard_normal((len(names), 16)).astype(np.float32)
    desk.gallery.add([Sample(f"/gone/{name}.jpg", identity=name) for name in names], vectors)
    page = listing(desk, "person", None)
    assert page.count("data-name") == MAX_LISTED
    assert f"{len(names)} identities. The first {MAX_LISTED}" in page


def test_somebody_with_very_many_pictures(desk, monkeypatch):
    monkeypatch.setattr(people, "LOOKED_AT", 3)
    monkeypatch.setattr("serve.page.people.LOOKED_AT", 3)
    assert people.person(desk.gallery, "1").pictures == 5
    assert "5 pictures · camera 1 and more" in listing(desk, "1", None)
    monkeypatch.setattr("serve.page.people.MAX_PICTURES", 2)
    title, shown = portrait(desk, "1")
    assert "the first 2 are shown" in title
    assert shown.count("sc-card") == 2 < MAX_PICTURES


def test_rename_merge_split_and_forget(desk):
    assert rename_chosen(desk, "0", " anna ", 0)[1:] == ("anna", 1)
    assert merge_chosen(desk, "1", "anna", 1)[1:] == ("anna", 2)
    ids = desk.gallery.ids("identity = anna").tolist()
    assert split_chosen(desk, "anna", ids[:3], "cora", 2)[1:] == ("anna", 3)
    assert counts(desk) == {"2": 5, "3": 5, "anna": 7, "cora": 3}
    said, chosen, changes = forget_chosen(desk, "anna", "anna", 3)
    assert "7 pictures are forgotten" in said
    assert (chosen, changes) == (None, 4)
    assert counts(desk) == {"2": 5, "3": 5, "cora": 3}
    assert [line["action"] for line in audit.lines_about(desk.gallery.folder, "anna")][-1] == "forgotten"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda desk: rename_chosen(desk, "0", "1", 0), "1 is taken; nothing was changed"),
        (lambda desk: rename_chosen(desk, "0", " ", 0), "cannot be anybody"),
        (lambda desk: rename_chosen(desk, "gone", "x", 0), "nobody is called gone"),
        (lambda desk: merge_chosen(desk, "0", None, 0), "choose the other identity"),
        (lambda desk: merge_chosen(desk, "0", "0", 0), "nothing to merge"),
        (lambda desk: merge_chosen(desk, "0", "x", 0), "nobody is called x"),
        (lambda desk: split_chosen(desk, "0", [], "x", 0), "no picture is marked"),
        (lambda desk: split_chosen(desk, "0", [2], "x", 0), "item 2 is not 0&#x27;s"),
        (lambda desk: forget_chosen(desk, "0", "", 0), "type this name; nothing was changed"),
        (lambda desk: forget_chosen(desk, "0", "1", 0), "type this name; nothing was changed"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(desk, toasts, change, complaint):
    said, chosen, changes = change(desk)
    assert complaint in said
    assert "sc-problem" in said
    assert (chosen, changes) == ("gone" if "gone" in complaint else "0", 0)
    assert counts(desk) == {"0": 5, "1": 5, "2": 5, "3": 5}
    assert len(toasts) == 1


def test_a_disk_that_fails_is_said(desk, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit, "note", full)
    assert "No space left on device" in rename_chosen(desk, "0", "anna", 0)[0]


def test_review(desk):
    desk.gallery.relabel(desk.gallery.ids("identity = 0").tolist()[:2], camera="7", identity=HOSTILE)
    page = pairs(desk)
    assert page.count("<figure") == 10
    assert page.count("sc-card") == 20
    desk.gallery.relabel(desk.gallery.ids("identity = 1").tolist()[:2], camera="7")
    asked, first = worst(desk)
    assert "AP" in asked
    assert "5 asked" in asked
    assert f'data-id="{first}"' in asked
    list_of_first = ranked(desk, first)
    assert "same identity" in list_of_first
    for html in (page, asked, list_of_first):
        assert "<img src=x" not in html
    desk.gallery.remove([first])
    assert "sc-problem" in ranked(desk, first)
    assert ranked(desk, None) == ""


def test_nothing_to_review(empty):
    assert "fewer than two identities" in pairs(empty)
    assert worst(empty)[1] is None
    assert "Nobody is enrolled yet" in listing(empty, "", None)
    assert portrait(empty, None)[1] == ""
