import numpy as np
import pytest

from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.reid import rank
from serve.samples import Sample

#          identity, camera: at growing distance from the probe
PLACED = [("7", "1"), ("7", "2"), ("-1", "2"), ("9", "1"), (None, "3"), ("7", None), ("0", "2"), ("7", "3")]


@pytest.fixture
def gallery(tmp_path, toy_encoder):
    with Gallery.open(tmp_path / "gallery", toy_encoder, create=True) as gallery:
        samples = [
            Sample(f"{i}.jpg", identity=identity, camera=camera, time=float(i)) for i, (identity, camera) in enumerate(PLACED)
        ]
        vectors = np.zeros((len(samples), 16), np.float32)
        angles = np.arange(len(samples)) * 0.1
        vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
        gallery.add(samples, vectors)
        yield gallery


PROBE = np.eye(16)[0]


def places(hits):
    return [int(hit.source.removesuffix(".jpg")) for hit in hits]


def test_the_probes_own_camera_and_junk_are_taken_out(gallery):
    hits = rank(gallery, PROBE, identity="7", camera="1")
    assert places(hits) == [1, 3, 4, 5, 6, 7]
    assert [hit.match for hit in hits] == [True, False, None, True, False, True]
    assert hits[0].score == pytest.approx(np.cos(0.1))


def test_an_unknown_probe_keeps_all_but_junk_and_no_verdicts(gallery):
    hits = rank(gallery, PROBE, camera="1")
    assert places(hits) == [0, 1, 3, 4, 5, 6, 7]
    assert {hit.match for hit in hits} == {None}


def test_a_probe_without_camera_keeps_its_own(gallery):
    assert places(rank(gallery, PROBE, identity="7")) == [0, 1, 3, 4, 5, 6, 7]


def test_other_cameras_only(gallery):
    assert places(rank(gallery, PROBE, camera="1", other_cameras_only=True)) == [1, 4, 5, 6, 7]
    assert places(rank(gallery, PROBE, camera="1", other_cameras_only=True, where="time < 6")) == [1, 4, 5]
    with pytest.raises(GalleryError, match="needs the probe's camera"):
        rank(gallery, PROBE, other_cameras_only=True)


def test_k_filters_and_exclusions(gallery):
    assert places(rank(gallery, PROBE, identity="7", camera="1", k=2)) == [1, 3]
    assert places(rank(gallery, PROBE, identity="7", camera="1", where="time >= 4", k=2)) == [4, 5]
    assert places(rank(gallery, PROBE, exclude_ids=[1, 2], k=1)) == [3]
    assert places(rank(gallery, PROBE, where=" ", k=1)) == [0]
