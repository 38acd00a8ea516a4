import json

import pytest

from serve.errors import SourceError
from serve.identity.rolling import RollingReid
from serve.identity.tracks import Assignment, follow, in_time, scored, write_assignments
from serve.samples import Sample

CROPS = [(0, "1", "A", 1, "a"), (0, "1", "A", 2, "a"), (0, "5", "B", 3, "a"), (1, "2", "B", 4, "b"), (1, "2", "B", 5, "b")]
"""Picture, track, camera, time, identity."""


def crops_of(pictures):
    samples = pictures(2)
    return [Sample(samples[i].source, None, who, camera, float(time), track) for i, track, camera, time, who in CROPS]


def test_from_crops_to_identities(tmp_path, toy_encoder, pictures):
    crops = in_time(crops_of(pictures)[::-1])
    assert crops == crops_of(pictures)
    vectors = toy_encoder.embed([crop.source for crop in crops])
    found = follow(RollingReid(threshold=0.999, dim=16, evidence=2), crops, vectors)
    assert [(one.track, one.identity) for one in found] == list(
        zip("11522", (None, *["new-1"] * 2, None, "new-2"), strict=True)
    )
    assert scored(crops, found) == (pytest.approx(2 * 3 / (5 + 3)), 1)
    write_assignments(found, tmp_path / "out.jsonl")
    assert [Assignment(**json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == found


def test_without_true_identities_there_is_no_score():
    assert scored([Sample("a", identity="x"), Sample("b")], []) is None


@pytest.mark.parametrize(
    "crop",
    [Sample("a.png", camera="1", time=1), Sample("a.png", track="1", time=1), Sample("a.png", track="1", camera="1")],
)
def test_a_crop_that_lacks_something_is_named(crop):
    with pytest.raises(SourceError, match=r"a\.png: lacks track, camera or time"):
        in_time([crop])
