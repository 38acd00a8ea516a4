"""`simclr search`: what it prints and refuses."""

import json
import re

import pytest


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
