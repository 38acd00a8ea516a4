"""`simclr evaluate` by name: what each protocol does, says and refuses, on pictures of a few pixels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from serve.classify import Head
from serve.contract import Manifest, Preprocess
from serve.errors import EncoderMismatch, TrainingError
from serve.samples import ImageSet, Sample
from tests.flat_colours import COLOURS, SIZE, draw_classes
from tests.flat_colours import FRAME as SMALL
from train import protocols as module
from train.benchmarks import BENCHMARKS, FINE_TUNING, FRAME, Benchmark, compare_data, compare_result, compare_start
from train.checkpoint import load_encoder, save_checkpoint, save_encoder
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.probe import evaluate as evaluate_vectors
from train.probe import split_for_scoring
from train.protocols import evaluate, report_lines
from train.torch_encoder import open_run

SHADES = [*COLOURS.values(), (200, 200, 20), (20, 200, 200), (200, 20, 200)]


pytestmark = pytest.mark.usefixtures("one_cpu")


def draw(folder: Path, classes: int, count: int) -> Path:
    return draw_classes(folder, count, {f"class {number}": colour for number, colour in enumerate(SHADES[:classes])})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The layout of ImageNet: train/ and val/."""
    root = tmp_path_factory.mktemp("images")
    draw(root / "train", 3, 8)
    draw(root / "val", 3, 2)
    return str(root)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pretraining leaves, as far as evaluation reads it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125, "small-s2")
    model = SimCLR(encoder, ProjectionHead(encoder.feature_dim, 32))
    model.train()(torch.rand(16, 3, SIZE, SIZE))
    save_encoder(folder, encoder, SMALL, {"method": "SimCLR", "head_layers": 2})
    save_checkpoint(folder, {"step": 1, "model": model.state_dict(), "optimizer": {}, "facts": {}})
    return folder


def scored(run: Path, images: str, protocol: Any, **options: Any) -> dict[str, Any]:
    report = evaluate(open_run(run), images, options.pop("test", None), protocol, run=run, **options)
    return json.loads(json.dumps(report))


# --- each protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_vectors_are_scored_whoever_made_them(run: Path, images: str, protocol: Any) -> None:
    report = evaluate(open_run(run), images, None, protocol)
    assert report == evaluate_vectors(open_run(run), images, None, protocol)
    assert report_lines(report) == [
        f"{protocol} accuracy {report['accuracy']:.2%} on 6 pictures, 3 classes, 24 to learn from (chance 33.33%)"
    ]


def test_linear_sgd_learns_and_says_how(run: Path, images: str) -> None:
    report = scored(run, images, "linear-sgd")
    assert report["accuracy"] == 1
    assert (report["bank"], report["queries"], report["classes"], report["unreadable"], report["top5"]) == (24, 6, 3, 0, None)
    assert report["encoder_id"] == open_run(run).encoder_id
    assert report_lines(report) == [
        "linear-sgd accuracy 100.00% on 6 pictures, 3 classes, 24 to learn from (chance 33.33%)",
        "Nesterov, 100 epochs in batches of 24, peak lr 0.00938, weight decay 0",
        "pictures: 16x16 px, center_crop 1, bicubic",
    ]
    few = scored(run, images, "linear-sgd", epochs=2, batch_size=4, seed=1)
    assert few == scored(run, images, "linear-sgd", epochs=2, batch_size=4, seed=1)
    assert (few["recipe"]["epochs"], few["recipe"]["batch_size"], few["recipe"]["seed"]) == (2, 4, 1)


def test_fine_tuning_on_a_share_of_the_labels(run: Path, images: str) -> None:
    report = scored(run, images, "finetune", label_fraction=0.5, epochs=40)
    assert report["accuracy"] >= 2 / 3
    assert (report["bank"], report["classes"], report["label_share"], report["from"]) == (12, 3, 0.5, "encoder")
    assert report_lines(report)[1] == (
        "from the encoder, 50.0% of the labels, Nesterov, 40 epochs in batches of 12, peak lr 0.00234, weight decay 0"
    )


def test_fine_tuning_from_the_head_as_simclr_v2_does(run: Path, images: str) -> None:
    report = scored(run, images, "finetune", start="head", label_fraction=0.01)
    assert report["recipe"]["optimizer"] == "LARS"
    assert (report["bank"], report["recipe"]["epochs"], report["from"]) == (3, 60, "head"), "at least one picture of each class"
    assert report["label_share"] == 3 / 24
    before = load_file(run / "encoder.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in load_encoder(run)[0].state_dict().items())


def test_fine_tuning_on_listed_pictures_of_another_test_set(run: Path, images: str, tmp_path: Path) -> None:
    names = tmp_path / "list.txt"
    names.write_text("class 0_1.png\nclass 2_3.png\nclass 2_4.png\n")
    report = scored(run, images, "finetune", label_list=names, epochs=1, test=str(draw(tmp_path / "test", 3, 1)))
    assert (report["bank"], report["classes"], report["queries"]) == (3, 2, 3)
    names.write_text("class 2_3.png\nclass 2_4.png\n")
    with pytest.raises(TrainingError, match=r"a classifier needs at least two classes, got \['class 2'\]"):
        scored(run, images, "finetune", label_list=names)


def test_a_fine_tuned_encoder_can_be_kept(run: Path, images: str, tmp_path: Path) -> None:
    report = scored(run, images, "finetune", epochs=8, save=tmp_path / "tuned")
    encoder, manifest = load_encoder(tmp_path / "tuned")
    former = load_encoder(run)[0].state_dict()
    assert not any(torch.equal(value, former[name]) for name, value in encoder.state_dict().items() if "conv" in name)
    tuning: Any = manifest.training["fine_tuning"]
    assert (manifest.training["arch"], tuning["accuracy"]) == ("resnet18", report["accuracy"])
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["fine_tuning"]["encoder_id"] == report["encoder_id"]
    assert evaluate(open_run(tmp_path / "tuned"), images, None, "knn")["encoder_id"] == manifest.encoder_id
    with pytest.raises(TrainingError, match="tuned: already exists"):
        scored(run, images, "finetune", save=tmp_path / "tuned")


def test_only_a_run_can_be_trained(run: Path, images: str) -> None:
    for protocol in ("linear-sgd", "finetune", "imagenet-linear", "places205"):
        with pytest.raises(TrainingError, match=f"--protocol {protocol} .* needs a RUN folder; .*: --protocol knn or linear"):
            evaluate(open_run(run), images, None, protocol)  # type: ignore[arg-type]


def test_unreadable_pictures_and_missing_labels(run: Path, images: str, tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", 2, 5)
    (folder / "class 0" / "class 0_0.png").write_bytes(b"no picture")
    report = scored(run, str(folder), "linear-sgd", epochs=1)
    assert (report["bank"], report["queries"], report["unreadable"]) == (7, 2, 1)
    with pytest.raises(TrainingError, match="no labels to score on"):
        scored(run, str(folder / "class 0"), "linear-sgd")


# --- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "counts"), [
    ("imagenet-linear", ("1,000", "1,281,167", "50,000")),
    ("places205", ("205", "2,448,873", "20,500")),
])  # fmt: skip
def test_a_small_copy_of_a_benchmark_runs_and_says_that_it_is_none(
    run: Path, images: str, protocol: Any, counts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []
    original = module.open_feed
    monkeypatch.setattr(module, "open_feed", lambda bank, frame, seed: frames.append(frame) or original(bank, frame, seed=seed))
    report = scored(run, images, protocol, epochs=1, batch_size=12)
    assert frames == [
        Preprocess(height_px=224, width_px=224, resize="center_crop", crop=0.875, resample="bicubic", jpeg="full")
    ]
    assert report["differs"] == [
        f"3 classes, not {counts[0]}",
        f"24 training pictures, not {counts[1]}",
        f"6 test pictures, not {counts[2]}",
        "an encoder trained at 16x16 px, not 224x224",
    ]
    lines = report_lines(report)
    assert lines[-1] == f"no top-1 of this network is known to us ({BENCHMARKS[protocol].source})"
    assert lines[2] == "pictures: 224x224 px, center_crop 0.875, bicubic"
    assert lines[3] == f"differs from the literature: 3 classes, not {counts[0]}"
    assert len(lines) == 8


def tiny(protocol: str) -> Benchmark:
    return replace(BENCHMARKS[protocol], classes=2, train=4, test=2)


def findings(protocol: str, images: ImageSet, manifest: Manifest) -> list[str]:
    return compare_data(protocol, tiny(protocol), split_for_scoring(images)[0], images, manifest)


def listing(train: str, test: str) -> ImageSet:
    """A picture for each letter, which is its class; a dot has none."""
    parts = [tuple(Sample(f"{part}{i}", label=None if name == "." else name) for i, name in enumerate(names))
             for part, names in (("train", train), ("val", test))]  # fmt: skip
    return ImageSet(train=parts[0], test=parts[1])


def test_the_literature_s_own_data_differ_in_nothing(run: Path) -> None:
    manifest = load_encoder(run)[1]
    right = manifest.model_copy(update={"preprocess": FRAME})
    assert findings("places205", listing("aabb", "ab"), right) == []


@pytest.mark.parametrize(("train", "test", "wanted"), [
    ("aabbb", "ab", "5 training pictures, not 4"),
    ("aabb", "abb", "3 test pictures, not 2"),
    ("aaaa", "aa", "1 classes, not 2"),
    ("aabb", "az", "1 test classes without training pictures, such as z"),
    ("aabba", "..", "no labelled val folder beside train: every fifth picture is held back"),
])  # fmt: skip
def test_each_difference_is_said(run: Path, train: str, test: str, wanted: str) -> None:
    manifest = load_encoder(run)[1]
    assert wanted in findings("imagenet-linear", listing(train, test), manifest)


def test_more_classes_than_the_benchmark_are_refused(run: Path) -> None:
    with pytest.raises(TrainingError, match="3 classes, but places205 has 2; use --protocol linear-sgd"):
        findings("places205", listing("abc", "ab"), load_encoder(run)[1])


@pytest.mark.parametrize(("facts", "protocol", "wanted"), [
    ({"arch": "resnet50", "width": 1.0}, "imagenet-linear", 69.3),
    ({"arch": "resnet50", "width": 2.0, "head_layers": 2}, "imagenet-linear", 74.2),
    ({"arch": "resnet50", "width": 4, "sk": False}, "imagenet-linear", 76.5),
    ({"arch": "resnet50", "width": 1, "head_layers": 3}, "imagenet-linear", 71.7),
    ({"arch": "resnet50", "width": 1, "head_layers": 3, "sk": True}, "imagenet-linear", 74.6),
    ({"arch": "resnet152", "width": 3, "head_layers": 3, "sk": True}, "imagenet-linear", 79.8),
    ({"arch": "resnet18", "width": 1}, "imagenet-linear", None),
    ({"arch": "resnet50", "width": 0.5}, "imagenet-linear", None),
    ({"arch": "resnet50", "width": 1}, "places205", 53.3),
    ({"arch": "resnet50", "width": 2}, "places205", None),
])  # fmt: skip
def test_the_reference_is_that_of_the_same_network(
    run: Path, facts: dict[str, Any], protocol: str, wanted: float | None
) -> None:
    manifest = load_encoder(run)[1].model_copy(update={"training": facts})
    result = compare_result(BENCHMARKS[protocol], manifest, {"accuracy": 0.703, "top5": None}, [])
    assert result["reference"] == wanted
    assert result["difference_points"] == (None if wanted is None else pytest.approx(70.3 - wanted))


def test_the_difference_is_printed_in_points(run: Path) -> None:
    manifest = load_encoder(run)[1].model_copy(update={"training": {"arch": "resnet50", "width": 1}})
    report = {"protocol": "imagenet-linear", "accuracy": 0.6812, "top5": 0.88, "queries": 50000, "classes": 1000}
    report |= {"bank": 1281167, "chance": 0.001}
    exact = report | compare_result(BENCHMARKS["imagenet-linear"], manifest, report, [])
    assert report_lines(exact) == [
        "imagenet-linear accuracy 68.12% (top-5 88.00%) on 50000 pictures, 1000 classes, 1281167 to learn from (chance 0.10%)",
        "top-1 there: 69.3 % (the paper); difference -1.2 points",
        "top-5 there: 89.0 %; difference -1.0 points",
    ]
    other = report | compare_result(BENCHMARKS["imagenet-linear"], manifest, report, ["100 classes, not 1,000"])
    assert report_lines(other)[1:3] == [
        "differs from the literature: 100 classes, not 1,000",
        "top-1 there: 69.3 % (the paper); difference -1.2 points, not comparable",
    ]


@pytest.mark.parametrize(("facts", "name", "top1", "top5"), [
    ({"arch": "resnet50", "width": 4}, "1percent.txt", 63.0, 85.8),
    ({"arch": "resnet50", "width": 4}, "10percent.txt", 74.4, 92.6),
    ({"arch": "resnet50", "width": 1, "head_layers": 3}, "1percent.txt", 57.9, None),
    ({"arch": "resnet50", "width": 1, "head_layers": 3, "sk": True}, "10percent.txt", 72.1, None),
    ({"arch": "resnet152", "width": 3, "head_layers": 3, "sk": True}, "1percent.txt", 74.9, None),
])  # fmt: skip
def test_fine_tuning_has_its_references(run: Path, facts: dict[str, Any], name: str, top1: float, top5: float | None) -> None:
    manifest = load_encoder(run)[1].model_copy(update={"training": facts})
    result = compare_result(FINE_TUNING[name], manifest, {"accuracy": 0.7, "top5": 0.9}, [])
    assert (result["reference"], result["top5_reference"]) == (top1, top5)
    assert result["top5_difference_points"] == (None if top5 is None else pytest.approx(90 - top5))


@pytest.mark.parametrize(("layers", "start", "wanted"), [
    (2, "encoder", []),
    (3, "head", []),
    (2, "head", ["fine-tuned from the head, where a network like this was from the encoder"]),
    (3, "encoder", ["fine-tuned from the encoder, where a network like this was from the head"]),
])  # fmt: skip
def test_what_fine_tuning_started_from_is_compared(run: Path, layers: int, start: Any, wanted: list[str]) -> None:
    manifest = load_encoder(run)[1].model_copy(update={"training": {"head_layers": layers}})
    assert compare_start(manifest, start) == wanted


def test_the_official_lists_are_known_by_their_names(
    run: Path, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []

    def untrained(model: Any, bank: Any, queries: Any, numbers: Any, recipe: Any, frame: Preprocess, **_: Any) -> Any:
        frames.append(frame)
        return {"accuracy": 0.5, "top5": None}

    monkeypatch.setattr(module, "fit_and_score", untrained)
    names = tmp_path / "10percent.txt"
    names.write_text("class 0_1.png\nclass 1_3.png\nclass 2_4.png\n")
    report = scored(run, images, "finetune", label_list=names)
    assert report["differs"] == [
        "3 classes, not 1,000",
        "3 training pictures, not 128,116",
        "6 test pictures, not 50,000",
        "an encoder trained at 16x16 px, not 224x224",
    ]
    assert report["reference_source"] == "the paper, 10 % of the labels"
    other = scored(run, images, "finetune", label_list=names.rename(tmp_path / "mine.txt"))
    assert "reference" not in other
    assert frames == [FRAME, load_encoder(run)[1].preprocess]


def test_a_linear_layer_can_be_kept(run: Path, images: str, tmp_path: Path) -> None:
    report = scored(run, images, "linear-sgd", save=tmp_path / "head.npz", epochs=3)
    head, plain = Head.load(tmp_path / "head.npz"), open_run(run, unit=False)
    head.require(plain.encoder_id)
    assert (head.classes, head.report["accuracy"]) == (("class 0", "class 1", "class 2"), report["accuracy"])
    files = sorted((Path(images) / "val").rglob("*.png"))
    answers = head.probabilities(plain.embed(files)).argmax(1)
    assert np.mean([head.classes[answer] == file.parent.name for answer, file in zip(answers, files, strict=True)]) == (
        pytest.approx(report["accuracy"])
    )
    with pytest.raises(EncoderMismatch):
        head.require(open_run(run).encoder_id)
    with pytest.raises(TrainingError, match=r"head.npz: already exists; choose another --save"):
        scored(run, images, "linear-sgd", save=tmp_path / "head.npz")


def test_top_5_is_reported_from_six_classes_on(run: Path, tmp_path: Path) -> None:
    folder = draw(tmp_path / "six", 6, 5)
    report = scored(run, str(folder), "linear-sgd", epochs=1)
    assert report["accuracy"] <= report["top5"] <= 1
    assert f"(top-5 {report['top5']:.2%})" in report_lines(report)[0]
