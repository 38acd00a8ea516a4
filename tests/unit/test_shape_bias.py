"""Shape bias: the 16 classes over ImageNet's 1000, the reading of the pictures, the arithmetic, and the whole of it."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.classify import Head
from serve.encoder import OnnxEncoder
from serve.errors import ContractError, EncoderMismatch, SourceError
from serve.samples import Sample
from serve.shape_bias.classes import MEMBERS, columns_of, decide
from serve.shape_bias.cue_conflict import Stimulus, differences, read_stimuli
from serve.shape_bias.evaluate import evaluate, report_lines
from serve.shape_bias.tally import Z_95, shape_bias, tally, wilson
from tests.toy_encoder import DIM, HEIGHT, WIDTH

COUNTS = {
    "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6, "chair": 4, "clock": 3,
    "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8,
}  # fmt: skip
CLASSES = tuple(COUNTS)


def imagenet_names() -> list[str]:
    """Folder names in ImageNet's order: the 207 real ones in their places, invented ones between them."""
    real = {index: synset for members in MEMBERS.values() for index, synset in members.items()}
    return [real.get(index, f"n{index:08d}x") for index in range(1000)]


# --- the 16 classes ---------------------------------------------------------------------------------------------------


def test_the_classes_are_as_many_as_published_and_share_nothing() -> None:
    assert {name: len(members) for name, members in MEMBERS.items()} == COUNTS
    indices = [index for members in MEMBERS.values() for index in members]
    assert len(set(indices)) == len(indices) == 207
    assert 0 <= min(indices) < max(indices) < 1000
    assert list(MEMBERS) == sorted(MEMBERS)


def test_synsets_stand_in_the_order_of_their_indices() -> None:
    synsets = dict(sorted(pair for members in MEMBERS.values() for pair in members.items()))
    assert list(synsets.values()) == sorted(set(synsets.values()))
    known = {8: "n01514859", 281: "n02123045", 404: "n02690373", 499: "n03041632", 766: "n04111531", 867: "n04467665"}
    assert {index: synsets[index] for index in known} == known


@pytest.mark.parametrize("names", [imagenet_names(), [str(i) for i in range(1000)], [f"{i:03d}" for i in range(1000)]])
def test_columns_follow_the_names_in_whatever_order(names: list[str]) -> None:
    assert columns_of(names) == {name: list(members) for name, members in MEMBERS.items()}
    backwards = columns_of(names[::-1])
    assert backwards == {name: [999 - index for index in members] for name, members in MEMBERS.items()}


@pytest.mark.parametrize(("names", "complaint"), [
    (["cat", "dog"], "the head has 2 classes, such as cat, wanted ImageNet's 1000: .*--protocol imagenet-linear"),
    ([f"n{i:08d}" for i in range(1000)], "such as n00000000, are not ImageNet's: 207 are missing, such as n02690373"),
    ([str(i) for i in range(1, 1001)], "such as 1, are not ImageNet's: 1 are missing, such as 0;"),
])  # fmt: skip
def test_other_classes_than_imagenet_s_are_refused(names: list[str], complaint: str) -> None:
    with pytest.raises(ContractError, match=complaint):
        columns_of(names)


def test_decisions_are_those_of_sums_written_out() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(1000, 0.05), size=300).astype(np.float32)
    wanted = []
    for row in probabilities:
        best, name_of_best = -1.0, ""
        for name in CLASSES:
            total = 0.0
            for index in MEMBERS[name]:
                total += float(row[index])
            if total / COUNTS[name] > best:
                best, name_of_best = total / COUNTS[name], name
        wanted.append(name_of_best)
    assert decide(probabilities, columns_of(imagenet_names())) == wanted
    assert len(set(wanted)) > 8


def test_it_is_the_mean_and_not_the_sum_that_decides() -> None:
    row = np.zeros((1, 1000), np.float32)
    row[0, list(MEMBERS["dog"])] = 0.9 / 109
    row[0, list(MEMBERS["knife"])] = 0.1
    assert decide(row, columns_of(imagenet_names())) == ["knife"]
    assert decide(np.zeros((1, 1000), np.float32), columns_of(imagenet_names())) == ["airplane"], "ties go to the first"


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def whole_set() -> list[Stimulus]:
    """1,280 pictures as published: 80 of each shape and of each texture, 80 without a conflict."""
    return [
        Stimulus(Sample(f"{shape}/{shape}{row}-{texture}{row}.png"), shape, texture)
        for shape, texture, row in itertools.product(CLASSES, CLASSES, range(5))
    ]


@pytest.mark.parametrize(("name", "shapes", "textures", "published"), [
    ("AlexNet, torchvision", 182, 537, 25.31),
    ("VGG-16, torchvision", 84, 828, 9.21),
    ("ResNet-50", 162, 572, 22.07),
    ("ResNet-50 on stylised ImageNet", 586, 141, 80.61),
    ("AlexNet, caffe", 283, 376, 42.94),
    ("GoogLeNet, caffe", 228, 503, 31.19),
    ("VGG-16, caffe", 130, 625, 17.22),
])  # fmt: skip
def test_the_bias_of_published_decisions(name: str, shapes: int, textures: int, published: float) -> None:
    """Counts from the decisions in rgeirhos/texture-vs-shape and model-vs-human, of 1,200 conflicts."""
    stimuli = whole_set()
    conflicts = [stimulus for stimulus in stimuli if stimulus.conflicts]
    decisions = {
        stimulus.sample.source: stimulus.shape
        if row < shapes
        else stimulus.texture
        if row < shapes + textures
        else next(other for other in CLASSES if other not in (stimulus.shape, stimulus.texture))
        for row, stimulus in enumerate(conflicts)
    }
    answers = [decisions.get(stimulus.sample.source, stimulus.shape) for stimulus in stimuli]
    report = tally(stimuli, answers)
    assert round(100 * report["shape_bias"], 2) == published, name
    assert (report["shape_hits"], report["texture_hits"], report["conflicts"]) == (shapes, textures, 1200)
    assert report["accuracy_without_conflict"] == 1
    assert report["shape_share"] == (shapes + 80) / 1280
    assert report["texture_share"] == (textures + 80) / 1280
    assert sum(row["shape_hits"] for row in report["by_shape"].values()) == shapes
    assert {row["conflicts"] for row in report["by_shape"].values()} == {75}
    low, high = report["interval"]
    assert low < report["shape_bias"] < high


def test_pictures_without_a_conflict_do_not_count() -> None:
    stimuli = [Stimulus(Sample("a"), "cat", "cat"), Stimulus(Sample("b"), "cat", "dog"), Stimulus(Sample("c"), "cat", "car")]
    report = tally(stimuli, ["cat", "dog", "knife"])
    assert (report["shape_bias"], report["shape_hits"], report["texture_hits"], report["conflicts"]) == (0, 0, 1, 2)
    assert (report["shape_share"], report["texture_share"]) == (1 / 3, 2 / 3)


def test_without_a_right_answer_there_is_no_bias() -> None:
    report = tally([Stimulus(Sample("a"), "cat", "dog")], ["car"])
    assert (report["shape_bias"], report["interval"], report["accuracy_without_conflict"]) == (None, None, None)
    assert shape_bias(0, 0) is None


@pytest.mark.parametrize(("hits", "trials"), [(182, 719), (0, 7), (7, 7), (1, 2), (586, 727), (1, 1000)])
def test_the_interval_is_where_the_score_test_turns(hits: int, trials: int) -> None:
    """Wilson's ends are the shares p with |hits/n - p| = z sqrt(p (1 - p) / n), here found by bisection."""

    def surprise(p: float) -> float:
        return abs(hits / trials - p) - Z_95 * math.sqrt(p * (1 - p) / trials)

    def root(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if surprise(middle) <= 0 else (inside, middle)
        return inside

    share = hits / trials
    assert wilson(hits, trials) == pytest.approx((root(share, 0.0), root(share, 1.0)), abs=1e-9)


# --- the pictures -----------------------------------------------------------------------------------------------------


def draw(root: Path, names: list[str]) -> Path:
    rng = np.random.default_rng(7)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature: four classes as shape and texture, twice each, and one name as in the other release."""
    some = ("bird", "cat", "dog", "truck")
    names = [f"{a}/{a}{n}-{b}{n + 1}.png" for a, b in itertools.product(some, some) for n in (1, 2)]
    return draw(tmp_path_factory.mktemp("cue") / "cue-conflict", [*names, "car/0001_cuc_resnet_car3-boat1.png"])


def test_shape_and_texture_are_in_the_names(folder: Path) -> None:
    stimuli = read_stimuli(str(folder))
    assert len(stimuli) == 33
    by_name = {Path(stimulus.sample.source).name: (stimulus.shape, stimulus.texture) for stimulus in stimuli}
    assert by_name["cat2-dog3.png"] == ("cat", "dog")
    assert by_name["0001_cuc_resnet_car3-boat1.png"] == ("car", "boat")
    assert sum(stimulus.conflicts for stimulus in stimuli) == 25
    alone = read_stimuli(str(folder / "cat"))
    assert {stimulus.shape for stimulus in alone} == {"cat"}


@pytest.mark.parametrize(
    "name", ["cat/photo.png", "cat/dog1-cat2.png", "cat/cat1-cow2.png", "horse/horse1-cat2.png", "cat1-dog2.png"]
)
def test_other_pictures_are_refused_by_name(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "x", ["cat/cat1-dog1.png", name])
    with pytest.raises(SourceError, match=rf"{name}: not a cue-conflict picture, wanted SHAPE/SHAPE1-TEXTURE2.png"):
        read_stimuli(str(tmp_path / "x"))


def test_pictures_without_any_conflict_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "x", ["cat/cat1-cat2.png", "dog/dog1-dog2.png"])
    with pytest.raises(SourceError, match="none of 2 pictures has the texture of another class"):
        read_stimuli(str(tmp_path / "x"))


def test_counts_are_held_against_the_published_ones(folder: Path) -> None:
    assert differences(whole_set()) == []
    assert differences(read_stimuli(str(folder))) == [
        "33 pictures, not 1,280",
        "25 conflicts, not 1,200",
        "16 of 16 classes not with 80 pictures as shape, such as airplane",
        "16 of 16 classes not with 80 pictures as texture, such as airplane",
    ]
    lacking = [stimulus for stimulus in whole_set() if stimulus.sample.source != "oven/oven0-truck0.png"]
    assert differences(lacking) == [
        "1,279 pictures, not 1,280",
        "1,199 conflicts, not 1,200",
        "1 of 16 classes not with 80 pictures as shape, such as oven",
        "1 of 16 classes not with 80 pictures as texture, such as truck",
    ]


# --- the whole --------------------------------------------------------------------------------------------------------


def head_for(encoder_id: str) -> Head:
    rng = np.random.default_rng(3)
    weight = (40 * rng.normal(size=(1000, DIM))).astype(np.float32)
    return Head(weight=weight, bias=np.zeros(1000, np.float32), classes=tuple(imagenet_names()), encoder_id=encoder_id)


def test_an_encoder_with_its_head_is_scored(encoder: OnnxEncoder, folder: Path) -> None:
    head = head_for(encoder.encoder_id)
    report = evaluate(encoder, head, str(folder))
    assert json.loads(json.dumps(report))["pictures"] == 33
    shapes = textures = 0
    for path in sorted(folder.rglob("*.png")):
        shape, texture = ("".join(c for c in part if c.isalpha()) for part in path.stem.split("_")[-1].split("-"))
        pixels = np.asarray(Image.open(path).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        probabilities = head.probabilities(encoder.embed([pixels]))[0]
        scores = {name: np.mean([probabilities[index] for index in members]) for name, members in MEMBERS.items()}
        answer = max(scores, key=lambda name: scores[name])
        shapes += shape != texture and answer == shape
        textures += shape != texture and answer == texture
    assert (report["shape_hits"], report["texture_hits"]) == (shapes, textures)
    assert shapes + textures > 0
    lines = report_lines(report)
    assert lines[0].startswith(f"shape bias {shapes / (shapes + textures):.2%} (95 % interval ")
    assert lines[0].endswith(f"{shapes} answers name the shape, {textures} the texture, of 25 conflicts")
    assert lines[2] == "pictures: whole, 32x16 px, 0 unreadable"
    assert "differs from the literature: an encoder for 32x16 px, not 224x224" in lines
    assert lines[-1].startswith("no shape bias of this network is known to us (Geirhos et al.")


def test_the_crop_of_other_protocols_is_left_out(encoder: OnnxEncoder, folder: Path) -> None:
    report = evaluate(encoder, head_for(encoder.encoder_id), str(folder))
    assert report["preprocess"] == encoder.manifest.preprocess.model_dump() | {"crop": 1.0}


@pytest.mark.parametrize(("width", "published"), [(1, 38.9), (2, 41.7), (4, 40.7)])
def test_simclr_s_own_networks_are_compared(
    encoder: OnnxEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch, width: int, published: float
) -> None:
    manifest = encoder.manifest.model_copy(update={"training": {"arch": "resnet50", "width": width}})
    monkeypatch.setattr(encoder, "manifest", manifest)
    report = evaluate(encoder, head_for(encoder.encoder_id), str(folder))
    assert report["difference_points"] == pytest.approx(100 * report["shape_bias"] - published)
    assert report_lines(report)[-1] == (
        f"shape bias there: {published} % (Geirhos et al. 2020, the official SimCLR weights with their own linear layer); "
        f"difference {report['difference_points']:+.1f} points, not comparable"
    )


def test_a_head_of_another_encoder_is_refused(encoder: OnnxEncoder, folder: Path) -> None:
    with pytest.raises(EncoderMismatch):
        evaluate(encoder, head_for("another"), str(folder))


def test_unreadable_pictures_are_counted_and_left_out(encoder: OnnxEncoder, tmp_path: Path) -> None:
    draw(tmp_path / "x", ["cat/cat1-dog1.png", "dog/dog1-cat1.png"])
    (tmp_path / "x" / "cat" / "cat1-dog1.png").write_bytes(b"no picture")
    report = evaluate(encoder, head_for(encoder.encoder_id), str(tmp_path / "x"))
    assert (report["pictures"], report["unreadable"]) == (1, 1)
    (tmp_path / "x" / "dog" / "dog1-cat1.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match="none of 2 pictures can be read; the first: "):
        evaluate(encoder, head_for(encoder.encoder_id), str(tmp_path / "x"))
