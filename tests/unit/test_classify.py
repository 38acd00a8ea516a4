from dataclasses import replace

import numpy as np
import pytest

from serve.classify import Head, load_heads
from serve.errors import ContractError, EncoderMismatch
from tests.toy_encoder import DIM, toy_head


def test_a_saved_head_comes_back_the_same(tmp_path):
    head = toy_head("abc")
    head.save(tmp_path / "head.npz")
    back = Head.load(tmp_path / "head.npz")
    np.testing.assert_array_equal(back.weight, head.weight)
    np.testing.assert_array_equal(back.bias, head.bias)
    assert (back.classes, back.encoder_id, back.report) == (head.classes, "abc", {"accuracy": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]


def test_probabilities_are_the_softmax_written_out():
    head = toy_head("abc")
    vectors = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    for row, vector in zip(head.probabilities(vectors), vectors, strict=True):
        powers = [
            np.exp(sum(w * v for w, v in zip(line, vector, strict=True)) + b)
            for line, b in zip(head.weight, head.bias, strict=True)
        ]
        np.testing.assert_allclose(row, np.array(powers) / sum(powers), rtol=1e-5)


def test_huge_logits_do_not_overflow():
    head = Head(weight=np.array([[1e4], [-1e4]], np.float32), bias=np.zeros(2, np.float32), classes=("a", "b"), encoder_id="x")
    np.testing.assert_array_equal(head.probabilities(np.ones((1, 1), np.float32)), [[1, 0]])


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), the head wants \(N, 8\)"):
        toy_head("abc").probabilities(np.ones((2, 3), np.float32))


def test_another_encoder_is_refused_with_both_ids_and_the_repair():
    toy_head("abc").require("abc")
    with pytest.raises(EncoderMismatch, match=r"abc.*xyz.*simclr fit-head --encoder"):
        toy_head("abc").require("xyz")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classes": ("one",)}, "wanted weight"),
        ({"classes": ("a", "a", "b")}, "same name"),
        ({"bias": np.zeros(3)}, "wanted float32"),
        ({"bias": np.full(3, np.nan, np.float32)}, "finite"),
        ({"abstain_below": 1.5}, "wanted 0 to 1"),
        ({"abstain_below": float("nan")}, "wanted 0 to 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, reason):
    head = toy_head("abc")
    fields = {"weight": head.weight, "bias": head.bias, "classes": head.classes, "encoder_id": "abc"}
    with pytest.raises(ValueError, match=reason):
        Head(**(fields | change))


def test_a_head_decides_from_its_confidence_on():
    head = replace(toy_head("abc"), abstain_below=0.5)
    assert head.decide(np.float32([0.2, 0.5, 0.3])) == "dog"
    assert head.decide(np.float32([0.2, 0.49, 0.31])) is None
    assert toy_head("abc").decide(np.float32([0.3, 0.36, 0.34])) == "dog"


def test_a_head_written_before_heads_could_abstain_decides_always(tmp_path):
    replace(toy_head("abc"), abstain_below=0.9).save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz", allow_pickle=False) as arrays:
        np.savez(tmp_path / "old.npz", **{name: arrays[name] for name in arrays if name != "abstain_below"})
    new, old = Head.load(tmp_path / "new.npz"), Head.load(tmp_path / "old.npz")
    assert (new.abstain_below, old.abstain_below) == (0.9, 0.0)
    np.testing.assert_array_equal(old.weight, new.weight)


def test_several_heads_go_by_the_names_of_their_files(tmp_path):
    for name in ("b", "a", "sub/a"):
        toy_head(name).save(tmp_path / f"{name}.npz")
    heads = load_heads([tmp_path / "b.npz", tmp_path / "a.npz"])
    assert {name: head.encoder_id for name, head in heads.items()} == {"b": "b", "a": "a"}
    assert next(iter(heads)) == "b", "the first stays the first"
    with pytest.raises(ContractError, match="there is a head named a already; rename"):
        load_heads([tmp_path / "a.npz", tmp_path / "sub" / "a.npz"])


def _pickled(path):
    np.savez(path, weight=np.array([object()]), bias=0, classes=0, encoder_id=0, report=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an npz at all"),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX")),
        lambda path: np.savez(path, weight=np.zeros(3)),
        lambda path: np.save(path.open("wb"), np.zeros(3)),
        lambda path: path.unlink(),
        _pickled,
    ],
)
def test_foreign_and_damaged_files_are_refused_in_one_line(tmp_path, spoil):
    path = tmp_path / "head.npz"
    toy_head("abc").save(path)
    spoil(path)
    with pytest.raises(ContractError, match="simclr fit-head") as caught:
        Head.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_cut_and_many_flipped_bytes_are_refused_or_change_nothing(tmp_path):
    path = tmp_path / "head.npz"
    head = toy_head("abc")
    head.save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            try:
                back = Head.load(path)
            except ContractError:
                continue
            np.testing.assert_array_equal(back.weight, head.weight)
            assert back.classes == head.classes
