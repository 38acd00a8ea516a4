"""Subsets of labels, and what fine-tuning starts from."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from serve.errors import ContractError, TrainingError
from serve.samples import Sample
from train.checkpoint import save_checkpoint
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.finetune import head_of, label_subset, listed, recipe_for
from train.linear import Classifier

SAMPLES = [
    Sample(f"/data/{name}_{number}.JPEG", label=name)
    for name, count in (("a", 200), ("b", 60), ("c", 3))
    for number in range(count)
]


def save_run(run: Path, layers: int = 2) -> SimCLR:
    """A checkpoint as pretraining leaves it, with batch norms that have seen something."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125, "small")
    model = SimCLR(encoder, ProjectionHead(encoder.feature_dim, 32, layers))
    model.train()(torch.rand(8, 3, 16, 16))
    run.mkdir(exist_ok=True)
    save_checkpoint(run, {"step": 1, "model": model.state_dict(), "optimizer": {}, "facts": {}})
    return model.eval()


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "wanted"), [(0.01, (2, 1, 1)), (0.1, (20, 6, 1)), (1, (200, 60, 3))])
def test_a_subset_takes_the_same_share_of_every_class(fraction: float, wanted: tuple[int, int, int]) -> None:
    subset = label_subset(SAMPLES, fraction, 0)
    assert Counter(sample.label for sample in subset) == dict(zip("abc", wanted, strict=True))
    places = [SAMPLES.index(sample) for sample in subset]
    assert places == sorted(set(places)), "each once, in the samples' order"


def test_a_subset_depends_on_its_seed_alone_and_favours_nobody() -> None:
    assert label_subset(SAMPLES, 0.1, 0) == label_subset(SAMPLES, 0.1, 0)
    assert label_subset(SAMPLES, 0.1, 0) != label_subset(SAMPLES, 0.1, 1)
    drawn = Counter(sample.source for seed in range(300) for sample in label_subset(SAMPLES[:20], 0.5, seed))
    assert all(110 < drawn[sample.source] < 190 for sample in SAMPLES[:20]), "150 times each, on average"


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_share_of_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="wanted more than 0 and at most 1"):
        label_subset(SAMPLES, fraction, 0)


def test_an_official_list_names_its_pictures(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("b_7.JPEG\n\na_3.JPEG\ntrain/c/c_1.JPEG\n")
    assert [sample.source for sample in listed(SAMPLES, path)] == ["/data/a_3.JPEG", "/data/b_7.JPEG", "/data/c_1.JPEG"]
    inside = [Sample("/x/pictures.zip!/train/b/b_7.JPEG", label="b")]
    path.write_text("b_7.JPEG\n")
    assert listed(inside, path) == inside


def test_a_list_of_other_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text("a_3.JPEG\nn01440764_10.JPEG\n")
    with pytest.raises(TrainingError, match=r"1 of its 2 pictures are not in --images, such as n01440764_10.JPEG"):
        listed(SAMPLES, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TrainingError, match="not a readable list of file names"):
        listed(SAMPLES, path)
    with pytest.raises(TrainingError, match="not a readable list of file names"):
        listed(SAMPLES, tmp_path / "missing.txt")
    path.write_text("")
    with pytest.raises(TrainingError, match="0 of its 0 pictures"):
        listed(SAMPLES, path)


# --- starts -----------------------------------------------------------------------------------------------------------


def test_recipes_are_those_of_the_papers() -> None:
    first = recipe_for("encoder", 0.01)
    assert (first.optimizer, first.epochs, first.peak_lr, first.weight_decay) == ("Nesterov", 60, pytest.approx(0.8), 0)
    second = recipe_for("head", 0.01)
    assert (second.optimizer, second.epochs, second.peak_lr, second.weight_decay) == ("LARS", 60, pytest.approx(0.16), 0)
    assert recipe_for("encoder", 128116 / 1281167).epochs == recipe_for("head", 1).epochs == 30, (
        "the official 10 % are a little less"
    )
    assert first.warmup == second.warmup == 0


@pytest.mark.parametrize("layers", [2, 3])
def test_the_first_layer_is_that_of_the_run(tmp_path: Path, layers: int) -> None:
    """Dense, batch norm with its own statistics, ReLU, worked out with the arrays of the checkpoint."""
    model = save_run(tmp_path / "run", layers)
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        features = model.encoder(images)
        state = {name: value.double() for name, value in model.head.state_dict().items()}
        dense = features.double() @ state["0.weight"].T
        normal = (dense - state["1.running_mean"]) / (state["1.running_var"] + 1e-5).sqrt()
        wanted = (normal * state["1.weight"] + state["1.bias"]).clamp(min=0)
        got = Classifier(model.encoder, 4, head_of(tmp_path / "run").first(1)).eval().body(images)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_runs_without_a_head_are_refused_in_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"run: holds no checkpoint.pt, .* fine-tune with --from encoder"):
        head_of(run)
    model = save_run(run, 1)
    with pytest.raises(TrainingError, match="its projection head has one layer only; fine-tune with --from encoder"):
        head_of(run)
    for state in (model.encoder.state_dict(), {"head.0.weight": torch.zeros(4, 4), "head.7.weight": torch.zeros(2, 9)}):
        save_checkpoint(run, {"step": 1, "model": state, "optimizer": {}, "facts": {}})
        with pytest.raises(ContractError, match=r"holds no projection head of ours \(.*\); use --from encoder") as refusal:
            head_of(run)
        assert "\n" not in str(refusal.value)
