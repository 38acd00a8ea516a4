"""Uploads that are enrolled: kept in the gallery's folder, and gone with their items."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.errors import EncoderUnavailable, GalleryError
from serve.gallery import Gallery
from serve.identity import audit
from serve.identity.enrolment import enrol_item, enrol_upload
from serve.identity.identities import forget, rename
from serve.preprocess import ImageError
from serve.samples import Sample
from serve.storage import kept_pictures
from serve.storage.kept_pictures import keep


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def kept(gallery) -> list[Path]:
    folder = gallery.folder / "pictures"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def aged(path: Path) -> Path:
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_an_upload_is_kept_whole_and_enrolled_once(gallery):
    assert enrol_upload(gallery, encoded(1), "anna", "2", 7.0)
    assert not enrol_upload(gallery, encoded(1), "anna")
    (item,) = gallery.items()
    assert (item.identity, item.camera, item.time) == ("anna", "2", 7.0)
    assert [Path(item.source)] == [path.absolute() for path in kept(gallery)]
    assert Path(item.source).read_bytes() == encoded(1)
    assert gallery.search(encoded(1), 1)[0].score == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_enrolled_leaves_nothing(gallery, monkeypatch):
    with pytest.raises(ImageError):
        enrol_upload(gallery, b"not a picture", "anna")
    for name in ("-1", " "):
        with pytest.raises(GalleryError, match="cannot be anybody's name"):
            enrol_upload(gallery, encoded(1), name)

    def unavailable(images):
        raise EncoderUnavailable("does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(gallery.encoder, "embed", unavailable)
        with pytest.raises(EncoderUnavailable):
            enrol_upload(gallery, encoded(1), "anna")
    assert (kept(gallery), len(gallery)) == ([], 0)
    enrol_upload(gallery, encoded(1), "anna")
    with pytest.raises(GalleryError, match=r"^this picture is enrolled as anna, not berta; nothing was changed"):
        enrol_upload(gallery, encoded(1), "berta")
    assert len(kept(gallery)) == 1  # it is anna's


def test_a_folder_that_cannot_be_written_is_one_line(gallery):
    (gallery.folder / "pictures").write_bytes(b"in the way")
    with pytest.raises(GalleryError, match="cannot keep a picture") as caught:
        enrol_upload(gallery, encoded(1), "anna")
    assert "\n" not in str(caught.value)


def test_an_item_without_identity_gets_it(gallery, pictures):
    (first, second) = gallery.add([Sample(sample.source, label="x", camera="1") for sample in pictures(2)]).ids
    enrol_item(gallery, first, "anna", time=3.0)
    enrol_item(gallery, second, "anna", camera="9")
    assert [(i.label, i.identity, i.camera, i.time) for i in gallery.items()] == [
        ("x", "anna", "1", 3.0),
        ("x", "anna", "9", None),
    ]
    with pytest.raises(GalleryError, match="is enrolled as anna"):
        enrol_item(gallery, first, "berta", camera="5")
    assert gallery.item(first).camera == "1"
    assert kept(gallery) == []


def test_forgetting_and_removing_take_the_picture_along(gallery, pictures):
    (sample, *_) = pictures(1)
    gallery.add([sample])
    for seed, name in ((1, "anna"), (2, "anna"), (3, "berta")):
        enrol_upload(gallery, encoded(seed), name)
    rename(gallery, "anna", "cora")
    assert forget(gallery, "cora") == 2
    (left,) = kept(gallery)
    assert left.read_bytes() == encoded(3)
    gallery.remove(gallery.ids("identity = berta"))
    assert kept(gallery) == []
    gallery.remove(gallery.ids())
    assert Path(sample.source).is_file()  # that one is the user's


def test_removing_what_is_not_there_removes_nothing(gallery):
    enrol_upload(gallery, encoded(1), "anna")
    with pytest.raises(GalleryError, match="nothing was removed"):
        gallery.remove([*gallery.ids(), 99])
    assert len(kept(gallery)) == len(gallery) == 1


@pytest.mark.parametrize("broken", ["serve.catalog.Catalog.remove", "serve.index.Index.rebuild", "serve.catalog.Catalog.scrub"])
def test_forgetting_that_is_cut_short_goes_on(gallery, monkeypatch, broken):
    enrol_upload(gallery, encoded(1), "anna")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(broken, killed)
        with pytest.raises(KeyboardInterrupt):
            forget(gallery, "anna")
    assert kept(gallery) == []
    assert forget(gallery, "anna") == 1
    assert len(gallery) == 0
    assert [line["action"] for line in audit.lines_about(gallery.folder, "anna")][-1] == "forgotten"


def test_what_a_killed_enrolment_left_goes_with_the_next_cleaning(gallery):
    enrol_upload(gallery, encoded(1), "anna")
    enrol_upload(gallery, encoded(2), "berta")
    stray = aged(keep(gallery.folder, encoded(3)))
    half = gallery.folder / "pictures" / ".0123.png.tmp"
    half.write_bytes(b"half")
    aged(half)
    fresh = keep(gallery.folder, encoded(4))  # somebody is about to enrol it
    (used,) = [Path(item.source) for item in gallery.items("identity = berta")]
    aged(used)
    forget(gallery, "anna")
    assert {path.name for path in kept(gallery)} == {fresh.name, used.name}
    assert not stray.exists()


def test_a_gallery_that_was_moved_keeps_its_pictures_and_forgets_them(gallery, toy_encoder, tmp_path):
    for seed, name in ((1, "anna"), (2, "berta")):
        enrol_upload(gallery, encoded(seed), name)
    gallery.close()
    moved = gallery.folder.rename(tmp_path / "moved")
    with Gallery.open(moved, toy_encoder) as gallery:
        for path in kept(gallery):
            aged(path)
        forget(gallery, "anna")
        (left,) = kept(gallery)
        assert left.read_bytes() == encoded(2)


def test_pictures_of_others_are_never_unlinked(tmp_path):
    outside = tmp_path / "pictures" / "a.png"
    outside.parent.mkdir()
    outside.write_bytes(b"a")
    kept_pictures.unlink_kept(tmp_path / "gallery", [str(outside), f"{tmp_path}/gallery/pictures/../../pictures/a.png"])
    assert outside.is_file()
