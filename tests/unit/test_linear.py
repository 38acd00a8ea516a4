"""The supervised recipes against arithmetic by hand, and a linear layer on a frozen encoder."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from serve.errors import TrainingError
from serve.samples import Sample
from serve.sources import open_source
from tests.flat_colours import COLOURS, FRAME, SIZE, draw_classes
from train import linear as module
from train.augment import SimCLRAugment
from train.benchmarks import LINEAR_RECIPES
from train.data import Batch, load_pixels, step_generator
from train.encoder import Encoder
from train.linear import (
    LINEAR_SGD,
    Classifier,
    Recipe,
    as_input,
    crop_and_flip,
    descend,
    fit,
    label_numbers,
    make_optimizer,
    open_feed,
    score,
    top_hits,
)
from train.optim import LARS

CPU = torch.device("cpu")
NUMBERS = {name: number for number, name in enumerate(COLOURS)}


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder("resnet18", 0.125, "small")


@dataclass
class Given:
    """A feed of ready batches."""

    given: list[Batch]
    samples: tuple[Sample, ...]
    unreadable = ()

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, steps: Iterator[tuple[int, torch.Tensor]]) -> Iterator[Batch]:
        return (batch for batch, _ in zip(self.given, steps, strict=False))


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_peak_rates_are_those_of_the_sources() -> None:
    assert LINEAR_RECIPES["imagenet-linear"].peak_lr == pytest.approx(1.6), "0.1 at 256, so 1.6 at 4096"
    assert LINEAR_SGD.peak_lr == pytest.approx(0.2), "0.1 at 256, so 0.2 at the README's 512"
    root = Recipe(optimizer="LARS", rate=0.005, rule="sqrt", batch_size=1024, epochs=60)
    assert root.peak_lr == pytest.approx(0.16), "SimCLR v2's own figure"


def test_a_small_data_set_gets_a_small_batch_and_its_rate() -> None:
    recipe = LINEAR_SGD.for_pictures(64)
    assert (recipe.batch_size, recipe.peak_lr) == (64, pytest.approx(0.025))
    assert recipe.steps(64) == (1, 100)
    assert replace(LINEAR_SGD, epochs=3).steps(1100) == (2, round(3 * 1100 / 512))
    assert LINEAR_SGD.for_pictures(5000) == LINEAR_SGD


def test_the_rate_is_a_cosine_without_warm_up() -> None:
    for step in (0, 1, 17, 50, 99):
        assert LINEAR_SGD.lr_at(step, 100) == pytest.approx(0.2 * (1 + math.cos(math.pi * step / 100)) / 2)
    assert LINEAR_SGD.lr_at(0, 100) == pytest.approx(0.2)


def test_a_warm_up_is_a_share_of_the_steps() -> None:
    recipe = replace(LINEAR_SGD, warmup=0.1)
    assert [recipe.lr_at(step, 100) for step in (0, 5, 10)] == pytest.approx([0, 0.1, 0.2])


def test_places205_falls_to_a_tenth_after_epochs_4_8_and_12() -> None:
    recipe, per_epoch = LINEAR_RECIPES["places205"], 100
    for epoch, wanted in ((0, 0.01), (3, 0.01), (4, 0.001), (7, 0.001), (8, 1e-4), (11, 1e-4), (12, 1e-5), (13, 1e-5)):
        for step in (epoch * per_epoch, epoch * per_epoch + per_epoch - 1):
            assert recipe.lr_at(step, 14 * per_epoch) == pytest.approx(wanted)


def test_three_steps_of_nesterov_on_the_cosine_by_hand() -> None:
    """In TensorFlow's words: accum = 0.9 accum + g, w -= lr g + 0.9 lr accum, with g = dloss/dw + decay w."""
    recipe = Recipe(optimizer="Nesterov", rate=0.5, rule="linear", batch_size=2, epochs=3, weight_decay=0.1)
    head = nn.Linear(2, 1).double()
    weight, bias, goal = np.array([1.0, -2.0]), 0.5, np.array([3.0, 1.0])
    head.weight.data[:], head.bias.data[:] = torch.tensor(weight), bias
    pictures = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    feed = Given([Batch(pictures, torch.arange(2))] * 3, (Sample("a"), Sample("b")))

    def loss_of(views: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        assert views.shape == pictures.shape
        return (head.weight[0] - torch.tensor(goal)).square().sum() + 3 * head.bias[0]

    descend(loss_of, make_optimizer(recipe, head), feed, recipe, FRAME, device=CPU, name="test")
    accumulated, accumulated_bias = np.zeros(2), 0.0
    for step in range(3):
        rate = 0.5 * 2 / 256 * 0.5 * (1 + math.cos(math.pi * step / 3))
        gradient, gradient_bias = 2 * (weight - goal) + 0.1 * weight, 3 + 0.1 * bias
        accumulated, accumulated_bias = 0.9 * accumulated + gradient, 0.9 * accumulated_bias + gradient_bias
        weight = weight - (rate * gradient + 0.9 * rate * accumulated)
        bias -= rate * gradient_bias + 0.9 * rate * accumulated_bias
    np.testing.assert_allclose(head.weight[0].detach().numpy(), weight, rtol=1e-12)
    assert head.bias.item() == pytest.approx(bias, rel=1e-12)


def test_lars_leaves_the_linear_layer_and_batch_norms_out() -> None:
    model = Classifier(network(), 3)
    recipe = Recipe(optimizer="LARS", rate=0.005, rule="sqrt", batch_size=4, epochs=1, weight_decay=1e-4)
    optimizer = make_optimizer(recipe, model.linear, model.body)
    assert isinstance(optimizer, LARS)
    adapted = [weight for group in optimizer.param_groups if group["adapt"] for weight in group["params"]]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert all(weight.ndim == 4 for weight in adapted)
    assert len(adapted) == sum(parameter.ndim == 4 for parameter in model.parameters())


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    head = nn.Linear(2, 2)
    before = head.weight.clone()
    feed = Given([Batch(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))], (Sample("a"),))
    recipe = replace(LINEAR_SGD, batch_size=1)
    with pytest.raises(TrainingError, match=r"test: the loss is nan at step 0 .* smaller --batch-size"):
        descend(
            lambda *_: head.weight.sum() * math.nan,
            make_optimizer(recipe, head),
            feed,
            recipe,
            FRAME,
            device=CPU,
            name="test",
        )
    assert torch.equal(head.weight, before)


# --- views ------------------------------------------------------------------------------------------------------------


def test_views_are_cropped_and_flipped_but_keep_their_colours() -> None:
    """Every pixel of a ramp is told apart by its value: a flip turns the ramp round, a crop shows a part of it."""
    ramp = torch.arange(SIZE, dtype=torch.uint8) * 10
    flat = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, SIZE, SIZE)
    ramps = ramp.expand(2000, 3, SIZE, SIZE)
    augment, rows = SimCLRAugment(SIZE), torch.arange(2000)
    views = crop_and_flip(Batch(ramps, rows), augment, step_generator(0, 0))
    assert views.shape == (2000, 3, SIZE, SIZE)
    assert views.dtype == torch.uint8
    rising = views[:, 0, 0, -1].int() > views[:, 0, 0, 0].int()
    assert 0.46 < rising.float().mean() < 0.54
    spans = (views[:, 0, 0, -1].int() - views[:, 0, 0, 0].int()).abs().float() / 150
    assert spans.min() < 0.4
    assert spans.max() > 0.9
    assert torch.equal(views[:, 0], views[:, 2]), "no jitter"
    shown = crop_and_flip(Batch(flat.expand(500, 3, SIZE, SIZE), rows[:500]), augment, step_generator(0, 1))
    assert (shown.int() - flat.int()).abs().max() <= 1, "neither grey nor jitter"


def test_crops_of_worker_processes_are_only_flipped() -> None:
    crops = torch.randint(0, 256, (2, 400, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = crop_and_flip(Batch(crops, torch.arange(400)), SimCLRAugment(SIZE), step_generator(0, 0))
    same = (views == crops[0]).flatten(1).all(1)
    turned = (views == crops[0].flip(3)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 0.4 < turned.float().mean() < 0.6


# --- fitting ----------------------------------------------------------------------------------------------------------


def fitted(feed: Any, *, frozen: bool = True, seed: int = 0, epochs: float = 30, rate: float = 3.0) -> Classifier:
    model = Classifier(network(), 3)
    recipe = replace(LINEAR_SGD, epochs=epochs, rate=rate).for_pictures(len(feed))
    fit(model, feed, NUMBERS, recipe, FRAME, frozen=frozen, device=CPU, seed=seed)
    return model


def test_a_linear_layer_learns_while_the_encoder_does_not_move(tmp_path: Path) -> None:
    feed = open_feed(open_source(draw_classes(tmp_path / "train", 6)).train, FRAME, seed=0)
    model = fitted(feed)
    fresh = network().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.body[0].state_dict().items())
    figures, unreadable = score(model, open_source(draw_classes(tmp_path / "test", 2)).train, NUMBERS, FRAME, device=CPU)
    assert figures == {"accuracy": 1.0, "top5": None, "queries": 6}
    assert unreadable == []


def test_the_first_step_is_softmax_regression_on_plain_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zero layer's gradient by hand: mean of (1/C - onehot) times the encoder's features in evaluation mode."""
    feed = load_pixels(open_source(draw_classes(tmp_path / "train", 2)).train, FRAME)
    monkeypatch.setattr(module, "crop_and_flip", lambda batch, *_: batch.pixels)
    model = Classifier(network(), 3)
    assert not model.linear.weight.any()
    assert not model.linear.bias.any()
    recipe = Recipe(optimizer="Nesterov", rate=1.0, rule="linear", batch_size=6, epochs=1)
    fit(model, feed, NUMBERS, recipe, FRAME, frozen=True, device=CPU)
    with torch.no_grad():
        features = network().eval()(feed.images.float() / 255)
    residual = torch.full((6, 3), 1 / 3) - F.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    gradient = residual.T @ features / 6
    torch.testing.assert_close(model.linear.weight.detach(), -(1 + 0.9) * 6 / 256 * gradient, rtol=1e-4, atol=1e-7)


def test_every_step_draws_other_crops_and_a_seed_repeats_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_source(draw_classes(tmp_path / "train", 6)).train
    noise = torch.randint(0, 256, (18, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    feed = Given([Batch(noise, torch.arange(18))] * 3, samples)
    seen: list[torch.Tensor] = []
    original = module.crop_and_flip
    monkeypatch.setattr(module, "crop_and_flip", lambda *given: seen.append(original(*given)) or seen[-1])
    first, again, other = (fitted(feed, epochs=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:6]))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[6])
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_a_feed_of_ready_crops_does_as_well(tmp_path: Path) -> None:
    samples = open_source(draw_classes(tmp_path / "train", 6)).train
    pixels = load_pixels(samples, FRAME).images
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    model = fitted(Given([Batch(torch.stack([pixels[order]] * 2), order)] * 30, samples))
    assert score(model, samples, NUMBERS, FRAME, device=CPU)[0]["accuracy"] == 1


def test_data_larger_than_memory_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_classes(tmp_path / "train", 6)
    (folder / "red" / "red_0.png").write_bytes(b"no picture")
    monkeypatch.setattr(module, "memory_shortage", lambda *_: "too many")
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    feed = open_feed(open_source(folder).train, FRAME, seed=0)
    model = fitted(feed)
    assert [Path(picture.source).name for picture in feed.unreadable] == ["red_0.png"]
    samples = open_source(folder).train
    assert score(model, samples, NUMBERS, FRAME, device=CPU)[0] == {"accuracy": 1.0, "top5": None, "queries": 17}


def test_fine_tuning_moves_everything(tmp_path: Path) -> None:
    feed = load_pixels(open_source(draw_classes(tmp_path / "train", 6)).train, FRAME)
    model = fitted(feed, frozen=False, epochs=4, rate=1.0)  # the zero layer, then last gammas of 0, hold gradients back
    fresh = network().state_dict()
    still = [name for name, value in model.body[0].state_dict().items() if torch.equal(value, fresh[name])]
    assert still == [], "weights, and the statistics of batch norms"


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 50])
def test_top_hits_count_as_a_loop_does(k: int) -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(40, 12)), rng.integers(-1, 12, 40)
    wanted = 0
    for row, target in zip(logits, targets, strict=True):
        better = sum(value > row[target] for value in row)
        wanted += int(target >= 0 and better < k)
    assert top_hits(torch.from_numpy(logits), torch.from_numpy(targets), k) == wanted


class AlwaysThird(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(7.0).roll(3).expand(len(images), 7)  # 4 5 6 0 1 2 3: the order is 2 1 0 6 5 4 3


def test_scores_count_unknown_classes_as_wrong_and_leave_unreadable_out(tmp_path: Path) -> None:
    samples = list(open_source(draw_classes(tmp_path / "test", 1)).train)
    labels = [replace(sample, label=name) for sample, name in zip(samples, "cgx", strict=True)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    numbers = {name: number for number, name in enumerate("abcdefg")}
    figures, unreadable = score(AlwaysThird(), [*labels, Sample(str(broken), label="c")], numbers, FRAME, device=CPU)
    assert figures == {"accuracy": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3), "queries": 3}
    assert [picture.source for picture in unreadable] == [str(broken)]
    with pytest.raises(TrainingError, match="none of 1 pictures to score on can be read"):
        score(AlwaysThird(), [Sample(str(broken))], numbers, FRAME, device=CPU)


def test_numbers_of_labels_and_input_pixels() -> None:
    samples = [Sample("1", label="red"), Sample("2", identity="blue"), Sample("3", label="mauve")]
    assert label_numbers(samples, NUMBERS).tolist() == [2, 0, -1]
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 3, 2, 3)
    torch.testing.assert_close(as_input(pixels)[0, 0, 0], torch.tensor([0, 0.2, 1]))
